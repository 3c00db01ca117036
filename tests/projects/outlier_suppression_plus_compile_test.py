import importlib.util

import jax
import pytest

from common import cli
from common.compilation.compile_only import compile_step
from common.compilation.topology import tpu_slice
from projects.outlier_suppression_plus import config as osp_config
from projects.outlier_suppression_plus.compile_steps import compile_steps


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
