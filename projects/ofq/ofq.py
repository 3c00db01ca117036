"""OFQ: oscillation-free quantization of vision transformers (Liu et al., ICML 2023, 2302.02210).

Quantization-aware training rounds weights and activations in every forward pass and lets the
gradient pass straight through. Near a rounding threshold a weight then flips between two levels
every few steps. Two of the paper's three remedies are here:

  StatsQ  the scale of a weight channel is a statistic, s = 2 mean|w|, not a parameter (section 4.1)
  QKR     queries and keys share one quantized matrix per head, W_Q W_K^T (section 4.2)

The third, confidence-guided annealing (section 4.3), acts on the updates: `oscillation.py`.

Kernels are [in, out] here, the transpose of the paper's: its rows are output channels. `batch`
images, `seq` tokens, `dim` the hidden size.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.models.attention import merge_heads, split_heads
from common.models.decoder import Attention, AttentionContext
from common.models.surgery import replace_module
from common.models.swin import Swin, SwinBlock, WindowAttention
from common.models.vit import VisionTransformer
from common.quantization import straight_through as ste
from common.quantization.calibration import check_finite

Array = jax.Array

# A step never becomes smaller.
SMALLEST_STEP = 1e-5
# The patch embedding and the classifiers.
OUTER_BITS = 8


@dataclasses.dataclass(frozen=True)
class QATSettings:
  """What is quantized and how.

  Attributes:
    weight_bits, activation_bits: of the blocks' linear layers, 2 to 8.
    weight_quantizer: "statsq", or "lsq" with a learned step per output channel (the baseline).
    learnable_offsets: add a learned offset per feature before and after rounding activations.
    qkr: query-key reparametrisation.
    rectify_queries_and_keys: Q-ViT's rectification (Li et al., NeurIPS 2022): queries and keys are
      standardised, scaled and shifted before they are rounded.

  Raises:
    UserError: a value is outside the supported set, or two exclude each other.
  """

  weight_bits: int = 2
  activation_bits: int = 2
  weight_quantizer: Literal["statsq", "lsq"] = "statsq"
  learnable_offsets: bool = True
  qkr: bool = True
  rectify_queries_and_keys: bool = False

  def __post_init__(self):
    for name in ("weight_bits", "activation_bits"):
      if getattr(self, name) not in range(2, 9):
        raise UserError(f"{name}={getattr(self, name)} is not supported; supported: 2 to 8")
    if self.weight_quantizer not in ("statsq", "lsq"):
      raise UserError(
        f"weight_quantizer={self.weight_quantizer!r} is not supported; supported: statsq, lsq"
      )
    if self.qkr and self.rectify_queries_and_keys:
      raise UserError("with qkr=True there are no queries and keys to rectify; switch one off")


def statsq_scale(w: Array, axis=0) -> Array:
  """s = 2 mean|w|, without a gradient; the averaged axes are kept with size 1."""
  return jax.lax.stop_gradient(2 * jnp.mean(jnp.abs(w), axis=axis, keepdims=True))


def statsq_position(w: Array, scale: Array, bits: int) -> Array:
  """u = clip(w / s, -1, 1) n - 1/2 with n = 2^(bits-1): w on the axis where levels are integers.

  The levels are -n ... n - 1. The upper end stays below 1, so that n is never reached.
  """
  n = 2 ** (bits - 1)
  return jnp.clip(w / scale, -1.0, 1.0 - 1e-6) * n - 0.5


def statsq(w: Array, bits: int, axis=0) -> Array:
  """StatsQ, s (round(u) + 1/2) / n (equation 6); its gradient is the identity, also where clipped.

  Args:
    w: weights [in, out], or of any shape.
    bits: 2^bits levels, which are odd multiples of s / (2 n): symmetric, and none is 0.
    axis: the axes that share a scale.
  """
  scale = statsq_scale(w, axis)
  code = jnp.round(statsq_position(w, scale, bits))
  return ste.straight_through(w, scale * (code + 0.5) / 2 ** (bits - 1))


def near_threshold(position: Array, bits: int, boundary_range: float | Array) -> Array:
  """Whether |u - i - 1/2| <= BR for a threshold between two adjacent levels i and i + 1 (eq. 11).

  Args:
    position: u, see `statsq_position`; or w / s of LSQ.
    bits: levels are -2^(bits-1) ... 2^(bits-1) - 1.
    boundary_range: BR.
  """
  n = 2 ** (bits - 1)
  # A clipped u is half an odd integer too, but there is no further level.
  threshold = jnp.clip(jnp.floor(position) + 0.5, -n + 0.5, n - 1.5)
  return jnp.abs(position - threshold) <= boundary_range


class WeightQuantizer(nnx.Module):
  """Rounds a kernel with one scale per output channel (its last axis)."""

  def __init__(self, w: Array, bits: int, kind: Literal["statsq", "lsq"]):
    self.bits, self.kind = bits, kind
    axis, q_max = tuple(range(w.ndim - 1)), 2 ** (bits - 1) - 1
    self.step = nnx.Param(ste.lsq_initial_step(w, q_max, axis)) if kind == "lsq" else None

  def scale(self, w: Array) -> Array:
    """The learned step (LSQ) or the statistic s (StatsQ), [..., 1, out]."""
    if self.kind == "statsq":
      return statsq_scale(w, tuple(range(w.ndim - 1)))
    return ste.straight_through(self.step[...], jnp.maximum(self.step[...], SMALLEST_STEP))

  def position(self, w: Array) -> Array:
    """w on the axis where levels are the integers -2^(bits-1) ... 2^(bits-1) - 1."""
    if self.kind == "statsq":
      return statsq_position(w, self.scale(w), self.bits)
    n = 2 ** (self.bits - 1)
    return jnp.clip(w / self.scale(w), -n, n - 1)

  def codes(self, w: Array) -> Array:
    """int8 levels, w's shape."""
    return jnp.round(self.position(w)).astype(jnp.int8)

  def values(self, codes: Array | int, scale: Array) -> Array:
    """The weights that levels stand for."""
    if self.kind == "statsq":
      return scale * (codes + 0.5) / 2 ** (self.bits - 1)
    return scale * codes

  def __call__(self, w: Array) -> Array:
    """w rounded, with straight-through gradients."""
    if self.kind == "statsq":
      return statsq(w, self.bits, tuple(range(w.ndim - 1)))
    n = 2 ** (self.bits - 1)
    gradient_scale = ste.lsq_gradient_scale(w.size // w.shape[-1], n - 1)
    return ste.lsq(w, self.scale(w), (-n, n - 1), gradient_scale=gradient_scale)


class ActivationQuantizer(nnx.Module):
  """LSQ with a learned step per token (or per feature, or one), and learned offsets per feature.

  While `calibrating` is set, a call takes the initial step from what it sees.
  """

  def __init__(
    self,
    bits: int,
    step_shape: tuple[int, ...],
    features: int | None,
    signed: bool = True,
  ):
    """
    Args:
      bits: 2 to 8.
      step_shape: broadcasts to the activations; the other axes share a step.
      features: width of the last axis, for offsets; None for none.
      signed: codes are -2^(bits-1) ... 2^(bits-1) - 1, or 0 ... 2^bits - 1.
    """
    self.bits, self.signed, self.calibrating = bits, signed, False
    self.step = nnx.Param(jnp.ones(step_shape))
    self.offset_before = nnx.Param(jnp.zeros(features)) if features else None
    self.offset_after = nnx.Param(jnp.zeros(features)) if features else None

  @property
  def code_range(self) -> tuple[int, int]:
    half = 2 ** (self.bits - 1)
    return (-half, half - 1) if self.signed else (0, 2 * half - 1)

  def floored_step(self) -> Array:
    return ste.straight_through(self.step[...], jnp.maximum(self.step[...], SMALLEST_STEP))

  def __call__(self, x: Array) -> Array:
    """x: [batch, ..., features] -> the same shape, with straight-through gradients."""
    if self.offset_before is not None:
      x = x + self.offset_before[...]
    q_max = self.code_range[1]
    if self.calibrating:
      shape = (1,) * (x.ndim - self.step.ndim) + self.step.shape
      shared = tuple(i for i, size in enumerate(shape) if size == 1)
      step = ste.lsq_initial_step(x, q_max, shared, factor=2.0 if self.signed else 4.0)
      self.step[...] = step.reshape(self.step.shape)
    gradient_scale = ste.lsq_gradient_scale(x.size // self.step.size, q_max)
    x = ste.lsq(x, self.floored_step(), self.code_range, gradient_scale=gradient_scale)
    return x if self.offset_after is None else x + self.offset_after[...]


class QATLayer(nnx.Module):
  """A linear layer or convolution whose input and kernel are rounded in every forward pass."""

  def __init__(
    self,
    layer: nnx.Linear | nnx.Conv,
    bits: int,
    kind: Literal["statsq", "lsq"],
    input_quantizer: ActivationQuantizer | None,
  ):
    """`input_quantizer` is None where the input comes rounded already."""
    self.layer = layer
    self.weight_quantizer = WeightQuantizer(layer.kernel[...], bits, kind)
    self.input_quantizer = input_quantizer

  def latent(self) -> Array:
    """The weights that are trained, before rounding."""
    return self.layer.kernel[...]

  def __call__(self, x: Array) -> Array:
    if self.input_quantizer is not None:
      x = self.input_quantizer(x)
    rounded = nnx.clone(self.layer)
    rounded.kernel = nnx.Param(self.weight_quantizer(self.latent()))
    return rounded(x)


class QueryKeyProduct(nnx.Module):
  """QKR's matrix of all heads, rounded as one; W_Q and W_K stay the parameters (equation 9).

  With per-head kernels Q_h, K_h [dim, head_dim] the logits of head h are x_i Q_h K_h^T x_j^T.
  """

  def __init__(self, query: Array, key: Array, num_heads: int, settings: QATSettings):
    """query, key: kernels [dim, heads * head_dim]; their biases are dropped."""
    self.num_heads = num_heads
    self.query, self.key = nnx.Param(query), nnx.Param(key)
    self.weight_quantizer = WeightQuantizer(
      self.latent(), settings.weight_bits, settings.weight_quantizer
    )
    # Static; a range masks the product's gradient as confidence-guided annealing masks kernels'.
    self.boundary_range: float | None = None

  def latent(self) -> Array:
    """K_h Q_h^T side by side, [dim, heads * dim]: a head's columns are the query's channels."""
    by_head = lambda kernel: kernel[...].reshape(kernel.shape[0], self.num_heads, -1)
    product = jnp.einsum("jhd,chd->jhc", by_head(self.key), by_head(self.query))
    return product.reshape(product.shape[0], -1)

  def __call__(self, x: Array) -> Array:
    """Rounded x [batch, seq, dim] -> t [batch, seq, heads * dim], to be multiplied with x."""
    w = self.latent()
    if self.boundary_range is not None:
      position = self.weight_quantizer.position(w)
      trained = near_threshold(position, self.weight_quantizer.bits, self.boundary_range)
      w = jnp.where(trained, w, jax.lax.stop_gradient(w))
    return x @ self.weight_quantizer(w)


class Rectification(nnx.Module):
  """Q-ViT's information rectification: (x - mean) / sd over a head's channels, scaled, shifted."""

  def __init__(self, head_dim: int):
    self.gain, self.shift = nnx.Param(jnp.ones(head_dim)), nnx.Param(jnp.zeros(head_dim))

  def __call__(self, x: Array) -> Array:
    """x: [batch, heads, seq, head_dim]."""
    return jax.nn.standardize(x, axis=-1, epsilon=1e-5) * self.gain[...] + self.shift[...]


class QATAttention(nnx.Module):
  """Quantized self-attention in place of `common.models.decoder.Attention`."""

  def __init__(self, attention: Attention | WindowAttention, seq: int, settings: QATSettings):
    """seq: number of tokens, which steps per token fix; of a window, its own."""
    dim, width = attention.q_proj.kernel.shape
    head_dim, bits = attention.head_dim, settings.activation_bits
    num_heads = width // head_dim
    self.head_dim, self.num_heads = head_dim, num_heads
    offsets = lambda features: features if settings.learnable_offsets else None
    per_token = lambda features: ActivationQuantizer(bits, (seq, 1), offsets(features))
    weights = settings.weight_bits, settings.weight_quantizer
    self.input_quantizer = per_token(dim)  # One for queries, keys and values.
    kernels = attention.q_proj.kernel[...], attention.k_proj.kernel[...]
    qkr, rectifies = settings.qkr, settings.rectify_queries_and_keys
    self.query_key = QueryKeyProduct(*kernels, num_heads, settings) if qkr else None
    self.q_proj = None if qkr else QATLayer(attention.q_proj, *weights, None)
    self.k_proj = None if qkr else QATLayer(attention.k_proj, *weights, None)
    self.query_rectification = Rectification(head_dim) if rectifies else None
    self.key_rectification = Rectification(head_dim) if rectifies else None
    self.query_quantizer = None if qkr else per_token(head_dim)
    self.key_quantizer = per_token(dim if qkr else head_dim)
    self.v_proj = QATLayer(attention.v_proj, *weights, None)
    self.value_quantizer = ActivationQuantizer(bits, (width,), offsets(width))
    self.probability_quantizer = ActivationQuantizer(bits, (seq, 1), None, signed=False)
    self.o_proj = QATLayer(attention.o_proj, *weights, per_token(width))

  def __call__(self, x: Array, context: AttentionContext, kv=None):
    """x: [batch, seq, dim] -> ([batch, seq, dim], None). Every token sees every other."""
    del context
    if kv is not None:
      raise ValueError("quantized attention has no cache")
    return self.mix(x), None

  def mix(self, x: Array, bias: Array | None = None) -> Array:
    """x: [batch, seq, dim] -> the same; bias is added to the logits [batch, heads, seq, seq]."""
    x = self.input_quantizer(x)
    value = split_heads(self.value_quantizer(self.v_proj(x)), self.head_dim)
    query, key = self.queries_and_keys(x)
    logits = jnp.einsum("bhqc,bhkc->bhqk", query, key) / math.sqrt(self.head_dim)
    if bias is not None:
      logits = logits + bias
    probabilities = self.probability_quantizer(jax.nn.softmax(logits, axis=-1))
    return self.o_proj(merge_heads(probabilities @ value))

  def queries_and_keys(self, x: Array) -> tuple[Array, Array]:
    """Rounded x [batch, seq, dim] -> rounded [batch, heads or 1, seq, channels] of each side."""
    if self.query_key is not None:
      # Each head's "query" is x itself; everything else is in the key's factor.
      t = split_heads(self.query_key(x), x.shape[-1])
      return jnp.broadcast_to(x[:, None], t.shape), self.key_quantizer(t)
    query = split_heads(self.q_proj(x), self.head_dim)
    key = split_heads(self.k_proj(x), self.head_dim)
    if self.query_rectification is not None:
      query, key = self.query_rectification(query), self.key_rectification(key)
    return self.query_quantizer(query), self.key_quantizer(key)


class QATWindowAttention(QATAttention):
  """Quantized attention in place of `common.models.swin.WindowAttention`."""

  def __call__(self, x: Array, bias: Array) -> Array:
    """x: [windows, tokens, dim], bias: [windows, heads, tokens, tokens] -> x's shape."""
    return self.mix(x, bias)


def quantize(model: VisionTransformer | Swin, settings: QATSettings) -> VisionTransformer | Swin:
  """A copy of a full-precision ViT, DeiT or Swin that is ready for quantization-aware training.

  The initial steps of activations are set by `calibrate`, which must follow.

  Raises:
    UserError: the model is of another kind or has been quantized already.
  """
  if not isinstance(model, VisionTransformer | Swin):
    raise UserError(
      f"OFQ quantizes vision transformers (ViT, DeiT, Swin), not {type(model).__name__}"
    )
  if isinstance(model.embed_patches, QATLayer):
    raise UserError("the model is quantized already; start from the full-precision model")
  check_finite(model)
  return _prepared_copy(model, settings)


def prepare(model: VisionTransformer | Swin, settings: QATSettings) -> VisionTransformer | Swin:
  """`quantize` in place and unchecked, for abstract models too.

  Raises:
    UserError: Q-ViT's rectification, which goes with guidance by whole attention maps, for Swin.
  """
  if isinstance(model, Swin):
    if settings.rectify_queries_and_keys:
      raise UserError("Q-ViT is for ViT and DeiT here, not for Swin; choose another method")
    for index, stage in enumerate(model.stages):
      for block in stage.blocks:
        quantize_block(block, math.prod(block.grid), settings)
      if stage.merging is not None:
        seq = math.prod(model.config.grid(index + 1))
        stage.merging.reduction = _qat_linear(stage.merging.reduction, seq, settings)
  else:
    for block in model.blocks:
      quantize_block(block, model.config.sequence_length, settings)
  model.embed_patches = outer_layer(model.embed_patches, (1, 1, 1))
  for name in ("classifier", "class_classifier", "distillation_classifier"):
    if getattr(model, name, None) is not None:
      replace_module(model, name, outer_layer(getattr(model, name), (1,)))
  return model


@functools.partial(nnx.jit, static_argnums=1)
def _prepared_copy(model, settings: QATSettings):
  return prepare(nnx.clone(model), settings)


def quantize_block(block: nnx.Module, seq: int, settings: QATSettings) -> None:
  """Replaces the attention and the MLP's linears of a block on `seq` tokens, in place."""
  if isinstance(block, SwinBlock):
    block.attention = QATWindowAttention(block.attention, block.window**2, settings)
  else:
    block.attention = QATAttention(block.attention, seq, settings)
  block.mlp.up_proj = _qat_linear(block.mlp.up_proj, seq, settings)
  # What GELU gives is mostly positive; the offset sees to the rest.
  block.mlp.down_proj = _qat_linear(block.mlp.down_proj, seq, settings, signed=False)


def _qat_linear(layer: nnx.Linear, seq: int, settings: QATSettings, signed: bool = True):
  features = layer.kernel.shape[0]
  offsets = features if settings.learnable_offsets else None
  quantizer = ActivationQuantizer(settings.activation_bits, (seq, 1), offsets, signed)
  return QATLayer(layer, settings.weight_bits, settings.weight_quantizer, quantizer)


def outer_layer(layer: nnx.Linear | nnx.Conv, step_shape: tuple[int, ...]) -> QATLayer:
  """The first or a last layer: LSQ with 8 bits, one step for all its inputs."""
  return QATLayer(layer, OUTER_BITS, "lsq", ActivationQuantizer(OUTER_BITS, step_shape, None))


def calibrate(model: nnx.Module, images: Array) -> None:
  """Sets the steps of all activation quantizers from one batch, layer after layer, in place.

  Args:
    model: of `quantize`.
    images: float [batch, height, width, channels].

  Raises:
    UserError: the images, or a step that they give, are not finite.
  """
  check_finite(model, images)
  model.set_attributes(calibrating=True)
  _forward(model, images)
  model.set_attributes(calibrating=False)
  check_finite(model, images)  # Of the same arrays as before: the program is there.


@nnx.jit
def _forward(model: nnx.Module, images: Array) -> None:
  model(images)


def block_layers(model: nnx.Module) -> dict[str, QATLayer | QueryKeyProduct]:
  """The few-bit layers by path: all but the 8-bit first and last ones, the model's own attributes.

  They are those of the blocks, and what merges patches between Swin's stages.
  """
  return {
    ".".join(map(str, path)): layer
    for path, layer in nnx.iter_modules(model)
    if isinstance(layer, QATLayer | QueryKeyProduct) and len(path) > 1
  }


def weight_codes(model: nnx.Module) -> dict[str, Array]:
  """int8 levels of every few-bit weight matrix by path, W_Q W_K^T among them."""
  return {
    p: layer.weight_quantizer.codes(layer.latent()) for p, layer in block_layers(model).items()
  }
