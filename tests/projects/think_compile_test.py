import importlib.util

import jax
import pytest

from common import cli
from common.compilation.topology import tpu_slice
from projects.think import config as think_config
from projects.think.compile_steps import compile_steps


def test_paper_steps_are_abstract_and_placed():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  cli.prepare_jax(compile_only=True)
  steps = compile_steps(think_config.get_config("paper"), tpu_slice("v5e:2x2").devices)
  names = ["prefill and prune", "decode"]
  assert all(step.name.startswith(name) for step, name in zip(steps, names, strict=True))
  for step in steps:
    leaves = jax.tree.leaves(step.arguments)
    assert all(isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None for x in leaves)
  cache = steps[1].arguments[-1]
  # 2048 tokens, 32 of them whole; 77 of 128 channels stay.
  assert cache.keys[0].shape == (4, 8, 2048 - 32, 77)
  assert cache.full_keys[0].shape == (4, 8, 32 + 512, 128)
