import importlib.util

import jax
import pytest

from common import cli
from common.compilation.topology import tpu_slice
from projects.flatquant import config as flatquant_config
from projects.flatquant.compile_steps import compile_steps


@pytest.fixture(autouse=True)
def tpu_compiler():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  cli.prepare_jax(compile_only=True)


def test_paper_steps_are_abstract_and_placed():
  config = flatquant_config.get_config("paper")
  steps = compile_steps(config, tpu_slice("v5e:2x2").devices)
  assert [step.name for step in steps] == [
    "learn a block, 480 steps of 4 x 2048 tokens",
    "score, 1 x 2048 tokens",
    "decode, 8 x 1 tokens, cache 4096",
  ]
  for step in steps:
    leaves = jax.tree.leaves(step.arguments)
    assert all(isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None for x in leaves)
  assert steps[0].arguments[1].shape == (128, 2048, 4096)
