"""The PyTorch sides of `methods_vs_torch.py`: each method's inner loop, written plainly.

They read nothing of this repository. Inputs w [4096, outputs] and x [tokens, 4096] are float32; results
are tensors by name. The sizes of both sides are set here.
"""

import math

import torch

WIDTH, BITS, GROUP = 4096, 4, 128
LEVELS = 2**BITS - 1
STEPS, RATE = 4, 3e-3  # FlexRound's.
FLAT_STEPS, FLAT_RATE, CLIP_FACTOR = 4, 5e-3, 10.0  # FlatQuant's; the clips learn 10 times faster.
FACTOR = 64  # Of FlatQuant's P: 64 x 64 channels.
INITIAL_CLIP = 4.0
FLOATS, GRID = ((3, 0), (2, 1), (1, 2)), 100  # LLM-FP4's exponent and mantissa bits, and gammas.
PASS_TOKENS = 4096  # Of calibration, at once.
RANK, CENTROIDS, LENGTH, ITERATIONS, BLOCK = 8, 4096, 6, 5, 128


# ---------------------------------------------------------------- Hessians of GPTQ, VPTQ, AdaDim


def torch_hessian(w, x):
  """Accumulated over passes of 4096 tokens."""
  del w
  total = torch.zeros(WIDTH, WIDTH)
  for rows in x.split(PASS_TOKENS):
    total.addmm_(rows.T, rows)
  return {"hessian": total.mul_(2 / len(x))}


# ---------------------------------------------------------------- AdaDim: the error of either axis


def torch_round(flat: torch.Tensor, low: torch.Tensor, high: torch.Tensor, largest: int):
  """Asymmetric codes 0 ... largest of the rows' ranges, and back."""
  scale = ((high - low) / largest).clamp(min=1e-7)
  zero = torch.round(-low / scale).clamp_(0, largest)
  return (torch.round(flat / scale) + zero).clamp_(0, largest).sub_(zero).mul_(scale)


def torch_axis_errors(w, x):
  target, errors = x @ w, []
  for grouped in (w.T.contiguous(), w):
    flat = grouped.reshape(-1, GROUP)
    rounded = torch_round(flat, flat.amin(1, keepdim=True), flat.amax(1, keepdim=True), LEVELS)
    rounded = rounded.reshape(grouped.shape)
    errors.append((x @ (rounded.T if grouped is not w else rounded) - target).pow_(2).mean())
  return {"errors": torch.stack(errors)}


# ---------------------------------------------------------------- LoRC: factors of the rounding error


def torch_factors_by_svd(error):
  """As published."""
  u, s, vt = torch.linalg.svd(error, full_matrices=False)
  root = s[:RANK].sqrt()
  return {"product": (u[:, :RANK] * root) @ (root[:, None] * vt[:RANK])}


def torch_factors_by_eigenvectors(error):
  """The eigenvectors of E^T E instead: the fastest plain PyTorch."""
  v = torch.linalg.eigh(error.T @ error).eigenvectors[:, -RANK:]
  us = error @ v
  root = us.norm(dim=0).sqrt()
  return {"product": (us / root) @ (root[:, None] * v.T)}


# ---------------------------------------------------------------- QLLM: which channels are merged


def torch_merges(w, x, splits):
  extra, most = int(splits.sum()) - WIDTH, WIDTH // 5
  channel = torch.repeat_interleave(torch.arange(WIDTH), splits)
  x, total, single = x[:, channel], w[channel].sum(1), splits[channel] == 1
  scores = torch.cdist(x[:, 0::2].T.contiguous(), x[:, 1::2].T.contiguous()).pow_(2)
  scores.mul_((total[0::2, None] + total[None, 1::2]).pow_(2))
  scores.masked_fill_(~(single[0::2, None] & single[None, 1::2]), float("inf"))
  least, nearest = scores.min(1)
  source = torch.argsort(least, stable=True)[:extra]
  source, target = channel[2 * source], channel[2 * nearest[source] + 1]
  order = torch.argsort(source)
  fill = torch.full((most - extra,), WIDTH)
  return {"sources": torch.cat([source[order], fill]), "targets": torch.cat([target[order], fill])}


# ---------------------------------------------------------------- FlexRound: steps of Adam


@torch.enable_grad()
def torch_flexround(w, x):
  target, grouped = x @ w, w.T.reshape(w.shape[1], -1, GROUP)
  low = grouped.amin(-1, keepdim=True).clamp(max=0)
  high = grouped.amax(-1, keepdim=True).clamp(min=0)
  scale = (high - low).clamp(min=1e-5) / LEVELS
  zero = (-torch.round(low / scale)).clamp(0, LEVELS)
  logs = [torch.zeros_like(scale), torch.zeros_like(grouped), torch.zeros(len(scale), 1, 1)]
  s1, s2, s3 = logs = [log.requires_grad_() for log in logs]
  optimizer = torch.optim.Adam(logs, lr=RATE)
  cosine = lambda step: 0.5 * (1 + math.cos(math.pi * step / STEPS))
  schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)

  def codes():
    quotient = grouped / (scale * s1.exp() * (s2 + s3).exp())
    rounded = quotient + (quotient.round() - quotient).detach()
    return (rounded + zero).clamp(0, LEVELS)

  def error():
    rounded = ((codes() - zero) * (scale * s1.exp())).reshape(len(scale), -1)
    return (x @ rounded.T - target).pow(2).sum(-1).mean()

  losses = []
  with torch.no_grad():
    before = error()
  for _ in range(STEPS):
    loss = error()
    losses.append(loss.detach())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
  with torch.no_grad():
    assert error() <= before
    return {"losses": torch.stack(losses), "codes": codes().reshape(len(scale), -1).T}


# ---------------------------------------------------------------- FlatQuant: steps of Adam


def torch_kronecker(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
  """x (left (x) right)."""
  return (left.T @ (x.reshape(-1, FACTOR, FACTOR) @ right)).reshape(x.shape)


def torch_svd(raw: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
  """U diag(sigma) V^T and its inverse transpose, U and V by Cayley from raw [2, n, n]."""
  lower, eye = raw.tril(-1), torch.eye(raw.shape[-1])
  half = (lower - lower.mT) / 2
  u, v = torch.linalg.solve(eye - half, eye + half)
  return (u * sigma) @ v.T, (u / sigma) @ v.T


def torch_symmetric(rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
  """Symmetric rounding in the range of each row; gradients pass it."""
  largest = LEVELS // 2
  scale = torch.maximum(low.abs(), high.abs()).clamp(min=1e-7) / largest
  quotient = rows / scale
  rounded = quotient + (quotient.round() - quotient).detach()
  return rounded.clamp(-largest - 1, largest) * scale


@torch.enable_grad()
def torch_flatquant(w, x, left, right, scale, steps=FLAT_STEPS):
  target, start = x @ w, scale
  clips = [torch.full((2, w.shape[1], 1), INITIAL_CLIP), torch.full((2,), INITIAL_CLIP)]
  sigmas = [torch.ones(FACTOR).requires_grad_() for _ in (left, right)]
  left, right, scale = (m.clone().requires_grad_() for m in (left, right, scale))
  of_weights, of_inputs = (clip.requires_grad_() for clip in clips)
  optimizer = torch.optim.AdamW(
    [
      {"params": [left, right, *sigmas, scale], "lr": FLAT_RATE},
      {"params": [of_weights, of_inputs], "lr": CLIP_FACTOR * FLAT_RATE},
    ],
    weight_decay=0.01,
  )

  def cosine(last: float):
    return lambda step: last + (1 - last) * 0.5 * (1 + math.cos(math.pi * step / steps))

  schedule = torch.optim.lr_scheduler.LambdaLR(
    optimizer, [cosine(1e-3), cosine(1e-3 / CLIP_FACTOR)]
  )

  def error():
    (p1, inverse_p1), (p2, inverse_p2) = map(torch_svd, (left, right), sigmas)
    kernel = torch_kronecker(w.T / scale, inverse_p1, inverse_p2)
    shrink = of_weights.sigmoid()
    low, high = kernel.amin(1, keepdim=True) * shrink[0], kernel.amax(1, keepdim=True) * shrink[1]
    kernel = torch.minimum(torch.maximum(kernel, low), high)
    kernel = torch_symmetric(kernel, kernel.amin(1, keepdim=True), kernel.amax(1, keepdim=True))
    inputs, shrink = torch_kronecker(x * scale, p1, p2), of_inputs.sigmoid()
    low, high = inputs.amin(1, keepdim=True) * shrink[0], inputs.amax(1, keepdim=True) * shrink[1]
    return (torch_symmetric(inputs, low, high) @ kernel.T - target).pow(2).mean()

  with torch.no_grad():
    before = error()
  for _ in range(steps):
    loss = error()
    optimizer.zero_grad()
    (loss / loss.detach()).backward()
    optimizer.step()
    schedule.step()
  with torch.no_grad():
    return {"errors": torch.stack([before, error()]), "change of c": scale.detach() - start}


# ---------------------------------------------------------------- Outlier Suppression+: thresholds


def torch_threshold(w, x):
  low, high = x.amin(0), x.amax(0)
  largest = torch.maximum(high.max(), -low.min())
  step = (largest - 1.0) / 100
  target, w = x @ w, w.T.contiguous()
  best = float("inf"), None
  for i in range(101):
    threshold = largest - i * step
    loss = torch_threshold_loss(w, x, target, low, high, threshold).item()
    if loss < best[0]:
      best = loss, threshold.item()
  return {"threshold": torch.tensor([best[1]]), "loss": torch.tensor([best[0]])}


def torch_one_threshold(w, x):
  """The loss of half the largest threshold."""
  low, high = x.amin(0), x.amax(0)
  target, w = x @ w, w.T.contiguous()
  threshold = torch.maximum(high.max(), -low.min()) / 2
  return {"loss": torch_threshold_loss(w, x, target, low, high, threshold)[None]}


def torch_threshold_loss(w, x, target, low, high, threshold):
  """One candidate; w is [outputs, 4096]."""

  def rounded(rows):
    low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    return torch_round(rows, low, high, LEVELS)

  scale = torch.maximum(high / threshold, low / -threshold).clamp(min=1)
  output = (rounded(x / scale) * scale) @ (rounded(w * scale) / scale).T
  return output.sub_(target).pow_(2).sum(-1).mean()


# ---------------------------------------------------------------- LLM-FP4: formats and biases


def torch_float(x: torch.Tensor, format: tuple[int, int], bias: torch.Tensor) -> torch.Tensor:
  """x in the nearest value of the format."""
  e, m = format
  largest = (2 - 2.0**-m) * torch.exp2(2**e - 1 - bias)
  x = torch.minimum(torch.maximum(x, -largest), largest)
  exponent = (torch.log2(x.abs()) + bias).floor_().clamp_(min=1)
  step = torch.exp2(exponent - m - bias)
  return torch.round(x / step).mul_(step)


def torch_formats(w, x, grid=GRID):
  target = x @ w
  top = lambda f: 2 ** f[0] - 1 + math.log2(2 - 2.0 ** -f[1])
  of_weights = [top(f) - w.abs().amax(0).log2() for f in FLOATS]
  of_channels = [top(f) - x.abs().amax(0).log2() for f in FLOATS]
  gammas = [0.01 + i * 1.19 / grid for i in range(grid)]

  def inputs(index, rho):
    low = torch.round(rho)
    channel = torch.round(of_channels[index])
    offsets = torch.minimum(torch.maximum(channel, low), low + 2 ** FLOATS[index][0] - 1) - low
    return torch_float(x, FLOATS[index], rho + offsets)

  def error(inputs, weights):
    return (inputs @ weights - target).pow_(2).mean(0)

  default = FLOATS.index((2, 1))
  rhos = [bias.min() for bias in of_channels]
  rounded, weight_biases = inputs(default, rhos[default]), []
  for format, start in zip(FLOATS, of_weights):
    best, chosen = torch.full_like(start, float("inf")), start
    for gamma in gammas:
      loss = error(rounded, torch_float(w, format, gamma * start))
      chosen = torch.where(loss < best, gamma * start, chosen)
      best = torch.minimum(loss, best)
    weight_biases.append(chosen)
  kernel = torch_float(w, FLOATS[default], weight_biases[default])
  for index, start in enumerate([bias.min() for bias in of_channels]):
    losses = torch.stack([error(inputs(index, g * start), kernel).mean() for g in gammas])
    rhos[index] = gammas[int(losses.argmin())] * start
  rounded = inputs(default, rhos[default])
  kernels = [torch_float(w, f, bias) for f, bias in zip(FLOATS, weight_biases)]
  weights = int(torch.stack([error(rounded, k).mean() for k in kernels]).argmin())
  every = [error(inputs(i, rho), kernels[weights]).mean() for i, rho in enumerate(rhos)]
  activations = int(torch.stack(every).argmin())
  return {
    "formats": torch.tensor([weights, activations]),
    "weight biases": weight_biases[weights],
    "error": (every[activations] / target.pow(2).mean())[None],
  }


# ---------------------------------------------------------------- VPTQ: k-means and the channels


def torch_kmeans(vectors, importance, centroids, iterations=ITERATIONS):
  for _ in range(iterations):
    sums, totals, inertia = torch.zeros_like(centroids), torch.zeros(len(centroids)), 0.0
    squares = centroids.pow(2).sum(1)
    # So few that the distances stay in the cache: twice as fast as 4096 at a time.
    for x, weight in zip(vectors.split(256), importance.split(256)):
      distance, nearest = torch.addmm(squares, x, centroids.T, alpha=-2).min(1)
      sums.index_add_(0, nearest, weight[:, None] * x)
      totals.index_add_(0, nearest, weight)
      inertia += (weight * (distance + x.pow(2).sum(1))).sum()
    centroids = torch.where(totals[:, None] > 0, sums / totals[:, None], centroids)
  return {"centroids": centroids, "inertia": inertia[None]}


def torch_pass(w, u, codebook):
  w, squares, energy = w.clone(), codebook.pow(2).sum(1), 0.0
  indices = torch.empty(len(w), w.shape[1] // LENGTH, dtype=torch.long)
  for start in range(0, len(w), BLOCK):
    part, inner = w[start : start + BLOCK].clone(), u[start : start + BLOCK, start : start + BLOCK]
    errors = torch.empty_like(part)
    for i in range(BLOCK):
      index = torch.addmm(squares, part[i].reshape(-1, LENGTH), codebook.T, alpha=-2).argmin(1)
      indices[start + i] = index
      errors[i] = (part[i] - codebook[index].reshape(-1)) / inner[i, i]
      part[i:] -= inner[i, i:, None] * errors[i]
    energy += errors.pow(2).sum()
    w[start + BLOCK :] -= u[start : start + BLOCK, start + BLOCK :].T @ errors
  return {"indices": indices, "energy": energy[None]}
