"""QLLM at the config's size, compiled for a TPU slice: does it fit, what does it cost?

The searches run one block at a time, columns and heads spread over the slice. A round of blocks is
tuned on calibration samples that are spread over the slice, its weights too, both in bfloat16. The
packed model is evaluated with its weights cut over `tensor`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.compilation.decoder_steps import decoder_config, scoring_step
from common.compilation.step import Step
from common.models.decoder import Block, DecoderConfig, make_context
from common.models.scan import abstract_stack
from common.models.sharding import PARAMETERS, place, shardings
from common.quantization.equivalent import ScalingGroup
from common.quantization.reassembly import Reassembly
from common.quantization.reconstruction import Learned
from common.training.mesh import AXES, make_mesh
from projects.qllm.error_correction import BlockGroup, merge_correction
from projects.qllm.methods import settings_of
from projects.qllm.qllm import assemble_student, tune
from projects.qllm.settings import Settings
from projects.qllm.sites import SiteReassembly, search_site, sites

# Packed linears lie below what rounds their inputs, down_proj below what reassembles its channels too.
LINEARS = {name: axes for name, axes in PARAMETERS.items() if name.endswith("_proj.kernel")}
PACKED = (
  PARAMETERS
  | {name.replace(".kernel", ".layer.kernel"): axes for name, axes in LINEARS.items()}
  | {"down_proj.layers.1.layer.kernel": LINEARS["down_proj.kernel"]}
)


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """The search at every site, the joint tuning of a round, and scoring with the packed model."""
  model, settings = decoder_config(config.model), settings_of(config, config.settings[0])
  tensor = next(n for n in (8, 4, 2, 1) if len(devices) % n == model.num_kv_heads % n == 0)
  mesh = make_mesh({"data": -1, "tensor": tensor}, devices)
  scanned, params = abstract_stack(
    model,
    jnp.bfloat16,
    edit_block=lambda block: merge_correction(reassembled(block, model, settings)),
  )
  return [
    *[search_step(config, model, settings, site, mesh) for site in sites(model)],
    tuning_step(config, model, settings, make_mesh({"data": -1}, devices)),
    scoring_step(
      scanned,
      params,
      mesh,
      batch_size=mesh.shape["data"],
      seq_len=config.eval_length,
      params_at=shardings(params, mesh, table=PACKED),
    ),
  ]


def reassembled(block: Block, model: DecoderConfig, settings: Settings) -> Block:
  """A student whose channels are reassembled at every site; only its shapes mean something."""
  found = {}
  for site in sites(model):
    width = model.hidden_size if site.previous.endswith("norm") else model.intermediate_size
    merges = jnp.zeros(settings.max_extra(width), jnp.int32)
    channels, ones = jnp.arange(width), jnp.ones(width)
    reassembly = Reassembly(merges, merges, channels, ones, ones)
    found[site.previous] = SiteReassembly(reassembly, ones[0], merges[0], ones[0], None)
  return assemble_student(block, found, model, settings, jax.random.key(0))


def search_step(
  config: ConfigDict, model: DecoderConfig, settings: Settings, site: ScalingGroup, mesh: Mesh
) -> Step:
  """The threshold search of one site, all candidates."""
  owner = site.linears[0].split(".")[0]
  graphdef, state = nnx.split(nnx.eval_shape(lambda: getattr(Block(model, nnx.Rngs(0)), owner)))
  everywhere = NamedSharding(mesh, PartitionSpec())
  rows, length = settings.search_samples, config.calibration_length
  context = one_row_context(model, length)
  width = model.hidden_size if site.previous.endswith("norm") else model.intermediate_size
  arguments = (
    place(state, shardings(state, mesh)),
    jax.ShapeDtypeStruct((rows, length, width), jnp.float32, sharding=everywhere),
    place(context, jax.tree.map(lambda _: everywhere, context)),
    jax.ShapeDtypeStruct((width,), jnp.float32, sharding=everywhere),
  )

  def search(state, x, context, largest):
    static = site, settings.max_extra(width), settings.score
    formats = settings.weights, settings.activations
    return search_site(graphdef, state, x, context, largest, *static, *formats)

  names = " + ".join(path.rpartition(".")[2] for path in site.linears)
  return Step(f"threshold search of {names}, {rows} x {length} tokens", search, arguments)


def tuning_step(config: ConfigDict, model: DecoderConfig, settings: Settings, mesh: Mesh) -> Step:
  """All optimizer steps of one round of blocks."""
  tuning = settings.tuning

  def make_round() -> BlockGroup:
    block = Block(model, nnx.Rngs(0))
    nnx.update(block, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(block)))
    return BlockGroup([reassembled(block, model, settings)] * tuning.blocks_per_round)

  graphdef, state = nnx.split(nnx.eval_shape(make_round))
  samples = -(-config.calibration_samples // mesh.size) * mesh.size
  length = config.calibration_length
  context = one_row_context(model, length)
  everywhere = lambda tree: jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)
  # Batches are of single samples: these are cut along the sequence.
  cut = NamedSharding(mesh, PartitionSpec(None, AXES), memory_kind=config.sample_memory)
  features = jax.ShapeDtypeStruct((samples, length, model.hidden_size), jnp.bfloat16, sharding=cut)
  key = jax.eval_shape(lambda: jax.random.key(0))

  def step(state, inputs, targets, context, key):
    student, log = tune(nnx.merge(graphdef, state), inputs, targets, context, key, tuning)
    return nnx.state(student, Learned), log

  arguments = (
    place(state, jax.tree.map(lambda leaf: columns_everywhere(leaf, mesh), state)),
    features,
    features,
    place(context, everywhere(context)),
    place(key, everywhere(key)),
  )
  name = f"tune {tuning.blocks_per_round} blocks, {tuning.steps(samples)} steps of {length} tokens"
  return Step(name, step, arguments)


def one_row_context(model: DecoderConfig, length: int):
  """The abstract `AttentionContext` of one row of tokens."""
  positions = jnp.zeros((1, length), jnp.int32)
  return jax.eval_shape(lambda p: make_context(model, p, jnp.ones_like(p))[0], positions)


def columns_everywhere(leaf, mesh: Mesh) -> NamedSharding:
  """Output channels, the last axis of every matrix, cut over all devices where they divide."""
  cut = leaf.ndim >= 3 and leaf.shape[-1] % mesh.size == 0
  return NamedSharding(mesh, PartitionSpec(*(None,) * (leaf.ndim - 1), AXES if cut else None))
