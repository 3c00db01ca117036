import importlib.util

import jax
import pytest

from common import cli
from common.compilation.topology import tpu_slice
from common.models.llama_sizes import LLAMA_SIZES
from projects.adadim import config as adadim_config
from projects.adadim.compile_steps import compile_steps, tensor_parallelism


@pytest.fixture(autouse=True)
def tpu_compiler():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  cli.prepare_jax(compile_only=True)


@pytest.mark.parametrize(
  "name, group_size, devices, expected",
  [
    ("meta-llama/Llama-2-7b-hf", 128, 16, 2),  # 86 groups of 128 in 11008 channels.
    ("meta-llama/Llama-2-7b-hf", 64, 16, 4),
    ("meta-llama/Llama-2-70b-hf", 128, 16, 8),  # 8 groups in the 1024 outputs of k and v.
    ("meta-llama/Llama-2-70b-hf", 128, 4, 4),
  ],
)
def test_tensor_parallelism_cuts_whole_groups(name, group_size, devices, expected):
  assert tensor_parallelism(LLAMA_SIZES[name], group_size, devices) == expected


def test_paper_steps_are_abstract_and_placed():
  steps = compile_steps(adadim_config.get_config("paper"), tpu_slice("v5e:2x2").devices)
  assert [step.name.partition(" ")[0] for step in steps] == [
    "axis",
    "per-IC",
    "score,",
    "decode,",
  ]
  for step in steps:
    leaves = jax.tree.leaves(step.arguments)
    assert all(isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None for x in leaves)
  assert steps[0].arguments[1].shape == (256, 512, 4096)
  # Scales of either axis beside the codes.
  scales = {x.shape for x in jax.tree.leaves(steps[3].arguments[0])}
  assert {(32, 11008, 32), (32, 32, 11008)} <= scales
