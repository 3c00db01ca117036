import importlib.util

import jax
import pytest

from common import cli
from common.compilation.topology import tpu_slice
from projects.gad import config as gad_config
from projects.gad.compile_steps import compile_steps


def test_paper_steps_are_abstract_and_placed():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  cli.prepare_jax(compile_only=True)
  steps = compile_steps(gad_config.get_config("paper"), tpu_slice("v5e:2x2").devices)
  assert [step.name.split()[0] for step in steps] == ["decode,", "choose"]
  for step in steps:
    leaves = jax.tree.leaves(step.arguments)
    assert all(isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None for x in leaves)
  masks = steps[1].arguments[1]
  assert masks.shape == (36, 4000)
