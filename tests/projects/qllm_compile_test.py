import importlib.util

import jax
import pytest

from common import cli
from common.compilation.topology import tpu_slice
from projects.qllm import config as qllm_config
from projects.qllm.compile_steps import compile_steps


def test_paper_steps_are_abstract_and_placed():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  cli.prepare_jax(compile_only=True)
  steps = compile_steps(qllm_config.get_config("paper"), tpu_slice("v5e:2x2").devices)
  assert [step.name.split(",")[0] for step in steps] == [
    "threshold search of q_proj + k_proj + v_proj",
    "threshold search of gate_proj + up_proj",
    "threshold search of down_proj",
    "tune 4 blocks",
    "score",
  ]
  for step in steps:
    leaves = jax.tree.leaves(step.arguments)
    assert all(isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None for x in leaves)
  assert steps[3].arguments[1].shape == (128, 2048, 4096)
