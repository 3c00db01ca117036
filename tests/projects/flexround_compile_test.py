import importlib.util

import jax
import pytest

from common import cli
from common.compilation.topology import tpu_slice
from common.models.sharding import batch_sharding
from projects.flexround import config as flexround_config
from projects.flexround.compile_steps import compile_steps


def test_paper_steps_are_abstract_and_placed():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  cli.prepare_jax(compile_only=True)
  steps = compile_steps(flexround_config.get_config("paper"), tpu_slice("v5e:2x2").devices)
  assert [step.name.split(",")[0] for step in steps] == [
    "reconstruct a block",
    "scale search of down_proj",
    "score",
  ]
  for step in steps:
    leaves = jax.tree.leaves(step.arguments)
    assert all(isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None for x in leaves)
  samples = steps[0].arguments[1]
  assert samples.shape == (512, 1024, 4096)
  assert samples.sharding == batch_sharding(samples.sharding.mesh)


def test_the_step_on_images_is_abstract_and_placed():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  cli.prepare_jax(compile_only=True)
  [step] = compile_steps(flexround_config.get_config("vision"), tpu_slice("v5e:2x2").devices)
  assert step.name == "reconstruct a block of ResNet-50, 20000 steps, 1024 images"
  leaves = jax.tree.leaves(step.arguments)
  assert all(isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None for x in leaves)
  samples = step.arguments[1]
  assert samples.shape == (1024, 56, 56, 256)
  assert samples.sharding == batch_sharding(samples.sharding.mesh)
