"""FPQ of the products inside attention, Q K^T and P V, as in the paper's BERT and ViT (section 5.1).

Both operands are activations. Each has one format and one bias for the whole tensor: the pre-shifted
bias is for fully-connected layers (section 4.2). The search is that of the FPQ baseline, with the right
operand (K^T, V) in the place of the weights. Probabilities keep the sign bit: formats are signed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.models.decoder import AttentionContext, Block
from common.models.surgery import replace_module
from common.quantization import calibration
from common.quantization.attention import OPERANDS, attention_operands
from common.quantization.calibration import token_mask
from kernels.attention.api import attention
from projects.llm_fp4.llm_fp4 import (
  FPQSettings,
  Problem,
  linear_result,
  search_problem,
  start_bias,
)
from projects.llm_fp4.metrics import scaled_gradients

Array = jax.Array

# Where attention is called, in a block.
PATH = "attention.attend"


class AttentionSearch(NamedTuple):
  """What was found for the operands of one attention, in the order of `OPERANDS`.

  Attributes:
    formats: places in the settings' `activation_formats`, int32 [4].
    biases: float32 [4].
    output_errors: of Q K^T and P V, sum (Y - Y_hat)^2 / sum Y^2 on the tokens of the search,
      float32 [2].
  """

  formats: Array
  biases: Array
  output_errors: Array


class ProductSearch(NamedTuple):
  """What was found for one product: places of the formats, int32 [], biases and `output_error`, []."""

  left_format: Array
  left_bias: Array
  right_format: Array
  right_bias: Array
  output_error: Array


def search_product(
  left: Array,
  right: Array,
  left_max: Array,
  right_max: Array,
  settings: FPQSettings,
  gradients: Array | None = None,
) -> ProductSearch:
  """Searches a format and a bias for both operands of a product.

  Args:
    left: [..., rows, inner].
    right: [..., inner, columns].
    left_max, right_max: the largest magnitudes over the whole calibration set, [].
    settings: what to search; `activation_bits` are those of both.
    gradients: of the loss by the product, in its shape, for the metric "hessian".
  """
  settings = settings.per_tensor
  left, right = left.astype(jnp.float32), right.astype(jnp.float32)
  start = lambda maximum: start_bias(settings.activation_formats, maximum[None])
  problem = Problem(
    right,
    left,
    jnp.matmul(left, right, precision="highest"),
    start(right_max),
    start(left_max),
    scaled_gradients(gradients) if settings.metric == "hessian" else None,
  )
  found = linear_result(problem, search_problem(problem, settings), settings)
  return ProductSearch(
    found.activation_format,
    found.tensor_bias,
    found.weight_format,
    found.weight_bias[0],
    found.output_error,
  )


def search_operands(
  operands: dict[str, Array],
  rows: Array,
  settings: FPQSettings,
  output_gradient: Array | None = None,
) -> AttentionSearch:
  """Searches both products of one attention.

  Args:
    operands: of `real_operands`.
    rows: queries that the search looks at, int32 [samples, rows].
    settings: what to search.
    output_gradient: of the loss by P V, [samples, heads, seq, head_dim], for the metric "hessian".
  """
  query, key, value, probabilities = (operands[name] for name in OPERANDS)
  chosen = lambda x: jnp.take_along_axis(x, rows[:, None, :, None], axis=2)
  largest = lambda x: jnp.abs(x).max()
  of_scores = of_output = None
  if settings.metric == "hessian":
    of_output = chosen(output_gradient)
    of_scores = score_gradient(chosen(probabilities), value, of_output)
  scores = search_product(
    chosen(query), key.swapaxes(-1, -2), largest(query), largest(key), settings, of_scores
  )
  output = search_product(
    chosen(probabilities), value, largest(probabilities), largest(value), settings, of_output
  )
  return AttentionSearch(
    jnp.stack([scores.left_format, scores.right_format, output.right_format, output.left_format]),
    jnp.stack([scores.left_bias, scores.right_bias, output.right_bias, output.left_bias]),
    jnp.stack([scores.output_error, output.output_error]),
  )


def score_gradient(probabilities: Array, value: Array, output_gradient: Array) -> Array:
  """Gradient by the scores S of P V, P = softmax(S): P (dP - sum_keys P dP), dP = dO V^T.

  Args:
    probabilities: P, [..., queries, keys].
    value: V, [..., keys, head_dim].
    output_gradient: dO, [..., queries, head_dim].
  """
  dp = jnp.matmul(output_gradient, value.swapaxes(-1, -2), precision="highest")
  return probabilities * (dp - jnp.sum(probabilities * dp, axis=-1, keepdims=True))


def real_operands(block: Block, x: Array, context: AttentionContext) -> dict[str, Array]:
  """The four `OPERANDS`, [samples, heads, seq, ...]; those of padding are 0, without part in errors.

  Args:
    block: in full precision.
    x: its inputs, [samples, seq, dim].
    context: of `quantize_blocks`.
  """
  return _real_operands(*nnx.split(block), x, context)


def chosen_queries(real: np.ndarray, counted: np.ndarray, tokens: int | None) -> np.ndarray:
  """Queries that a search looks at, about `tokens` over all samples, int32 [samples, rows].

  Args:
    real: 0 for padding, [samples, seq].
    counted: whether a query has a part in the loss, [samples, seq]: these come first.
    tokens: None takes all.
  """
  samples, seq = real.shape
  count = seq if tokens is None else min(seq, -(-tokens // samples))
  # From the middle of equal parts: the ends of a text are [CLS] and [SEP].
  middles = lambda length, n: np.floor((np.arange(n) + 0.5) * length / max(n, 1))
  groups = lambda r, c: [np.flatnonzero(m) for m in (r & c, r & ~c, ~r)]
  masks = zip(real.astype(bool), counted.astype(bool))
  return np.stack([fill_up(groups(*mask), count, middles) for mask in masks]).astype(np.int32)


def fill_up(
  groups: Sequence[np.ndarray], count: int, places: Callable[[int, int], np.ndarray]
) -> np.ndarray:
  """`count` entries: whole groups in turn, and of the last that is needed a part.

  Args:
    groups: int [entries] each.
    count: at most the number of entries.
    places: (length, n) -> n places in 0 ... length - 1.
  """
  chosen = []
  for group in groups:
    taken = min(len(group), count - sum(map(len, chosen)))
    chosen.append(group[places(len(group), taken).astype(int)])
  return np.concatenate(chosen)


class _Recorder(nnx.Module):
  """Attention that notes its operands."""

  def __init__(self, record: Callable[[dict[str, Array]], None]):
    self.record = record

  def __call__(self, query: Array, key: Array, value: Array, **options) -> Array:
    self.record(attention_operands(query, key, value, **options))
    return attention(query, key, value, **options)


@functools.partial(jax.jit, static_argnums=0)
def _real_operands(graphdef, state, x, context):
  def of_rows(rows):
    block, found = nnx.merge(graphdef, state), {}
    replace_module(block, PATH, _Recorder(found.update))
    block(*rows)
    mask = token_mask(*rows)[:, None]
    return {name: value * mask for name, value in found.items()}

  operands = jax.lax.map(of_rows, calibration.passes(x, context))
  return {name: value.reshape(-1, *value.shape[2:]) for name, value in operands.items()}
