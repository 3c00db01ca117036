"""LLM-FP4: weights and activations in 4-bit floating point (Liu et al., EMNLP 2023, 2310.16836).

A linear layer Y = X W is calibrated alone, from full-precision inputs X. FPQ searches, for weights
and activations, the format (how the bits are shared by exponent and mantissa) and the exponent bias
b, which says where the largest value lies (section 3.2 and Algorithm 1):

  candidates   b = gamma b(max |.|),    gamma = 0.01 + 1.19 i / 100,  i = 0, ..., 99
  weights      a bias for each output channel,     argmin  mean over tokens of (Y - Q_b(X) Q_b(W))^2
  activations  one bias rho for the tensor, and the same objective over the whole output

In turn, `rounds` times. Classifiers' errors are multiplied by the loss's gradients (metric "hessian",
Appendix A); products of two activations have a bias for either tensor (`products`). What is new is the
pre-shifted exponent bias (section 3.3): activations differ between channels and not within one, so
channel j has the bias b_j = rho + o_j with an integer o_j in 0 ... 2^e - 1. As Q_{b_j}(x) =
2^-o_j Q_rho(2^o_j x), the stored activations have one bias and the power of two moves into the weights'
input channel (`FloatLinear`).

Weights are [in, out] here: the paper's rows, output channels, are columns.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from common.errors import UserError
from common.quantization import float_format
from common.quantization.float_format import FloatFormat
from projects.llm_fp4.metrics import METRICS, l2, scaled_gradients

Array = jax.Array

# Bits of a code -> mantissa bits to choose from; the widths of the paper.
MANTISSA_BITS = {4: (0, 1, 2), 6: (0, 1, 2, 3, 4), 8: (2, 3, 4, 5, 6)}

# Where the search begins, and what stays when formats are not searched: E2M1, E2M3, E4M3.
DEFAULT_FORMATS = {4: FloatFormat(2, 1), 6: FloatFormat(2, 3), 8: FloatFormat(4, 3)}

# A channel of zeros has this range: its bias stays finite, and zeros stay zeros.
SMALLEST_RANGE = 1e-12


@dataclasses.dataclass(frozen=True)
class FPQSettings:
  """What is searched, and how finely.

  Attributes:
    weight_bits, activation_bits: 4, 6 or 8, with the sign.
    pre_shifted: a bias of its own for each activation channel (FPQ); otherwise one for the tensor
      (the paper's FPQ baseline).
    format_search: choose the format; otherwise the width's default.
    max_search: choose the bias; otherwise that of the largest magnitude.
    rounds: how often weights and activations are searched in turn.
    grid_size: number of gammas.
    param: what gamma multiplies, the bias (the paper) or the largest value ("maxval_gamma").
    metric: of the layer's output, over tokens: mean squared or absolute error, 1 - cosine or
      1 - Pearson's correlation of each output channel, or the mean squared error times the squared
      gradients of the loss ("hessian", equation 24).
    offset_rounding: o = round(b_j) - round(rho), as in the paper's code ("separate"), or
      round(b_j - rho), as in its text ("difference").
    fold: weights are rounded before the powers of two are folded into them ("exact"), or are folded
      and then rounded, so that the stored weights are plain FP4 ("requantize").
    attention_products: quantize both operands of Q K^T and P V too, to `activation_bits`.
    tokens: about how many tokens the search looks at, evenly spaced; None takes all. Largest
      magnitudes are of all tokens anyway.

  Raises:
    UserError: a value is outside the supported set.
  """

  weight_bits: int = 4
  activation_bits: int = 4
  pre_shifted: bool = True
  format_search: bool = True
  max_search: bool = True
  rounds: int = 3
  grid_size: int = 100
  param: Literal["bias_gamma", "maxval_gamma"] = "bias_gamma"
  metric: Literal["l2", "l1", "cosine", "pearson", "hessian"] = "l2"
  offset_rounding: Literal["separate", "difference"] = "separate"
  fold: Literal["exact", "requantize"] = "exact"
  attention_products: bool = False
  tokens: int | None = None

  def __post_init__(self):
    for name, supported in (
      ("weight_bits", tuple(MANTISSA_BITS)),
      ("activation_bits", tuple(MANTISSA_BITS)),
      ("param", ("bias_gamma", "maxval_gamma")),
      ("metric", tuple(METRICS)),
      ("offset_rounding", ("separate", "difference")),
      ("fold", ("exact", "requantize")),
    ):
      if getattr(self, name) not in supported:
        options = ", ".join(map(str, supported))
        raise UserError(f"{name}={getattr(self, name)!r} is not supported; supported: {options}")
    if min(self.rounds, self.grid_size, self.tokens or 1) < 1:
      raise UserError(
        f"rounds={self.rounds}, grid_size={self.grid_size} and tokens={self.tokens} must be positive"
      )

  @property
  def per_tensor(self) -> "FPQSettings":
    """Those of a search with one bias for a tensor, such as an operand of attention.

    It has no use for the settings of weights: with these alike it is one program for all of them.
    """
    return dataclasses.replace(
      self, weight_bits=self.activation_bits, pre_shifted=False, fold="exact"
    )

  @property
  def weight_formats(self) -> tuple[FloatFormat, ...]:
    return float_formats(self.weight_bits, self.format_search)

  @property
  def activation_formats(self) -> tuple[FloatFormat, ...]:
    return float_formats(self.activation_bits, self.format_search)

  @property
  def gammas(self) -> Array:
    """The grid, float32 [grid_size]; 1 alone without a search. As in the code it stops before 1.2."""
    if not self.max_search:
      return jnp.ones(1)
    return 0.01 + jnp.arange(self.grid_size, dtype=jnp.float32) * (1.2 - 0.01) / self.grid_size


def float_formats(bits: int, search: bool = True) -> tuple[FloatFormat, ...]:
  """The formats of a width to choose from, few mantissa bits first; the default one alone if not
  `search`."""
  if not search:
    return (DEFAULT_FORMATS[bits],)
  return tuple(FloatFormat(bits - 1 - m, m) for m in MANTISSA_BITS[bits])


class LinearSearch(NamedTuple):
  """What FPQ found for one linear [in, out]. A pytree; formats are places in the settings' tuples.

  Attributes:
    weight_format: int32 [].
    weight_bias: float32 [out].
    activation_format: int32 [].
    tensor_bias: rho, float32 [].
    offsets: o, int32 [in], 0 without pre-shift. Channel j has the bias rho + o_j.
    output_error: sum (Y - Y_hat)^2 / sum Y^2 on the tokens of the search, float32 [].
  """

  weight_format: Array
  weight_bias: Array
  activation_format: Array
  tensor_bias: Array
  offsets: Array
  output_error: Array

  @property
  def activation_bias(self) -> Array:
    """b_j, float32 [in]."""
    return self.tensor_bias + self.offsets


class Problem(NamedTuple):
  """One layer's search; of a product, the right operand is w, the left one x, and both have a bias.

  Attributes:
    w: [..., in, out].
    x: [..., tokens, in].
    y: x w, [..., tokens, out].
    weight_start: bias of the largest |w| by format and output channel, [formats, out or 1].
    channel_bias: bias of the largest |x| by format and input channel, [formats, in or 1].
    gradients: of the loss by y, in its shape, for the metric "hessian" (`scaled_gradients`).
  """

  w: Array
  x: Array
  y: Array
  weight_start: Array
  channel_bias: Array
  gradients: Array | None

  @property
  def tensor_start(self) -> Array:
    """Bias of the largest |x| by format, [formats]."""
    return self.channel_bias.min(axis=1)


class Choice(NamedTuple):
  """The best biases of every format, [formats, out] and [formats], and the formats in use, []."""

  weight_bias: Array
  weight_format: Array
  tensor_bias: Array
  activation_format: Array


def start_bias(formats: tuple[FloatFormat, ...], maximum: Array) -> Array:
  """Biases at which `maximum` is the largest value, [formats, *maximum.shape]."""
  maximum = jnp.maximum(maximum.astype(jnp.float32), SMALLEST_RANGE)
  return jnp.stack([float_format.bias_for(format, maximum) for format in formats])


def candidate_biases(start: Array, settings: FPQSettings) -> Array:
  """gamma b, or the bias of gamma times the largest value; [formats, gammas, ...].

  Args:
    start: [formats, ...].
    settings: grid and parametrisation.
  """
  gammas = settings.gammas.reshape(-1, *[1] * (start.ndim - 1))
  start = start[:, None]
  return gammas * start if settings.param == "bias_gamma" else start - jnp.log2(gammas)


class _Format(NamedTuple):
  """A format that is known on the device only; stands in for a `FloatFormat`."""

  exponent_bits: Array
  mantissa_bits: Array


def quantize(x: Array, formats: tuple[FloatFormat, ...], index: Array, bias: Array) -> Array:
  """x rounded to the format at `index` (int32 []), with a bias that broadcasts to it; float32.

  One program serves all formats: a search, or the models that it leads to, compile once.
  """
  return quantize_to(x, format_bits(formats, index), bias)


def format_bits(formats: tuple[FloatFormat, ...], index: Array) -> Array:
  """(exponent bits, mantissa bits) of the format at `index` (int32 []), int32 [2]."""
  return jnp.array([(f.exponent_bits, f.mantissa_bits) for f in formats], jnp.int32)[index]


# Traced once for all its uses in a search.
@jax.jit
def quantize_to(x: Array, bits: Array, bias: Array) -> Array:
  """x rounded to the format of `format_bits`, with a bias that broadcasts to it; float32."""
  return float_format.fake_quantize(x, _Format(bits[0], bits[1]), bias)


def exponent_offsets(
  channel_bias: Array, tensor_bias: Array, max_offset: Array, settings: FPQSettings
) -> Array:
  """o in 0 ... 2^e - 1, the integers by which channels' biases exceed rho; float32 [in].

  Args:
    channel_bias: bias of each channel's largest magnitude, [in].
    tensor_bias: rho, [].
    max_offset: 2^e - 1 of the format, [].
    settings: whether pre-shifted, and how to round.
  """
  if not settings.pre_shifted:
    return jnp.zeros_like(channel_bias)
  if settings.offset_rounding == "difference":
    return jnp.clip(jnp.round(channel_bias - tensor_bias), 0, max_offset)
  low = jnp.round(tensor_bias)
  return jnp.clip(jnp.round(channel_bias), low, low + max_offset) - low


def search_linear(
  w: Array, x: Array, x_max: Array, settings: FPQSettings, gradients: Array | None = None
) -> LinearSearch:
  """Searches formats and biases of one linear (Algorithm 1).

  A round is: biases of the weights, their format, biases of the activations, their format. With
  pre-shift the code looks at the activations' biases before the weights' format, and so does this.
  A round that changes nothing is the last.

  Args:
    w: [in, out].
    x: inputs in full precision, [tokens, in].
    x_max: largest |x| of each channel over the whole calibration set, [in].
    settings: what to search.
    gradients: of the loss by the outputs, [tokens, out], for the metric "hessian".
  """
  problem = _problem(w, x, x_max, settings, gradients)
  found = linear_result(problem, search_problem(problem, settings), settings)
  return _requantize(problem, x_max, found, settings) if settings.fold == "requantize" else found


def search_problem(problem: Problem, settings: FPQSettings) -> Choice:
  """The rounds of `search_linear`."""
  weights, activations = settings.weight_formats, settings.activation_formats
  place = lambda formats, bits: jnp.int32(formats.index(DEFAULT_FORMATS[bits]))
  choice = Choice(
    problem.weight_start,
    place(weights, settings.weight_bits),
    problem.tensor_start,
    place(activations, settings.activation_bits),
  )
  weight_steps = (_search_weight_bias,) * settings.max_search
  activation_steps = (_search_tensor_bias,) * settings.max_search
  if settings.format_search and settings.pre_shifted:
    steps = (*weight_steps, *activation_steps, _choose_weight_format, _choose_activation_format)
  elif settings.format_search:
    steps = (*weight_steps, _choose_weight_format, *activation_steps, _choose_activation_format)
  else:
    steps = (*weight_steps, *activation_steps)

  def search_round(carry):
    index, _, choice = carry
    new = choice
    for step in steps:
      new = step(problem, new, settings)
    changed = jnp.stack([jnp.any(a != b) for a, b in zip(new, choice)]).any()
    return index + 1, changed, new

  start = (jnp.int32(0), jnp.bool_(True), choice)
  going_on = lambda carry: (carry[0] < settings.rounds) & carry[1]
  return jax.lax.while_loop(going_on, search_round, start)[2] if steps else choice


def quantized_kernel(w: Array, bits: Array, bias: Array, offsets: Array, fold: str) -> Array:
  """The weights in effect, as seen from inputs that are not shifted, float32 [in, out].

  Args:
    w: [in, out].
    bits: `format_bits` of the weights' format.
    bias: of each output channel, [out].
    offsets: of each input channel, int32 [in].
    fold: of the settings.
  """
  if fold == "exact":
    return quantize_to(w, bits, bias)
  offsets = offsets[:, None]
  folded = quantize_to(jnp.ldexp(w.astype(jnp.float32), -offsets), bits, bias)
  return jnp.ldexp(folded, offsets)


def search_table(table: Array, bits: int, settings: FPQSettings) -> tuple[Array, Array, Array]:
  """Weights alone, one bias for all: what embeddings get.

  Args:
    table: [rows, dim].
    bits: of an entry.
    settings: what to search; its widths are not used.

  Returns:
    (place of the format in `float_formats(bits, settings.format_search)`, bias, mean squared error
    of every candidate [formats, gammas]).
  """
  formats = float_formats(bits, settings.format_search)
  table = table.astype(jnp.float32)
  biases = candidate_biases(start_bias(formats, jnp.abs(table).max()), settings)
  error = lambda index, bias: jnp.mean((table - quantize(table, formats, index, bias)) ** 2)
  errors = _over_grid(error, biases)
  best = jnp.argmin(errors)
  return best // errors.shape[1], biases.reshape(-1)[best], errors


def _problem(w, x, x_max, settings: FPQSettings, gradients: Array | None) -> Problem:
  w, x = w.astype(jnp.float32), x.astype(jnp.float32)
  return Problem(
    w,
    x,
    jnp.matmul(x, w, precision="highest"),
    start_bias(settings.weight_formats, jnp.abs(w).max(axis=0)),
    start_bias(settings.activation_formats, x_max),
    scaled_gradients(gradients) if settings.metric == "hessian" else None,
  )


def _offsets(problem: Problem, index: Array, tensor_bias: Array, settings: FPQSettings) -> Array:
  largest = jnp.array([2.0**f.exponent_bits - 1 for f in settings.activation_formats])
  return exponent_offsets(problem.channel_bias[index], tensor_bias, largest[index], settings)


def _quantized_input(problem: Problem, index: Array, tensor_bias: Array, settings: FPQSettings):
  bias = tensor_bias + _offsets(problem, index, tensor_bias, settings)
  return quantize(problem.x, settings.activation_formats, index, bias)


def _current_input(problem: Problem, choice: Choice, settings: FPQSettings) -> Array:
  index = choice.activation_format
  return _quantized_input(problem, index, choice.tensor_bias[index], settings)


def _current_kernel(problem: Problem, choice: Choice, settings: FPQSettings) -> Array:
  index = choice.weight_format
  return quantize(problem.w, settings.weight_formats, index, choice.weight_bias[index])


def _distance(problem: Problem, x: Array, w: Array, settings: FPQSettings) -> Array:
  """Of the quantized layer's output, by output channel [out]."""
  outputs = problem.y, jnp.matmul(x, w, precision="highest")
  if settings.metric == "hessian":
    outputs = (y * problem.gradients for y in outputs)
  return METRICS[settings.metric](*(y.reshape(-1, y.shape[-1]) for y in outputs))


def _over_grid(function, biases: Array) -> Array:
  """function(format, bias) of every candidate. biases: [formats, gammas, ...], like the result."""
  formats, gammas = biases.shape[:2]
  indices = jnp.repeat(jnp.arange(formats), gammas)
  flat = biases.reshape(-1, *biases.shape[2:])
  values = jax.lax.map(lambda candidate: function(*candidate), (indices, flat))
  return values.reshape(formats, gammas, *values.shape[1:])


def weight_losses(problem: Problem, choice: Choice, settings: FPQSettings) -> Array:
  """Of every candidate for the weights, with the activations in use; [formats, gammas, out or 1]."""
  x = _current_input(problem, choice, settings)

  def loss(index, bias):
    w = quantize(problem.w, settings.weight_formats, index, bias)
    losses = _distance(problem, x, w, settings)
    # Output channels that share a bias are searched together.
    return losses if losses.shape == bias.shape else losses.mean(keepdims=True)

  return _over_grid(loss, candidate_biases(problem.weight_start, settings))


def activation_losses(problem: Problem, choice: Choice, settings: FPQSettings) -> Array:
  """Of every candidate for the activations, with the weights in use; [formats, gammas]."""
  w = _current_kernel(problem, choice, settings)

  def loss(index, bias):
    x = _quantized_input(problem, index, bias, settings)
    return _distance(problem, x, w, settings).mean()

  return _over_grid(loss, candidate_biases(problem.tensor_start, settings))


def _best(candidates: Array, losses: Array) -> Array:
  """The candidate with the least loss of each format; both [formats, gammas, ...]."""
  best = jnp.argmin(losses, axis=1, keepdims=True)
  return jnp.take_along_axis(candidates, best, axis=1)[:, 0]


def _search_weight_bias(problem, choice, settings):
  losses = weight_losses(problem, choice, settings)
  candidates = candidate_biases(problem.weight_start, settings)
  return choice._replace(weight_bias=_best(candidates, losses))


def _search_tensor_bias(problem, choice, settings):
  losses = activation_losses(problem, choice, settings)
  candidates = candidate_biases(problem.tensor_start, settings)
  return choice._replace(tensor_bias=_best(candidates, losses))


def _choose_weight_format(problem, choice, settings):
  """One format for the layer: the least total loss, each format with its best biases."""
  x = _current_input(problem, choice, settings)

  def loss(candidate):
    w = quantize(problem.w, settings.weight_formats, *candidate)
    return _distance(problem, x, w, settings).mean()

  indices = jnp.arange(len(settings.weight_formats))
  losses = jax.lax.map(loss, (indices, choice.weight_bias))
  return choice._replace(weight_format=jnp.argmin(losses).astype(jnp.int32))


def _choose_activation_format(problem, choice, settings):
  w = _current_kernel(problem, choice, settings)

  def loss(candidate):
    x = _quantized_input(problem, *candidate, settings)
    return _distance(problem, x, w, settings).mean()

  indices = jnp.arange(len(settings.activation_formats))
  losses = jax.lax.map(loss, (indices, choice.tensor_bias))
  return choice._replace(activation_format=jnp.argmin(losses).astype(jnp.int32))


def linear_result(problem: Problem, choice: Choice, settings: FPQSettings) -> LinearSearch:
  """The formats in use and their biases, with the error that they leave."""
  x, w = _current_input(problem, choice, settings), _current_kernel(problem, choice, settings)
  error = jnp.mean(l2(problem.y, jnp.matmul(x, w, precision="highest")))
  rho = choice.tensor_bias[choice.activation_format]
  return LinearSearch(
    weight_format=choice.weight_format,
    weight_bias=choice.weight_bias[choice.weight_format],
    activation_format=choice.activation_format,
    tensor_bias=rho,
    offsets=_offsets(problem, choice.activation_format, rho, settings).astype(jnp.int32),
    output_error=error / jnp.maximum(jnp.mean(problem.y**2), SMALLEST_RANGE),
  )


def _requantize(
  problem: Problem, x_max: Array, search: LinearSearch, settings: FPQSettings
) -> LinearSearch:
  """Searches the weights again as they are stored, 2^-o_j w_j, for the pre-shifted inputs 2^o x."""
  settings = dataclasses.replace(settings, pre_shifted=False, fold="exact")
  w = jnp.ldexp(problem.w, -search.offsets[:, None])
  x, x_max = jnp.ldexp(problem.x, search.offsets), jnp.ldexp(x_max, search.offsets)
  shifted = _problem(w, x, x_max, settings, problem.gradients)
  every = jnp.full(len(settings.activation_formats), search.tensor_bias)
  choice = Choice(shifted.weight_start, search.weight_format, every, search.activation_format)
  choice = _search_weight_bias(shifted, choice, settings)
  choice = _choose_weight_format(shifted, choice, settings)
  return linear_result(shifted, choice, settings)._replace(offsets=search.offsets)
