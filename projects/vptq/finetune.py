"""Fine-tuning of centroids, the channels' scale and bias, and norms (section 4 of the paper).

Layer-wise: a quantized block learns to give the outputs of the full-precision one. End to end: the
whole model learns the full-precision model's next-token distributions. Indices stay.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from common.models.decoder import AttentionContext, Block, Decoder
from common.quantization.calibration import run_block
from common.quantization.vector_quantized import PackedIndices

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Finetuning:
  """How long and how fast: Adam with a constant learning rate, `batch_size` samples per step."""

  steps: int
  learning_rate: float
  batch_size: int


def finetune_block(
  quantized: Block,
  block: Block,
  x: Array,
  context: AttentionContext,
  key: Array,
  settings: Finetuning,
) -> tuple[Block, Array]:
  """The quantized block trained to the outputs of the full-precision one on the same inputs.

  Args:
    quantized: not modified; its linears are `VectorQuantizedLinear`.
    block: in full precision.
    x: inputs, [samples, seq, dim].
    context: of one row; it serves every sample.
    key: of the batches.
    settings: see there.

  Returns:
    (the trained block, mean squared error of every step before its update [steps]).
  """
  data = x, run_block(block, x, context)
  return _train(quantized, data, context, key, _block_loss, settings)


def finetune_model(
  quantized: Decoder,
  model: Decoder,
  tokens: Array,
  key: Array,
  settings: Finetuning,
) -> tuple[Decoder, Array]:
  """The quantized model trained to the next-token distributions of the full-precision one.

  Args:
    tokens: int32 [samples, seq]; the others as in `finetune_block`.

  Returns:
    (the trained model, KL divergence in nats per token of every step before its update [steps]).
  """
  teacher = nnx.split(model)
  return _train(quantized, (tokens,), teacher, key, _model_loss, settings)


def _block_loss(block: Block, batch, context: AttentionContext) -> Array:
  x, target = batch
  return jnp.mean((block(x, context)[0] - target) ** 2)


def _model_loss(model: Decoder, batch, teacher) -> Array:
  (tokens,) = batch
  target = jax.nn.log_softmax(nnx.merge(*teacher)(tokens)[0])
  log_probs = jax.nn.log_softmax(model(tokens)[0])
  return optax.losses.kl_divergence_with_log_targets(log_probs, target).mean()


def _train(module, data, context, key, loss, settings: Finetuning):
  """Adam on float32 masters; the module comes back in the dtypes that it is stored in."""
  # Embeddings and the head are the full-precision model's, and stay so.
  outer = lambda path, _: "embed_tokens" in path or "embed_positions" in path or "lm_head" in path
  graphdef, fixed, params = nnx.split(module, nnx.Any(PackedIndices, outer), nnx.Param)
  batch_size = min(settings.batch_size, len(data[0]))
  batches = jax.random.randint(key, (settings.steps, batch_size), 0, len(data[0]))
  params, losses = _adam(
    graphdef, loss, fixed, params, data, context, batches, settings.learning_rate
  )
  return nnx.merge(graphdef, fixed, params), losses


@functools.partial(jax.jit, static_argnums=(0, 1))
def _adam(graphdef, loss, fixed, params, data, context, batches, learning_rate):
  optimizer = optax.adam(learning_rate)
  masters = jax.tree.map(lambda p: p.astype(jnp.float32), params)

  def step(carry, batch):
    masters, state = carry
    rows = jax.tree.map(lambda a: a[batch], data)
    objective = lambda masters: loss(nnx.merge(graphdef, fixed, masters), rows, context)
    value, gradients = jax.value_and_grad(objective)(masters)
    updates, state = optimizer.update(gradients, state)
    return (optax.apply_updates(masters, updates), state), value

  (masters, _), losses = jax.lax.scan(step, (masters, optimizer.init(masters)), batches)
  return jax.tree.map(lambda m, p: m.astype(p.dtype), masters, params), losses
