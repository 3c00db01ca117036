import importlib.util

import jax
import pytest

from common import cli
from common.compilation.topology import tpu_slice
from projects.verbose_images import config
from projects.verbose_images.compile_steps import compile_steps


def test_paper_steps_are_abstract_and_placed():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  cli.prepare_jax(compile_only=True)
  steps = compile_steps(config.get_config("paper"), tpu_slice("v5e:2x2").devices)
  names = ["losses", "a block", "decode"]
  assert all(step.name.startswith(name) for step, name in zip(steps, names, strict=True))
  for step in steps:
    leaves = jax.tree.leaves(step.arguments)
    assert all(isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None for x in leaves)
  assert steps[0].arguments[0].shape == (1, 32, 2560)
