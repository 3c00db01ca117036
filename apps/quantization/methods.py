"""The quantization methods of the papers behind one call: options in, `quantize_block` out."""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.models.decoder import Block, DecoderConfig
from common.quantization import autoawq, calibration
from common.quantization.activations import ActivationFormat, quantize_inputs
from common.quantization.linear import get_kernels
from common.quantization.quantized_array import IntegerFormat
from common.quantization.reconstruction import ReconstructionSettings


@dataclasses.dataclass(frozen=True)
class Options:
  """What a user may choose.

  Attributes:
    bits: of the weights.
    group_size: weights that share a scale; -1 for a scale per output channel.
    activation_bits: of the inputs of linears, each token with a scale of its own; 16 leaves them.
    symmetric: weights and activations have no zero points, as integer products need it. (FlatQuant
      has none anyway.)
    kv_bits: of FlatQuant's keys and values, each token and head with a scale of its own; 16 leaves
      them.
    seed: of batches and starts.
    steps: per block, of methods that learn; 0 takes the paper's.
    learning_rate: FlexRound's.
    epochs: over the calibration samples, per block, of methods that count in them.
    rank: of ZeroQuant-V2's low-rank compensation and of QLLM's correction; 0 leaves it out.
    vector_length: VPTQ's, outputs per vector; 0 takes the paper's for the bits.
    search: AWQ's search result, a file that is read if it exists and else written.
  """

  bits: int = 4
  group_size: int = 128
  activation_bits: int = 16
  symmetric: bool = False
  kv_bits: int = 16
  seed: int = 42
  steps: int = 0
  learning_rate: float = 3e-3
  epochs: int = 10
  rank: int = 8
  vector_length: int = 0
  search: str | None = None

  @property
  def weights(self) -> IntegerFormat:
    return IntegerFormat(
      self.bits, self.group_size, symmetric=self.symmetric, scale_dtype=jnp.float16
    )

  @property
  def activations(self) -> ActivationFormat | None:
    if self.activation_bits == 16:
      return None
    return ActivationFormat(self.activation_bits, symmetric=self.symmetric)


class Method(NamedTuple):
  """How a checkpoint is quantized.

  Attributes:
    quantize_block: see `calibration.quantize_blocks`.
    stream: see there.
    plain: the result is packed linears in `Options.weights` and nothing else, and the AutoAWQ
      layout holds them.
    finish: called when every block is through.
  """

  quantize_block: calibration.QuantizeBlock
  stream: str
  plain: bool
  finish: Callable[[], None] = lambda: None


def make_method(name: str, config: DecoderConfig, options: Options) -> Method:
  """The method of that name for decoders of a config.

  Raises:
    UserError: there is no such method, or it does not support the options.
  """
  if name not in METHODS:
    raise UserError(f"method {name!r} is not supported; supported: {', '.join(METHODS)}")
  if options.activations and name in WEIGHT_ONLY:
    others = ", ".join(sorted(METHODS.keys() - WEIGHT_ONLY))
    raise UserError(
      f"{name} quantizes weights only, got activation_bits={options.activation_bits}; use 16, or one "
      f"of {others}"
    )
  if options.kv_bits != 16 and name != "flatquant":
    raise UserError(f"kv_bits={options.kv_bits} belongs to flatquant, not {name}; use 16")
  method = METHODS[name](config, options)
  return method._replace(plain=method.plain and autoawq.holds(config, options.weights))


def rtn(config: DecoderConfig, options: Options) -> Method:
  """Rounding to nearest."""
  del config
  block = lambda i, block, x, context: calibration.rtn_block(block, options.weights)
  return Method(_with_rounded_inputs(block, options), "full_precision", not options.activations)


def smoothquant(config: DecoderConfig, options: Options) -> Method:
  """SmoothQuant (Xiao et al. 2023): scales by rule, then rounding to nearest."""

  def block(index, block, x, context):
    return calibration.smoothquant_block(block, x, context, config, options.weights)

  return Method(_with_rounded_inputs(block, options), "full_precision", False)


def gptq(config: DecoderConfig, options: Options) -> Method:
  """GPTQ (Frantar et al. 2023)."""
  del config
  block = lambda i, block, x, context: calibration.gptq_block(block, x, context, options.weights)
  return Method(block, "quantized", True)


def awq(config: DecoderConfig, options: Options) -> Method:
  """AWQ (Lin et al. 2024)."""
  from common.quantization.awq import AWQSettings, quantize_block, search_block
  from projects.awq import search_result

  settings = AWQSettings(format=options.weights)
  path = pathlib.Path(options.search) if options.search else None
  found = None
  if path and path.exists():
    found, settings = search_result.load(path)
    if settings.format != options.weights or len(found) != config.num_layers:
      raise UserError(
        f"{path} is the search result of {len(found)} blocks with {settings.format}, not of "
        f"{config.num_layers} with {options.weights}; use its bits and group size, or another file"
      )
  # A block's search is kept at once: after a kill only the other blocks come here again.
  parts = path and path.with_name(f"{path.name}.partial")
  part = lambda index: parts / f"block-{index:05d}.safetensors"

  def block(index, block, x, context):
    search = found[index] if found else search_block(block, x, context, config, settings)
    if path and not found:
      _make_directory(parts)
      search_result.save(part(index), [search], settings)
    return quantize_block(block, search, config, options.weights)

  def finish():
    if path and not found:
      searches = [search_result.load(part(i))[0][0] for i in range(config.num_layers)]
      search_result.save(path, searches, settings)
      shutil.rmtree(parts)

  # Where no operation before down_proj takes its scale, the activation does.
  plain = config.gated_mlp or config.activation == "relu"
  return Method(block, "full_precision", plain, finish)


def flexround(config: DecoderConfig, options: Options) -> Method:
  """FlexRound (Lee et al. 2023), as the official scripts quantize a 4-bit Llama-2-7B."""
  from projects.flexround.flexround import FlexRoundSettings, make_optimizer, quantize_block

  del config
  steps = options.steps or 5000
  block = functools.partial(
    quantize_block,
    settings=FlexRoundSettings(options.weights, start="min_max"),
    reconstruction=ReconstructionSettings(steps, batch_size=2),
    optimizer=make_optimizer(options.learning_rate, steps),
    key=jax.random.key(options.seed),
  )
  return Method(block, "both", True)


def adadim(config: DecoderConfig, options: Options) -> Method:
  """GPTQ along the better dimension of each linear (AdaDim, Heo et al. 2024)."""
  from projects.adadim.adadim import AdaDimSettings, quantize_block

  del config
  settings = AdaDimSettings(options.weights, algorithm="gptq")
  block = lambda i, block, x, context: quantize_block(block, x, context, settings)
  return Method(block, settings.stream, False)


def vptq(config: DecoderConfig, options: Options) -> Method:
  """VPTQ (Liu et al. 2024) without fine-tuning: 12-bit indices, as in the paper, by default."""
  from projects.vptq.blocks import quantize_block
  from projects.vptq.vptq import VPTQSettings

  del config
  length = options.vector_length or max(12 // options.bits, 1)
  if options.bits * length > 16:
    raise UserError(
      f"vectors of {length} at {options.bits} bits take indices of {options.bits * length} bits; "
      "expected at most 16: choose a smaller vector_length"
    )
  settings = VPTQSettings(vector_length=length, num_centroids=2 ** (options.bits * length))
  key = jax.random.key(options.seed)
  return Method(functools.partial(quantize_block, settings=settings, key=key), "quantized", False)


def llm_fp4(config: DecoderConfig, options: Options) -> Method:
  """LLM-FP4 (Liu et al. 2023): weights and activations in floating point of 4, 6 or 8 bits.

  Of the blocks; embeddings and the output head, which the paper rounds too, stay as they are.
  """
  from projects.llm_fp4.llm_fp4 import FPQSettings
  from projects.llm_fp4.models import quantize_block

  del config
  settings = FPQSettings(options.bits, options.activation_bits, tokens=2048)
  block = lambda i, block, x, context: quantize_block(block, x, context, settings, packed=True)
  return Method(block, "full_precision", False)


def zeroquant_v2(config: DecoderConfig, options: Options) -> Method:
  """GPTQ with low-rank compensation (ZeroQuant-V2, Yao et al. 2023)."""
  from projects.zeroquant_v2.zeroquant_v2 import ZeroQuantSettings, quantize_block

  del config
  settings = ZeroQuantSettings(
    "GPTQ", options.weights, activations=options.activations, rank=options.rank, factor_bits=8
  )
  key = jax.random.key(options.seed)
  block = functools.partial(quantize_block, key=key, settings=settings)
  return Method(block, settings.inputs, False)


def outlier_suppression_plus(config: DecoderConfig, options: Options) -> Method:
  """Outlier Suppression+ (Wei et al. 2023): for weights and activations."""
  from projects.outlier_suppression_plus.outlier_suppression_plus import Settings, quantize_block

  if options.activations is None:
    raise UserError(
      "outlier_suppression_plus scales activations for their quantization; activation_bits must be "
      "below 16"
    )
  # The paper's ends of the search: activations behind RMSNorm are smaller.
  lower_bound = 0.1 if config.norm == "rms" else 1.0
  settings = Settings(options.weights, options.activations, lower_bound=lower_bound)
  block = functools.partial(quantize_block, config=config, settings=settings)
  return Method(block, "quantized", False)


def qllm(config: DecoderConfig, options: Options) -> Method:
  """QLLM (Liu et al. 2024): channel reassembly, then a low-rank correction of each block."""
  from projects.qllm.qllm import quantize_block
  from projects.qllm.settings import Settings, Tuning

  if options.activations is None:
    raise UserError(
      "qllm reassembles channels for the quantization of activations; activation_bits must be below 16"
    )
  activations = dataclasses.replace(options.activations, include_zero=False)
  tuning = Tuning(rank=options.rank, blocks_per_round=1, epochs=options.epochs)
  settings = Settings(options.weights, activations, tuning=tuning if options.rank else None)
  key = jax.random.key(options.seed)
  block = functools.partial(quantize_block, config=config, settings=settings, key=key)
  return Method(block, "both", False)


def flatquant(config: DecoderConfig, options: Options) -> Method:
  """FlatQuant (Sun et al. 2025): learned Kronecker transforms, then rounding to nearest."""
  from projects.flatquant.flat_block import FlatQuantSettings
  from projects.flatquant.flatquant import check_block, make_optimizer, quantize_block

  options = dataclasses.replace(options, symmetric=True)
  cached = None if options.kv_bits == 16 else ActivationFormat(options.kv_bits)
  settings = FlatQuantSettings(options.weights, options.activations, keys=cached, values=cached)
  check_block(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))), settings)
  steps = options.steps or 480  # 15 epochs of 128 samples.
  block = functools.partial(
    quantize_block,
    settings=settings,
    reconstruction=ReconstructionSettings(steps, batch_size=4),
    optimizer=make_optimizer(5e-3, steps),
    key=jax.random.key(options.seed),
  )
  return Method(block, "full_precision", False)


METHODS = {
  "rtn": rtn,
  "smoothquant": smoothquant,
  "gptq": gptq,
  "awq": awq,
  "flexround": flexround,
  "adadim": adadim,
  "vptq": vptq,
  "llm_fp4": llm_fp4,
  "zeroquant_v2": zeroquant_v2,
  "outlier_suppression_plus": outlier_suppression_plus,
  "qllm": qllm,
  "flatquant": flatquant,
}
WEIGHT_ONLY = {"gptq", "awq", "flexround", "adadim", "vptq"}


def _make_directory(path: pathlib.Path) -> None:
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(f"cannot write to {path}: {e.strerror}") from None


def _with_rounded_inputs(quantize_block, options: Options) -> calibration.QuantizeBlock:
  """The same, and the linears' inputs are rounded where the options say so."""

  def block(index, block, x, context):
    paths = list(get_kernels(block))
    quantized = quantize_block(index, block, x, context)
    if options.activations:
      quantize_inputs(quantized, paths, options.activations)
    return quantized

  return block
