import dataclasses
import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from common import cli
from common.compilation.compile_only import compile_step
from common.compilation.step import Step
from common.compilation.topology import tpu_slice
from common.models.decoder import Block, make_context
from common.models.sharding import batch_sharding, place
from common.training.mesh import make_mesh
from projects.outlier_suppression_plus import config as osp_config
from projects.outlier_suppression_plus.compile_steps import compile_steps
from projects.outlier_suppression_plus.observation import stage_inputs
from tests.common.models.small_decoders import ARCHITECTURES


@pytest.fixture(autouse=True)
def tpu_compiler():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  cli.prepare_jax(compile_only=True)


def test_paper_steps_are_abstract_and_placed():
  steps = compile_steps(osp_config.get_config("paper"), tpu_slice("v5e:2x2").devices)
  assert [step.name.split(",")[0] for step in steps] == [
    "scale search of q_proj + k_proj + v_proj",
    "scale search of gate_proj + up_proj",
    "scale search of down_proj",
    "score",
  ]
  for step in steps:
    leaves = jax.tree.leaves(step.arguments)
    assert all(isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None for x in leaves)
  assert steps[0].arguments[1].shape == (1, 2048, 4096)


def test_a_tiny_search_fits():
  tpu = tpu_slice("v5e:2x2")
  step = compile_steps(osp_config.get_config("tiny"), tpu.devices)[0]
  compiled = compile_step(step)
  assert compiled.fits(tpu.chip) and compiled.cost.flops > 0


def test_of_samples_in_host_memory_one_is_copied_at_a_time():
  config = dataclasses.replace(
    ARCHITECTURES["llama"], hidden_size=128, intermediate_size=256, num_layers=1
  )
  graphdef, state = nnx.split(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))))
  positions = jnp.zeros((1, 16), jnp.int32)
  context = jax.eval_shape(lambda p: make_context(config, p, jnp.ones_like(p))[0], positions)
  mesh = make_mesh({"data": -1}, tpu_slice("v5e:1x1").devices)
  where = batch_sharding(mesh).with_memory_kind("pinned_host")
  x = jax.ShapeDtypeStruct((1024, 16, 128), jnp.float32, sharding=where)
  everywhere = NamedSharding(mesh, PartitionSpec())
  put = lambda tree: place(tree, jax.tree.map(lambda _: everywhere, tree))

  def memory(all_tokens):
    record = lambda *arguments: stage_inputs(graphdef, *arguments, "mlp.down_proj", 1, all_tokens)
    return compile_step(Step("record", record, (put(state), x, put(context)))).memory.total

  # Two of sixteen values of each channel of a sample, or all.
  inputs = 2 * math.prod(x.shape) * x.dtype.itemsize
  assert memory(False) < 0.5 * inputs < inputs < memory(True)
