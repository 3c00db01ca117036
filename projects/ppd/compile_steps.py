"""PPD at the config's size: training of the prompt tokens, and tree passes of several sizes.

`bounded_seconds` is L(N) of the passes on a TPU slice as a static bound: what the hardware-aware rule
needs of a device that is not at hand.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.compilation.compile_only import compile_step
from common.compilation.decoder_steps import decode_step, decoder_config
from common.compilation.step import Step
from common.compilation.topology import Chip, tpu_slice
from common.models.decoder import Block, DecoderConfig, make_context
from common.models.scan import abstract_stack
from common.models.sharding import place, shardings
from common.training.mesh import make_mesh
from projects.ppd.ppd import distillation_loss

# Vicuna-7B has Llama's sizes; nothing of it is needed to compile.
_SIZES = {"lmsys/vicuna-7b-v1.3": "meta-llama/Llama-2-7b-hf"}


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """The prefill, a block over a tree of every size, and the gradient of the prompt tokens' loss."""
  model = size_of(config.model)
  mesh = _mesh(model, devices)
  rows, length = mesh.shape["data"], config.prompt_length + config.new_tokens
  scanned, params = abstract_stack(model, jnp.bfloat16)
  prompts = config.distances * config.ensemble
  return [
    decode_step(
      scanned, params, mesh, batch_size=rows, max_length=length, new_tokens=config.prompt_length
    ),
    *(block_step(model, mesh, rows, n, length) for n in (1, *config.sizes)),
    training_block_step(model, mesh, config.texts_per_step, prompts, config.text_length),
    loss_step(model, mesh, config.texts_per_step, config.distances),
  ]


def size_of(name: str) -> DecoderConfig:
  """The sizes of a model, by a public name or of a directory. Raises UserError."""
  return decoder_config(_SIZES.get(name, name))


def _mesh(model: DecoderConfig, devices: Sequence[jax.Device]) -> Mesh:
  """The model's tensors are cut over up to eight devices, rows over the others."""
  tensor = next(n for n in (8, 4, 2, 1) if len(devices) % n == 0 and model.num_kv_heads % n == 0)
  return make_mesh({"data": -1, "tensor": tensor}, devices)


def bounded_seconds(
  model: DecoderConfig, topology: str, sizes: Sequence[int], *, context: int
) -> list[float]:
  """L(N) of every size at least: passes compiled for a TPU slice, at its peak rates.

  Of one row for each group of devices that the tensors are cut over; communication is not in it.

  Args:
    model: its sizes; weights and cache are bfloat16.
    topology: such as "v5e:1x1".
    sizes: N.
    context: tokens in the cache.

  Raises:
    UserError: see `tpu_slice`.
  """
  tpu = tpu_slice(topology)
  mesh = _mesh(model, tpu.devices)
  rows = mesh.shape["data"]
  return [
    model.num_layers * _bound(block_step(model, mesh, rows, n, context), tpu.chip)
    + _bound(head_step(model, mesh, rows, n), tpu.chip)
    for n in sizes
  ]


def _bound(step: Step, chip: Chip) -> float:
  """Seconds, by arithmetic or by memory.

  Weights that the compiler fetches ahead into on-chip memory are not in the traffic of the operations
  that use them; but every argument is read once.
  """
  compiled = compile_step(step)
  arithmetic, traffic = compiled.seconds(chip)
  return max(arithmetic, traffic, compiled.memory.arguments / chip.bytes_per_second)


def head_step(model: DecoderConfig, mesh: Mesh, rows: int, inputs: int) -> Step:
  """The best token behind every input of a tree."""
  placed = lambda spec, *shape: jax.ShapeDtypeStruct(
    shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)
  )
  function = lambda x, kernel: jnp.argmax(x @ kernel, axis=-1)
  arguments = (
    placed(PartitionSpec(), rows, inputs, model.hidden_size),
    placed(PartitionSpec(None, "tensor"), model.hidden_size, model.vocab_size),
  )
  return Step(f"head, {rows} x {inputs} inputs", function, arguments)


def _block(model: DecoderConfig, mesh: Mesh, rows: int, inputs: int, length: int):
  """run(state, x, ids, keys, offset, mask, kv) of a block over a cache, and its arguments."""
  graphdef, state = nnx.split(nnx.eval_shape(lambda: Block(model, rngs=nnx.Rngs(0))))
  state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), state)
  everywhere = NamedSharding(mesh, PartitionSpec())
  shaped = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)
  kv = jax.ShapeDtypeStruct(
    (rows, model.num_kv_heads, length, model.head_dim),
    jnp.bfloat16,
    sharding=NamedSharding(mesh, PartitionSpec(None, "tensor")),
  )

  def run(state, x, positions, keys, offset, mask, kv):
    context, _ = make_context(model, positions, jnp.ones_like(positions))
    tokens = context.keys._replace(positions=keys, segment_ids=jnp.ones_like(keys))
    context = context._replace(keys=tokens, offset=offset, mask=mask)
    return nnx.merge(graphdef, state)(x, context, kv)

  arguments = (
    place(state, shardings(state, mesh)),
    shaped(rows, inputs, model.hidden_size, dtype=jnp.bfloat16),
    shaped(rows, inputs),
    shaped(rows, length),
    shaped(rows),
    shaped(rows, 1, inputs, length, dtype=jnp.bool_),
    (kv, kv),
  )
  return run, arguments


def block_step(model: DecoderConfig, mesh: Mesh, rows: int, inputs: int, length: int) -> Step:
  """A tree of `inputs` tokens in every row against a cache of full length."""
  run, arguments = _block(model, mesh, rows, inputs, length + inputs)
  name = f"tree pass, {rows} x {inputs} inputs, a block of the model, cache {length}"
  return Step(name, jax.jit(run, donate_argnums=6), arguments)


def training_block_step(
  model: DecoderConfig, mesh: Mesh, rows: int, prompts: int, length: int
) -> Step:
  """Forward and backward of a block over the prompt tokens; its weights are frozen."""
  run, arguments = _block(model, mesh, rows, prompts, length + prompts)

  def backward(state, x, *rest_and_cotangent):
    *rest, cotangent = rest_and_cotangent
    _, pull = jax.vjp(lambda x: run(state, x, *rest)[0], x)
    return pull(cotangent)

  name = f"train, {rows} x {prompts} prompt tokens behind {length}, a block of the model"
  return Step(name, backward, (*arguments, arguments[1]))


def loss_step(model: DecoderConfig, mesh: Mesh, rows: int, distances: int) -> Step:
  """The loss on the logits of all prompt tokens, and its gradient."""
  everywhere = NamedSharding(mesh, PartitionSpec())
  shape = (rows, distances, model.vocab_size)
  logits = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=everywhere)
  loss = lambda logits, labels: distillation_loss(labels, logits).mean()
  name = f"distillation loss, {rows} x {distances} prompt tokens"
  return Step(name, jax.value_and_grad(loss), (logits, logits))
