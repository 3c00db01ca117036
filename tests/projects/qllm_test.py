"""QLLM: vectors of the official code, the invariants of its two parts, and the tiny run."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import UserError
from common.models.base import base_model
from common.quantization import rtn
from common.quantization.activations import ActivationFormat, fake_quantize
from common.quantization.calibration import Streams, quantize_blocks, run_block
from common.quantization.quantized_array import IntegerFormat
from common.quantization.reconstruction import in_host_memory
from common.quantization.shift_and_scale import linear_outputs
from projects.qllm import channel_reassembly as cr
from projects.qllm import config as qllm_config
from projects.qllm import experiment, methods
from projects.qllm.baselines import OmniQuantBlock, clipped_codes
from projects.qllm.error_correction import BlockGroup, LowRankKernel, merge_correction
from projects.qllm.methods import settings_of
from projects.qllm.qllm import (
  check_block,
  check_model,
  quantize,
  quantize_block,
  quantize_round,
  student_block,
)
from projects.qllm.settings import Settings, Tuning

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "qllm" / "channel_reassembly.npz"
W4, A4 = IntegerFormat(4), ActivationFormat(4, include_zero=False)
round_to_nearest = jax.jit(rtn.fake_quantize, static_argnums=1)
# Small numbers of rounding to float32: sums of some dozen products of size 1 to 100.
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


@functools.partial(jax.jit, static_argnames=("max_extra", "kind", "score"))
def reassembled(x, w, splits, max_extra, kind="both", score="exact"):
  """The reassembly, x' and W'."""
  reassembly = cr.reassemble(x, w, splits, max_extra, kind=kind, score=score)
  x, w = cr.reassemble_activations(x, reassembly), cr.reassemble_weights(w, reassembly)
  return reassembly, x, w


def sample(seed: int = 0, channels: int = 15):
  """x [tokens, M] with two outlier channels and W [M, out], NumPy arrays."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(40, channels)).astype(np.float32)
  x[:, 3:5] *= 9
  return x, rng.normal(size=(channels, 6)).astype(np.float32)


def splits_of(x: np.ndarray, threshold: float) -> np.ndarray:
  """T of NumPy, to compare with."""
  return np.maximum(1, np.ceil(np.abs(x).max(axis=0) / threshold)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=3)
def golden_case(x, w, theta, max_extra):
  """Everything that the vectors have, by their names."""
  tokens = x.reshape(-1, x.shape[-1])
  largest = jnp.abs(tokens).max(axis=0)
  scores, splits = cr.pair_scores(tokens, w, "code"), cr.num_splits(largest, theta)
  source, target = cr.match_channels(scores, splits == 1, jnp.int32(3), 3)
  assembled = cr.from_merges(jnp.ones_like(splits), source, target, x.shape[-1] - 3)
  split = cr.reassemble(tokens, w, splits, 3, kind="disassembly")
  kernels, mask = {"w": w}, jnp.ones((*x.shape[:2], 1))
  both = cr.reassemble_first_merging(scores, splits, max_extra)
  exact = linear_outputs(x, kernels)
  loss = cr.quantization_error(linear_outputs, exact, x, kernels, mask, both, W4, A4)
  search = cr.search_threshold(
    linear_outputs, x, kernels, mask, largest, W4, A4, max_extra=max_extra
  )
  return {
    "scores": scores,
    "num_disassembly": splits,
    "num_extra": cr.num_extra(largest, theta),
    "src": source // 2,
    "dst": target // 2,
    "assembled_x": cr.reassemble_activations(x, assembled),
    "assembled_w": cr.reassemble_weights(w, assembled).T,
    "assembled_nd": splits[assembled.copy_of],
    "disassembled_x": cr.reassemble_activations(x, split),
    "disassembled_w": cr.reassemble_weights(w, split).T,
    "xq4": fake_quantize(x, A4),
    "wq4": rtn.fake_quantize(w, W4).T,
    "reassembly_loss": loss,
    "best_threshold": search.threshold,
  }


def test_vectors_of_the_official_code():
  with np.load(GOLDEN) as file:
    golden = dict(file)
  max_extra = Settings(W4, A4, channel_ratio=float(golden["channel_ratio"])).max_extra(24)
  found = golden_case(golden["x"], golden["weight"].T, golden["theta"], max_extra)
  # Scores come from a Gram matrix, which cancels where channels are close: an error of float32
  # beside the largest score, 18,000. A step of the quantizers is 0.1 and more: no code differs.
  tolerances = {"scores": 0.02}
  for name, value in found.items():
    np.testing.assert_allclose(
      value, golden[name], rtol=1e-5, atol=tolerances.get(name, 1e-4), err_msg=name
    )


@pytest.mark.parametrize("threshold", [6.0, 8.0, 100.0])
def test_disassembly_is_exact_and_bounded(threshold):
  x, w = sample()
  splits = splits_of(x, threshold)
  # The width has room for more channels than are needed.
  reassembly, split_x, split_w = reassembled(x, w, splits, 9, "disassembly")
  assert split_x.shape == (40, 24) and reassembly.used.sum() == splits.sum() < 24
  assert jnp.abs(split_x).max() <= threshold * (1 + 1e-6)
  np.testing.assert_allclose(split_x @ split_w, x @ w, **CLOSE)


# Expanded to an odd and to an even number of channels; the widest case needs all merges.
@pytest.mark.parametrize("threshold", [8.0, 10.0, 12.0])
def test_reassembly_is_the_averaging_matrix(threshold):
  x, w = sample()
  splits = splits_of(x, threshold)
  extra = int(splits.sum()) - 15
  assert 0 < extra <= 6
  reassembly, new_x, new_w = reassembled(x, w, splits, 6)
  # Brute force on the expanded channels: P averages, G sums.
  owner = np.repeat(np.arange(15), splits)
  x_split, w_split = x[:, owner] / splits[owner], w[owner]
  single = splits[owner] == 1
  pairs = []
  for i in range(0, owner.size, 2):
    cost = [
      (np.sum((w_split[i] - w_split[j]) ** 2) * np.sum((x_split[:, i] - x_split[:, j]) ** 2), j)
      for j in range(1, owner.size, 2)
      if single[i] and single[j]
    ]
    if cost:
      pairs.append((*min(cost), i))
  merges = {i: j for _, j, i in sorted(pairs)[:extra]}
  groups = [[j, *[i for i in merges if merges[i] == j]] for j in range(owner.size)]
  groups = [group for group in groups if group[0] not in merges]
  assert len(groups) == 15
  averaging, summing = np.zeros((2, owner.size, 15))
  for k, group in enumerate(groups):
    averaging[group, k], summing[group, k] = 1 / len(group), 1
  np.testing.assert_allclose(new_x, x_split @ averaging, **CLOSE)
  np.testing.assert_allclose(new_w, summing.T @ w_split, **CLOSE)
  # No split channel is merged, and at most half of all.
  merged = np.concatenate([reassembly.source, reassembly.target])
  merged = merged[merged < 15]
  assert (splits[merged] == 1).all() and merged.size == 2 * extra <= owner.size


def test_identical_channels_merge_exactly():
  x, w = sample()
  x[:, 7] = x[:, 4]
  reassembly, new_x, new_w = reassembled(x, w, np.ones(15, np.int32), 1, "assembly")
  assert (int(reassembly.source[0]), int(reassembly.target[0])) == (4, 7)
  assert new_x.shape[1] == 14
  np.testing.assert_allclose(new_x @ new_w, x @ w, **CLOSE)


def test_exact_score_is_the_error_of_a_merge():
  x, w = sample()
  scores = jax.jit(cr.pair_scores, static_argnums=2)(x, w, "exact")
  error = ((x[:, 0] - x[:, 3]) / 2)[:, None] * (w[3] - w[0])
  np.testing.assert_allclose(scores[0, 1], np.sum(error**2), rtol=1e-5)


def test_pruning_drops_the_least_important_channels():
  x, w = sample()
  x[:, 10] *= 1e-3
  splits = np.ones(15, np.int32)
  splits[3] = 2
  reassembly, new_x, new_w = reassembled(x, w, splits, 2, "pruning")
  kept = sorted([*range(10), 3, *range(11, 15)])
  np.testing.assert_array_equal(reassembly.copy_of, kept)
  np.testing.assert_allclose(new_x @ new_w - x @ w, -x[:, 10:11] * w[10:11], **CLOSE)


def test_largest_threshold_changes_nothing():
  x, w = sample()
  largest = np.abs(x).max(axis=0)
  splits = cr.num_splits(largest, largest.max())
  _, new_x, new_w = reassembled(x, w, splits, 6)
  np.testing.assert_array_equal(new_x, x)
  np.testing.assert_array_equal(new_w, w)


def test_smallest_threshold_uses_the_ratio_up():
  x, _ = sample()
  largest = np.abs(x).max(axis=0)
  threshold = float(jax.jit(cr.smallest_threshold, static_argnums=1)(largest, 3))
  step = (largest.max() - largest.min()) / 100
  assert splits_of(x, threshold).sum() - 15 <= 3 < splits_of(x, threshold - step).sum() - 15


def test_token_quantizer():
  format = ActivationFormat(4, include_zero=False)
  # All positive: a range that had to contain 0 would be coarser.
  x = np.random.default_rng(0).uniform(3.0, 5.0, (5, 300)).astype(np.float32)
  rounded = np.asarray(jax.jit(fake_quantize, static_argnums=1)(x, format))
  low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
  step = (high - low) / 15
  assert all(len(np.unique(row)) <= 16 for row in rounded)
  # The zero point is rounded too: the ends of the range clip by up to half a step more.
  inside = (x > low + step) & (x < high - step)
  assert (np.abs(rounded - x) * inside <= step / 2 + 1e-5).all()


# Everything below has the shapes and settings of the tiny preset: what it compiles serves all tests.
TINY = qllm_config.get_config("tiny")
SETTINGS = settings_of(TINY, "W4A4")


@functools.cache
def tiny_draw() -> experiment.Draw:
  return experiment.make_draw(TINY, base_model(TINY.model), 0, True)


def test_tiny_run_reports_claims(tmp_path, monkeypatch):
  report = experiment.run(TINY, tmp_path)
  assert [row[0] for row in report.tables[0].rows] == ["full precision", *TINY.methods]
  assert all(np.isfinite(row[1:-1]).all() for row in report.tables[0].rows[1:])
  assert len(report.claims) == 3
  assert all((tmp_path / figure.path).is_file() for figure in report.figures)
  tuning = next(table for table in report.tables if "round" in table.title)
  ((_, _, before, tuned, merged),) = tuning.rows
  # The merge rounds again: what it keeps of the gain is not sure with a few steps.
  assert tuned < before and np.isfinite(merged)

  def quantized_again(*args):
    raise AssertionError("quantized again")

  for name in ("quantize", "rtn_model"):
    monkeypatch.setattr(methods, name, quantized_again)
  assert experiment.run(TINY, tmp_path) == report  # From the measurements of the first run.


@functools.cache
def tiny_student():
  """A student of the first block, what was found at its sites, its inputs and its context."""
  model = tiny_draw().model
  x, context = model.stem(tiny_draw().tokens)
  student, found = student_block(
    model.blocks[0], x, context, model.config, SETTINGS, jax.random.key(0)
  )
  return student, found, x, context


def test_outliers_leave_the_function_alone():
  _, _, x, context = tiny_student()
  plain = base_model(TINY.model).model.blocks[0]
  np.testing.assert_allclose(
    run_block(tiny_draw().model.blocks[0], x, context), run_block(plain, x, context), atol=1e-3
  )


def test_student_starts_as_the_quantized_block_and_keep_keeps_it():
  student, found, x, context = tiny_student()
  assert set(found) == {"attention_norm", "mlp_norm", "mlp.up_proj"}
  assert int(found["attention_norm"].extra) > 0
  assert all(site.search.loss <= site.search.loss_unchanged for site in found.values())
  assert all(site.reassembly.copy_of.size in (64, 128) for site in found.values())
  start = run_block(BlockGroup([student]), x, context)
  # Packed and unpacked products differ by rounding alone, unless that moves a later code.
  packed = run_block(merge_correction(student), x, context)
  assert jnp.mean(jnp.abs(start - packed)) < 1e-3 * jnp.mean(jnp.abs(start))
  moved = nnx.clone(student)
  weight = moved.attention.q_proj.layer.weight
  assert isinstance(weight, LowRankKernel)
  np.testing.assert_array_equal(weight(), round_to_nearest(weight.kernel[...], W4))
  weight.b[...] = jnp.full_like(weight.b[...], 0.1)
  kept = merge_correction(moved, "keep").attention.q_proj.layer
  np.testing.assert_allclose(kept.kernel[...], weight(), rtol=1e-6)
  merged = merge_correction(moved).attention.q_proj.layer.weight.get_value()
  w = weight.kernel[...] + weight.a[...] @ weight.b[...] / TINY.rank
  # A code may differ where a quotient is a tie.
  assert np.mean(np.abs(merged.dequantize() - round_to_nearest(w, W4)) > 1e-5) < 0.01


def test_blocks_stream_from_host_memory():
  draw = tiny_draw()
  settings = dataclasses.replace(SETTINGS, tuning=None)
  block = functools.partial(
    quantize_block, config=draw.model.config, settings=settings, key=jax.random.key(0)
  )
  options = {"stream": "both", "sample_memory": "pinned_host"}
  streamed = quantize_blocks(draw.model, draw.model.blocks, draw.tokens, block, **options)
  whole, logs = quantize(draw.model, draw.tokens, settings, jax.random.key(0))
  for one, other in zip(streamed, whole.blocks, strict=True):
    for a, b in zip(jax.tree.leaves(nnx.state(one)), jax.tree.leaves(nnx.state(other))):
      np.testing.assert_array_equal(a, b)
  x, context = draw.model.stem(draw.tokens)
  there = in_host_memory(x)
  arguments = context, draw.model.config, settings, jax.random.key(0)
  _, outputs, log = quantize_round([draw.model.blocks[0]], Streams(there, there), *arguments)
  assert {output.sharding.memory_kind for output in outputs} == {"pinned_host"}
  np.testing.assert_array_equal(log.merged_error, logs[0].merged_error)
  full_precision, quantized = jax.device_get(outputs)
  expected = np.mean((quantized - full_precision) ** 2)
  np.testing.assert_allclose(log.merged_error, expected, rtol=1e-5)


def test_omniquant_starts_near_rounding_and_clips():
  w = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
  rounded = jax.jit(lambda w, logit: rtn.decode(*clipped_codes(w, logit, W4), W4))
  # A share of 1 does not clip.
  np.testing.assert_allclose(
    rounded(w, jnp.full((2, 1, 8), 50.0)), round_to_nearest(w, W4), atol=1e-5
  )
  assert jnp.abs(rounded(w, jnp.zeros((2, 1, 8)))).max() < 0.6 * np.abs(w).max()
  _, _, x, context = tiny_student()
  model = tiny_draw().model
  scales = [jnp.full(n, 2.0) for n in (64, 64, 64, 128)]
  student = OmniQuantBlock(model.blocks[0], model.config, SETTINGS, scales)
  np.testing.assert_allclose(
    run_block(student.scaled(), x, context), run_block(model.blocks[0], x, context), atol=1e-3
  )


def test_bad_input_is_refused():
  model = tiny_draw().model
  refused = functools.partial(pytest.raises, UserError)
  with refused(match="channel_ratio=0.3"):
    Settings(W4, A4, channel_ratio=0.3)
  with refused(match="reassembly='merge'"):
    Settings(W4, A4, reassembly="merge")
  with refused(match="threshold=-1"):
    Settings(W4, A4, threshold=-1.0)
  with refused(match="rank=0"):
    Tuning(rank=0)
  with refused(match="W5A4"):
    settings_of(TINY, "W5A4")
  with refused(match="blocks_per_round=4 does not divide"):
    check_model(model, Settings(W4, A4))
  with refused(match="group_size=24 of weights does not divide its 64 inputs"):
    check_model(model, dataclasses.replace(SETTINGS, weights=IntegerFormat(4, 24)))
  broken = nnx.clone(model)
  kernel = broken.blocks[1].mlp.up_proj.kernel
  kernel[...] = kernel[...].at[0].set(jnp.nan)
  with refused(match="blocks.1.mlp.up_proj.kernel"):
    check_model(broken, SETTINGS)
  post = dataclasses.replace(model.config, norm_placement="post")
  with refused(match="norm_placement='post'"):
    check_block(model.blocks[0], post, SETTINGS)
  _, _, x, context = tiny_student()
  streams = Streams(x, x.at[0, 0].set(jnp.inf))
  options = {"config": model.config, "settings": SETTINGS, "key": jax.random.key(0)}
  with refused(match="calibration activations"):
    quantize_block(0, model.blocks[0], streams, context, **options)
