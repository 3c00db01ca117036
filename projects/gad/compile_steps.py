"""What a token costs at the config's size: the model's step, and the choice under masks and weights."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.compilation.decoder_steps import decode_step, decoder_config
from common.compilation.step import Step
from common.decoding.constrained import choose
from common.decoding.generation import Sampling
from common.models.scan import abstract_stack
from common.models.sharding import batch_sharding
from common.training.mesh import make_mesh

# The paper's tasks are the rows of one batch; their few-shot prompts are shorter.
ROWS, PROMPT_LENGTH = 36, 1536
# Tokens of a node of the trie that were sampled before.
WEIGHTED = 64


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """The model's tensors are cut over up to eight devices, rows over the others."""
  size = decoder_config(config.model)
  tensor = next(n for n in (8, 4, 2, 1) if len(devices) % n == 0 and size.num_kv_heads % n == 0)
  mesh = make_mesh({"data": -1, "tensor": tensor}, devices)
  rows = -(-ROWS // mesh.shape["data"]) * mesh.shape["data"]
  length = PROMPT_LENGTH + config.new_tokens
  scanned, params = abstract_stack(size, jnp.bfloat16)
  decode = decode_step(scanned, params, mesh, batch_size=rows, max_length=length)
  spread = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
  everywhere = NamedSharding(mesh, PartitionSpec())
  key = jax.eval_shape(lambda: jax.random.key(0))
  arguments = (
    spread((rows, size.vocab_size), jnp.float32),
    spread((rows, -(-size.vocab_size // 8)), jnp.uint8),
    spread((rows, WEIGHTED), jnp.int32),
    spread((rows, WEIGHTED), jnp.float32),
    jax.ShapeDtypeStruct((), key.dtype, sharding=everywhere),
    jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
  )
  sampling = Sampling(config.temperature)
  choice = jax.jit(lambda *arrays: choose(*arrays, sampling))
  return [decode, Step(f"choose a token, {rows} x {size.vocab_size}", choice, arguments)]
