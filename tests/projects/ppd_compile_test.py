"""The hardware-aware size from a TPU's static bound, without a TPU."""

import importlib.util

import jax
import numpy as np
import pytest

from common import cli
from common.compilation.topology import tpu_slice
from projects.ppd import config as ppd_config
from projects.ppd.compile_steps import bounded_seconds, compile_steps, size_of
from projects.ppd.sparse_tree import best_size

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@pytest.fixture(scope="module", autouse=True)
def compiler():
  cli.prepare_jax(compile_only=True)


def test_a_bound_is_the_weights_and_then_the_arithmetic():
  """Of 7B on a v5e: 819 GB/s and 197 TFLOP/s."""
  size = size_of("lmsys/vicuna-7b-v1.3")
  weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
  cache = 32 * 2 * 1536 * 4096
  few, many = bounded_seconds(size, "v5e:1x1", (16, 512), context=1536)
  # Beside weights and cache there are 16 inputs, their mask and their positions.
  np.testing.assert_allclose(few, 2 * (weights + cache) / 819e9, rtol=0.02)
  # Beside the weights' products there is attention to 1,536 + 512 tokens.
  attention = 32 * 4 * 512 * 2048 * 4096
  np.testing.assert_allclose(many, (2 * weights * 512 + attention) / 197e12, rtol=0.05)
  # Where a pass is bound by memory a larger tree is free; where by arithmetic, it is not.
  tau = {16: 1.8, 64: 1.9, 512: 2.0}.get
  assert best_size([16, 512], tau, [few, many]) == 16
  assert best_size([16, 64], tau, [few, few]) == 64


def test_paper_steps_are_abstract_and_placed():
  config = ppd_config.get_config("paper")
  steps = compile_steps(config, tpu_slice("v5e:2x2").devices)
  assert len(steps) == 1 + (1 + len(config.sizes)) + 2
  for step in steps:
    leaves = jax.tree.leaves(step.arguments)
    assert all(isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None for x in leaves)
