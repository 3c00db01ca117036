"""FlatQuant at the config's size, compiled for a TPU slice: does it fit, what does it cost?

Learning holds one block: its samples are spread over the slice, and so are the output channels of
its kernels. The packed model is evaluated and decodes with rows spread over `data` and weights cut
over `tensor`; the online matrices are whole on every device.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.compilation.decoder_steps import decode_step, decoder_config, scoring_step
from common.compilation.step import Step
from common.models.decoder import Block, DecoderConfig, make_context
from common.models.scan import abstract_stack
from common.models.sharding import PARAMETERS, batch_sharding, place, shardings
from common.quantization.calibration import rtn_block
from common.quantization.online_transforms import integer_transformed_linears
from common.quantization.reconstruction import Learned, ReconstructionSettings, reconstruct
from common.training.mesh import AXES, make_mesh
from projects.flatquant.flat_block import FlatBlock, FlatQuantSettings
from projects.flatquant.flatquant import make_optimizer, normalized_error
from projects.flatquant.methods import settings_of

# Rows of the packed model's steps, if the slice has no more; slots of its cache.
ROWS, CACHE_LENGTH = 8, 4096

# The packed block's modules have other names than the plain one's, and online matrices.
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TABLE = (
  PARAMETERS
  | {f"{name}.layer.kernel": PARAMETERS[f"{name}.kernel"] for name in _LINEARS}
  | {f"{name}.clip": (None,) for name in _LINEARS}
  | {
    "transform.left": (None, None),
    "transform.right": (None, None),
    "attend.head_transform": (None, None),
    "attend.key_transform": (None, None, None),
  }
)


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """All optimizer steps of one block, and the packed model's two uses."""
  model = decoder_config(config.model)
  settings = settings_of(config, (*config.natural_settings, *config.outlier_settings)[0])
  tensor = next(n for n in (8, 4, 2, 1) if len(devices) % n == model.num_kv_heads % n == 0)
  mesh = make_mesh({"data": -1, "tensor": tensor}, devices)
  scanned, params = abstract_stack(
    model, jnp.bfloat16, edit_block=lambda block: packed_block(model, block, settings)
  )
  params_at = shardings(params, mesh, table=TABLE)
  data = mesh.shape["data"]
  rows = -(-ROWS // data) * data
  length = min(CACHE_LENGTH, model.max_position_embeddings)
  evaluated = min(config.eval_length, length)
  return [
    learning_step(config, model, settings, make_mesh({"data": -1}, devices)),
    scoring_step(scanned, params, mesh, batch_size=data, seq_len=evaluated, params_at=params_at),
    decode_step(scanned, params, mesh, batch_size=rows, max_length=length, params_at=params_at),
  ]


def abstract_flat_block(model: DecoderConfig, block: Block, settings: FlatQuantSettings):
  """A `FlatBlock` of any size, to be made under `eval_shape`."""
  widths = {"P_a": model.hidden_size, "P_ug": model.hidden_size, "P_d": model.intermediate_size}
  scales = {site: jnp.ones(n) for site, n in widths.items()}
  return FlatBlock(block, settings, scales, jax.random.key(0))


def packed_block(model: DecoderConfig, block: Block, settings: FlatQuantSettings) -> Block:
  """What `pack` returns, without its detour over float64, in integer products if it has them."""
  flat = abstract_flat_block(model, block, settings)
  folded = flat.fold()
  folded = folded if settings.weights is None else rtn_block(folded, settings.weights)
  flat.quantize_inputs(folded)
  integer_transformed_linears(folded)
  return folded


def learning_step(
  config: ConfigDict, model: DecoderConfig, settings: FlatQuantSettings, mesh: Mesh
) -> Step:
  """`reconstruct` as `learn_block` calls it."""
  make = lambda: abstract_flat_block(model, Block(model, nnx.Rngs(0)), settings)
  graphdef, state = nnx.split(nnx.eval_shape(make))
  batch_size = -(-config.batch_size // mesh.size) * mesh.size
  samples = -(-config.calibration_samples // batch_size) * batch_size
  length = config.calibration_length
  num_steps = config.epochs * samples // batch_size
  reconstruction = ReconstructionSettings(
    num_steps, batch_size, keep_best=False, sample_memory=config.sample_memory
  )
  optimizer = make_optimizer(config.learning_rate, num_steps)
  positions = jnp.zeros((1, length), jnp.int32)
  context = jax.eval_shape(lambda p: make_context(model, p, jnp.ones_like(p))[0], positions)
  key = jax.eval_shape(lambda: jax.random.key(0))
  everywhere = lambda tree: jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)
  where = batch_sharding(mesh).with_memory_kind(config.sample_memory)
  features = jax.ShapeDtypeStruct((samples, length, model.hidden_size), jnp.float32, sharding=where)

  def step(state, inputs, targets, context, key):
    learned, log = reconstruct(
      nnx.merge(graphdef, state),
      inputs,
      targets,
      context,
      key,
      reconstruction,
      optimizer,
      objective=normalized_error,
    )
    return nnx.state(learned, Learned), log

  arguments = (
    place(state, jax.tree.map_with_path(lambda path, x: kernel_sharding(path, x, mesh), state)),
    features,
    features,
    place(context, everywhere(context)),
    place(key, everywhere(key)),
  )
  name = f"learn a block, {num_steps} steps of {batch_size} x {length} tokens"
  return Step(name, step, arguments)


def kernel_sharding(path, leaf, mesh: Mesh) -> NamedSharding:
  """Output channels of the frozen kernels cut over all devices, everything else whole."""
  cut = "kernel" in jax.tree_util.keystr(path) and leaf.shape[-1] % mesh.size == 0
  return NamedSharding(mesh, PartitionSpec(None, AXES) if cut else PartitionSpec())
