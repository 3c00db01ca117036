import importlib.util

import jax
import pytest

from common import cli
from common.compilation.compile_only import compile_step
from common.compilation.topology import tpu_slice
from common.models.llama_sizes import LLAMA_SIZES
from common.models.sharding import batch_sharding
from projects.awq import config as awq_config
from projects.awq.compile_steps import compile_steps, tensor_parallelism


@pytest.fixture(autouse=True)
def tpu_compiler():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  cli.prepare_jax(compile_only=True)


@pytest.mark.parametrize(
  "name, group_size, devices, expected",
  [
    ("meta-llama/Llama-2-7b-hf", 128, 16, 2),  # 86 groups of down_proj.
    ("meta-llama/Llama-2-7b-hf", 64, 16, 4),
    ("meta-llama/Llama-2-70b-hf", 128, 16, 8),
    ("meta-llama/Llama-2-70b-hf", 128, 4, 4),
    ("meta-llama/Llama-2-70b-hf", -1, 16, 1),
  ],
)
def test_tensor_parallelism_cuts_whole_groups(name, group_size, devices, expected):
  assert tensor_parallelism(LLAMA_SIZES[name], group_size, devices) == expected


def test_paper_steps_are_abstract_and_placed():
  config = awq_config.get_config("paper")
  config.model = "meta-llama/Llama-2-70b-hf"
  steps = compile_steps(config, tpu_slice("v5p:2x2x4").devices)
  searches = [step.name.split(",")[0] for step in steps]
  assert searches == [
    "scale search of q_proj + k_proj + v_proj",
    "scale search of gate_proj + up_proj",
    "scale search of down_proj",
    "clip search of down_proj",
    "GPTQ of down_proj",
    "score",
    "decode",
  ]
  for step in steps:
    leaves = jax.tree.leaves(step.arguments)
    assert all(isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None for x in leaves)
  samples = steps[0].arguments[1]
  assert samples.shape == (128, 512, 8192)
  assert samples.sharding == batch_sharding(samples.sharding.mesh)


def test_tiny_steps_fit():
  config = awq_config.get_config("tiny")
  tpu = tpu_slice("v5e:2x2")
  steps = compile_steps(config, tpu.devices)
  chosen = [step for step in steps if not step.name.startswith(("GPTQ", "scale search of o_proj"))]
  for step in chosen:
    compiled = compile_step(step)
    assert compiled.fits(tpu.chip), step.name
    assert compiled.cost.flops > 0 and compiled.cost.unknown_loops == 0, step.name
