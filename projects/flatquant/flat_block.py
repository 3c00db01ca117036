"""A block in FlatQuant's transformed basis: its settings, what is learned, and how it is folded."""

import dataclasses
import typing
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.models.decoder import AttentionContext, Block
from common.models.surgery import get_module, linear_paths, replace_module
from common.quantization.activations import ActivationFormat, fake_quantize
from common.quantization.linear import get_kernels, set_kernels
from common.quantization.online_transforms import (
  ClippedInput,
  OnlineTransform,
  TransformedAttention,
  TransformedMLP,
  TransformedNorm,
)
from common.quantization.quantized_array import IntegerFormat
from common.quantization.reconstruction import Learned
from projects.flatquant.kronecker import factor_pair
from projects.flatquant.transforms import (
  Factors,
  FixedRotation,
  KroneckerTransform,
  Parametrization,
  RawMatrix,
  SVDMatrix,
  hadamard,
)

Array = jax.Array

SITES = ("P_a", "P_o", "P_v", "P_h", "P_ug", "P_d")

# A transform and the linears whose inputs it transforms.
LINEARS = {
  "P_a": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
  "P_o P_v": ("attention.o_proj",),
  "P_ug": ("mlp.gate_proj", "mlp.up_proj"),
  "P_d": ("mlp.down_proj",),
}

# Logit of a clipping factor at the start: a range times 0.982.
INITIAL_CLIP = 4.0


@dataclasses.dataclass(frozen=True)
class FlatQuantSettings:
  """What is rounded, and which parts of the method are used.

  Attributes:
    weights, activations, queries, keys, values: their formats; None leaves them alone.
    sites: the transforms, of `SITES` (LT of the paper's ablation; empty: none).
    scale: c (PS).
    clip: learned factors of the ranges (LCT).
    matrices: "svd" or "inverse", see `transforms`; "rotation" learns orthogonal factors (SpinQuant),
      "hadamard" fixes every factor (QuaRot).
    left_size: n1 of P_a, P_ug and P_d; None takes the factors closest to each other.
    scale_alpha: c starts at max|w|^(1 - alpha) / max|x|^alpha.
    initial_clip: logit of every clipping factor at the start.

  Raises:
    UserError: an unknown site or parametrization, or a format that weights or tokens cannot take.
  """

  weights: IntegerFormat | None = None
  activations: ActivationFormat | None = None
  queries: ActivationFormat | None = None
  keys: ActivationFormat | None = None
  values: ActivationFormat | None = None
  sites: tuple[str, ...] = SITES
  scale: bool = True
  clip: bool = True
  matrices: Parametrization = "svd"
  left_size: int | None = None
  scale_alpha: float = 0.3
  initial_clip: float = INITIAL_CLIP

  def __post_init__(self):
    if unknown := [site for site in self.sites if site not in SITES]:
      raise UserError(f"no transform {unknown[0]!r}; choose of {', '.join(SITES)}")
    if self.matrices not in typing.get_args(Parametrization):
      supported = ", ".join(typing.get_args(Parametrization))
      raise UserError(f"matrices={self.matrices!r}; supported: {supported}")
    if self.weights is not None and self.weights.axis != 0:
      raise UserError(f"weights have axis={self.weights.axis}; FlatQuant groups the input (axis 0)")
    for format in (self.activations, self.queries, self.keys, self.values):
      if format is not None and format.granularity != "per_token":
        raise UserError(f"activations are {format.granularity}; FlatQuant quantizes per_token")

  @property
  def attention_formats(self) -> dict[str, ActivationFormat]:
    """{operand of attention: format} of those that are rounded."""
    formats = {"query": self.queries, "key": self.keys, "value": self.values}
    return {operand: format for operand, format in formats.items() if format is not None}


class ClipFactors(nnx.Module):
  """Factors of a range's two ends, sigmoid of what is learned; 1 when not used."""

  def __init__(self, shape: tuple[int, ...], settings: FlatQuantSettings):
    """Factors [2, *shape], of the minimum and of the maximum."""
    self.logits = Learned(jnp.full((2, *shape), settings.initial_clip, jnp.float32))
    self.use = nnx.Param(jnp.asarray(settings.clip))

  def factors(self) -> Array:
    """In (0, 1], [2, *shape]."""
    return jnp.where(self.use[...], jax.nn.sigmoid(self.logits[...]), 1.0)


class FlatBlock(nnx.Module):
  """A block whose transforms, scales and clipping factors are learned; its weights are frozen.

  Attributes:
    block: the original.
    transforms: {"P_a" | "P_o P_v" | "P_h" | "P_ug" | "P_d": KroneckerTransform}.
    weight_clips: {path: factors [2, out]} of the transformed kernels.
    input_clips: {path: factors [2]} of the inputs of every linear.
    attention_clips: {operand: factors [2]} of those that are rounded.
  """

  def __init__(
    self, block: Block, settings: FlatQuantSettings, scales: Mapping[str, Array], key: Array
  ):
    """`scales`: c of P_a, P_ug and P_d to start from, see `initial_scales`."""
    self.block = nnx.clone(block)
    state = nnx.state(self.block, nnx.Param)
    nnx.update(self.block, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state))
    self.weights, self.activations = settings.weights, settings.activations
    self.attention_formats = tuple(settings.attention_formats.items())
    head_dim = block.attention.head_dim
    heads = get_module(block, "attention.o_proj").in_features // head_dim
    sizes = {"P_o P_v": (heads, head_dim), "P_h": (1, head_dim)}
    sizes |= {site: factor_pair(len(c), settings.left_size) for site, c in scales.items()}
    transforms = {}
    for i, (site, (n1, n2)) in enumerate(sorted(sizes.items())):
      left_key, right_key = jax.random.split(jax.random.fold_in(key, i))
      names = site.split()
      transforms[site] = KroneckerTransform(
        _matrix(n1, left_key, settings),
        _matrix(n2, right_key, settings),
        scales.get(site),
        use_left=names[0] in settings.sites,
        use_right=names[-1] in settings.sites,
        use_scale=settings.scale,
      )
    self.transforms = nnx.data(transforms)
    paths = linear_paths(block)
    widths = {path: get_module(block, path).out_features for path in paths}
    self.weight_clips = nnx.data({p: ClipFactors((widths[p],), settings) for p in paths})
    self.input_clips = nnx.data({p: ClipFactors((), settings) for p in paths})
    self.attention_clips = nnx.data(
      {operand: ClipFactors((), settings) for operand, _ in self.attention_formats}
    )

  def fold(self) -> Block:
    """The block in the transformed basis: clipped kernels, folded c and P_v, online transforms.

    Its keys and values are rounded; its weights and the inputs of its linears are not.
    """
    block = nnx.clone(self.block)
    factors = {site: transform.factors() for site, transform in self.transforms.items()}
    kernels = get_kernels(block)
    for site, paths in LINEARS.items():
      for path in paths:
        kernel = factors[site].apply_inverse(kernels[path])
        kernels[path] = clip_kernel(kernel, self.weight_clips[path].factors())
    # After the clip: P_v on the values of each head, and down's c, which the gate lets through.
    values, up = block.attention.v_proj, block.mlp.up_proj
    p_v, c_d = factors["P_o P_v"].right, factors["P_d"].scale
    kernels["attention.v_proj"] = _transform_heads(kernels["attention.v_proj"], p_v)
    kernels["mlp.up_proj"] = kernels["mlp.up_proj"] * c_d
    set_kernels(block, kernels)
    if values.bias is not None:
      values.bias = nnx.Param(_transform_heads(values.bias[...], p_v))
    if up.bias is not None:
      up.bias = nnx.Param(up.bias[...] * c_d)
    block.attention_norm = _transform_norm(block.attention_norm, factors["P_a"])
    block.mlp_norm = _transform_norm(block.mlp_norm, factors["P_ug"])
    mlp, transform = block.mlp, OnlineTransform(factors["P_d"].left, factors["P_d"].right)
    block.mlp = TransformedMLP(mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.activation, transform)
    formats = dict(self.attention_formats)
    rounded = "key" in formats or "query" in formats
    clips = {operand: self.attention_clips[operand].factors() for operand in formats}
    attend = TransformedAttention(
      (factors["P_h"].right, factors["P_h"].inverse_right) if rounded else None,
      factors["P_o P_v"].left,
      formats,
      clips,
    )
    replace_module(block, "attention.attend", attend)
    return block

  def __call__(self, x: Array, context: AttentionContext, kv=None):
    """As `Block.__call__`, with everything rounded; gradients pass the rounding."""
    block = self.fold()
    if self.weights is not None:
      rounded = {path: round_kernel(w, self.weights) for path, w in get_kernels(block).items()}
      set_kernels(block, rounded)
    self.quantize_inputs(block)
    return block(x, context, kv)

  def quantize_inputs(self, block: Block) -> None:
    """Rounds the inputs of the linears of a folded block, packed or not, in place."""
    if self.activations is None:
      return
    for path, clip in self.input_clips.items():
      layer = ClippedInput(get_module(block, path), self.activations, clip.factors())
      replace_module(block, path, layer)


def clip_kernel(kernel: Array, clip: Array) -> Array:
  """The kernel [in, out] clamped to (clip[0] min, clip[1] max) of its output channel; clip [2, out]."""
  # Rows, which lie in memory one after the other; and no `jnp.clip`, which halves gradients at ties
  # with several passes over the kernel.
  rows, (of_low, of_high) = kernel.T, clip[..., None]
  low, high = rows.min(axis=1, keepdims=True) * of_low, rows.max(axis=1, keepdims=True) * of_high
  raised = jnp.where(rows < low, low, rows)
  return jnp.where(raised > high, high, raised).T


def round_kernel(kernel: Array, format: IntegerFormat) -> Array:
  """The kernel [in, out] rounded to nearest, as `rtn.fake_quantize`; gradients pass the rounding."""
  rows = ActivationFormat(
    format.bits, group_size=format.group_size, symmetric=format.symmetric, include_zero=False
  )
  return fake_quantize(kernel.T, rows).T


def _matrix(n: int, key: Array, settings: FlatQuantSettings) -> nnx.Module:
  # A factor of size 1 is a number: scales of tokens and output channels make up for it.
  if settings.matrices == "hadamard" or n == 1:
    return FixedRotation(hadamard(n))
  if settings.matrices == "inverse":
    return RawMatrix(n, key)
  return SVDMatrix(n, key, rotation=settings.matrices == "rotation")


def _transform_heads(x: Array, matrix: Array) -> Array:
  """x (I (x) P) for x [..., heads * head_dim] and P [head_dim, head_dim]."""
  heads = x.reshape(*x.shape[:-1], -1, matrix.shape[0])
  return jnp.matmul(heads, matrix, precision="highest").reshape(x.shape)


def _transform_norm(norm: nnx.Module, factors: Factors) -> TransformedNorm:
  """The norm with c in its gain, and the transform after it."""
  norm = nnx.clone(norm)
  norm.scale = nnx.Param(norm.scale[...] * factors.scale)
  if getattr(norm, "bias", None) is not None:
    norm.bias = nnx.Param(norm.bias[...] * factors.scale)
  return TransformedNorm(norm, OnlineTransform(factors.left, factors.right))
