"""What is compared, and on what: the methods, the calibration draws and the evaluation text."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from common.data.pipelines import calibration_samples, evaluation_windows
from common.models.base import BaseModel
from common.models.decoder import Decoder
from common.quantization.calibration import gptq_block, quantize_model, rtn_block
from common.quantization.linear import bits_per_weight, get_kernels, quantized_weights, set_kernels
from common.quantization.quantized_array import IntegerFormat
from common.quantization.vector_quantized import mean_bits, vector_quantized_weights
from projects.vptq.blocks import (
  dense,
  finetune_blocks,
  quantize_with_hessians,
)
from projects.vptq.finetune import Finetuning, finetune_model
from projects.vptq.gptvq import gptvq
from projects.vptq.vptq import ProxyErrors, VPTQSettings, proxy_error

Array = jax.Array
Hessians = list[dict[str, Array]]


class Quantized(NamedTuple):
  """One method's result.

  Attributes:
    model: with dense kernels, which one compiled program evaluates.
    packed: the same with packed indices, or None.
    index_bits: bits of the codes alone, per weight.
    bits: of everything that is stored, per weight; of packed models that of their arrays, padding
      included.
    proxy_errors: {path of the linear: tr(dW^T H dW) / tr(W^T H W) after each stage, the last that
      of the result}; None where the weights were made for other inputs.
  """

  model: Decoder
  packed: Decoder | None
  index_bits: float
  bits: float
  proxy_errors: dict[str, list[float]] | None


class Method(NamedTuple):
  """A row of the main table.

  Attributes:
    name: of the row.
    source: computes what `make` starts from and other methods share, and caches it: apart, so that
      no method's time includes it.
    make: quantizes.
  """

  name: str
  source: Callable[[], object]
  make: Callable[[], Quantized]


def settings(config: ConfigDict, **changes) -> VPTQSettings:
  """The config's method, with changes."""
  names = (
    "vector_length",
    "num_centroids",
    "num_groups",
    "permute",
    "normalize",
    "damping",
    "kmeans_iterations",
  )
  return VPTQSettings(**{name: config[name] for name in names} | changes)


def residual_settings(config: ConfigDict) -> VPTQSettings:
  v, k, k_residual = config.residual
  return settings(config, vector_length=v, num_centroids=k, num_residual_centroids=k_residual)


def outlier_settings(config: ConfigDict, fraction: float) -> VPTQSettings:
  _, v, k = config.outliers
  return settings(
    config, outlier_fraction=fraction, outlier_vector_length=v, num_outlier_centroids=k
  )


def held_out_windows(config: ConfigDict, base: BaseModel) -> np.ndarray:
  """Windows of every domain's test split together, int32 [windows, seq]."""
  windows = evaluation_windows(
    config.domains, base.tokenizer, seq_len=config.eval_length, per_source=config.eval_windows
  )
  return np.concatenate(list(windows.values()))


def calibration(config: ConfigDict, base: BaseModel, seed: int) -> Array:
  """A draw from all domains together, int32 [samples, seq]."""
  return jnp.asarray(
    calibration_samples(
      ",".join(config.domains),
      base.tokenizer,
      num_samples=config.calibration_samples,
      seq_len=config.calibration_length,
      seed=seed,
    )
  )


def quantize_vptq(
  model: Decoder, hessians: Hessians, method: VPTQSettings, key: Array
) -> Quantized:
  return stored(model, *quantize_with_hessians(model, hessians, method, key))


def stored(
  model: Decoder, packed: Decoder, errors: dict[str, ProxyErrors] | None = None
) -> Quantized:
  """The result whose model with packed indices is `packed`; `errors`: see `Quantized`."""
  proxies = None if errors is None else {path: list(map(float, e)) for path, e in errors.items()}
  return Quantized(dense(packed, model), packed, *bits_of(packed), proxies)


def bits_of(packed: Decoder) -> tuple[float, float]:
  """(bits of the indices, bits of the arrays that hold the weights) per quantized weight."""
  weights = vector_quantized_weights(packed).values()
  size = sum(math.prod(w.shape) for w in weights)
  # Trained codebooks are float16 again: `finetune` gives them back as they are stored.
  stored = sum(leaf.nbytes for leaf in jax.tree.leaves(list(weights)))
  return mean_bits(packed)[0], 8 * stored / size


def quantize_gptvq(
  model: Decoder, hessians: Hessians, method: VPTQSettings, key: Array
) -> Quantized:
  """Bits are VPTQ's with the same settings, without padding: as many indices, one codebook."""
  result, proxies = nnx.clone(model), {}
  bits = []
  for i, block in enumerate(model.blocks):
    kernels = get_kernels(block)
    keys = jax.random.split(jax.random.fold_in(key, i), len(kernels))
    new = {}
    for (path, w), use in zip(kernels.items(), keys):
      method.check(w.shape, path)
      new[path], error = gptvq(w, hessians[i][path], use, method)
      proxies[f"blocks.{i}.{path}"] = [float(error)]
      rows, v = w.shape[0], method.vector_length
      index = -(-rows // v) * np.log2(method.num_centroids) / rows
      values = method.num_centroids * v + (2 * rows if method.normalize else 0)
      bits.append((w.size, index, index + 16 * values / w.size))
    set_kernels(result.blocks[i], new)
  sizes, index, stored = np.array(bits).T
  mean = lambda b: float((b * sizes).sum() / sizes.sum())
  return Quantized(result, None, mean(index), mean(stored), proxies)


def integer_baselines(
  config: ConfigDict, model: Decoder, tokens: Array, hessians: Callable[[], Hessians]
) -> Iterator[Method]:
  """RTN and GPTQ; GPTQ calibrates on the quantized stream, as its authors do."""
  format = IntegerFormat(config.bits, config.group_size, scale_dtype=jnp.float16)

  def finished(packed: Decoder) -> Quantized:
    result, proxies = nnx.clone(model), {}
    for i, block in enumerate(packed.blocks):
      weights, new = quantized_weights(block), {}
      for path, w in get_kernels(model.blocks[i]).items():
        new[path] = weights[path].dequantize(w.dtype)  # As in `gptq_weights`: one program.
        error = proxy_error(w, new[path], hessians()[i][path])
        proxies[f"blocks.{i}.{path}"] = [float(error)]
      set_kernels(result.blocks[i], new)
    bits = bits_per_weight(packed.blocks)
    return Quantized(result, None, config.bits, bits, proxies)

  def rtn() -> Quantized:
    packed = nnx.clone(model)
    packed.blocks = nnx.List([rtn_block(block, format) for block in model.blocks])
    return finished(packed)

  def gptq() -> Quantized:
    block = lambda i, block, x, context: gptq_block(block, x, context, format)
    return finished(quantize_model(model, tokens, block, stream="quantized"))

  yield Method("RTN", hessians, rtn)
  yield Method("GPTQ", hessians, gptq)


def main_methods(
  config: ConfigDict, model: Decoder, tokens: Array, hessians: Callable[[], Hessians], key: Array
) -> Iterator[Method]:
  """The main table's methods for one seed, in order.

  All vector quantizers with the same vectors start their k-means from the same draw.

  Args:
    hessians: of the calibration tokens, cached.
  """
  main = settings(config)
  yield from integer_baselines(config, model, tokens, hessians)

  def vptq(name: str, method: VPTQSettings) -> Method:
    return Method(name, hessians, lambda: quantize_vptq(model, hessians(), method, key))

  # Tuning starts from the model of another row. It is kept packed, as the dense one may be large, and
  # made again where a run that was killed has measured its row.
  @functools.cache
  def untuned():
    return quantize_with_hessians(model, hessians(), main, key)

  @functools.cache
  def layer_tuned() -> Decoder:
    finetuning = Finetuning(*config.layer_finetuning)
    return finetune_blocks(untuned()[0], model, tokens, key, finetuning)

  @functools.cache
  def tuned() -> Decoder:
    finetuning = Finetuning(*config.end_to_end_finetuning)
    return finetune_model(layer_tuned(), model, tokens, key, finetuning)[0]

  yield Method("GPTVQ-like", hessians, lambda: quantize_gptvq(model, hessians(), main, key))
  yield vptq("k-means", settings(config, feedback=False, hessian_weighted=False))
  yield vptq("weighted k-means", settings(config, feedback=False))
  yield Method("VPTQ", hessians, lambda: stored(model, *untuned()))
  yield vptq("VPTQ, residual", residual_settings(config))
  if config.outliers:
    yield vptq("VPTQ, outliers", outlier_settings(config, config.outliers[0]))
  yield Method("VPTQ, layer-wise tuned", untuned, lambda: stored(model, layer_tuned()))
  yield Method("VPTQ, tuned end to end", layer_tuned, lambda: stored(model, tuned()))


def ablations(config: ConfigDict) -> Iterator[tuple[str, str, VPTQSettings]]:
  """(table, row, settings) of the ablations beyond the main table."""
  for v, k in config.vector_lengths:
    yield "length", f"v={v}, k={k}", settings(config, vector_length=v, num_centroids=k)
  for fraction in config.outlier_fractions:
    yield "outliers", f"{fraction:.0%} outliers", outlier_settings(config, fraction)
  for groups in config.group_numbers:
    yield "groups", f"{groups} groups", settings(config, num_groups=groups)
  yield "switches", "without permutation", settings(config, permute=False)
  yield "switches", "feedback, unweighted k-means", settings(config, hessian_weighted=False)
  yield "switches", "normalised", settings(config, normalize=True)
  yield (
    "switches",
    "normalised, H not scaled (published code)",
    settings(config, normalize=True, norm_hessian=False),
  )
