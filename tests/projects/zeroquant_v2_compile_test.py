import importlib.util

import jax
import pytest

from common import cli
from common.compilation.topology import tpu_slice
from projects.zeroquant_v2 import config as zeroquant_config
from projects.zeroquant_v2.compile_steps import OPT_SIZES, compile_steps


@pytest.fixture(autouse=True)
def tpu_compiler():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  cli.prepare_jax(compile_only=True)


@pytest.mark.parametrize("preset", ["tiny", "paper"])
def test_steps_are_abstract_and_placed(preset):
  steps = compile_steps(zeroquant_config.get_config(preset), tpu_slice("v5e:2x2").devices)
  assert [step.name.split()[0] for step in steps] == ["ZQ-Global", "GPTQ", "score,"]
  for step in steps:
    leaves = jax.tree.leaves(step.arguments)
    assert all(isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None for x in leaves)
  features = steps[0].arguments[1]
  expected = {"tiny": (4, 64, 64), "paper": (128, 2048, 4096)}
  assert features.shape == expected[preset]
  loss, count = jax.eval_shape(steps[2].function, *steps[2].arguments)
  assert loss.shape == count.shape == ()


def test_public_sizes():
  """The decoders' blocks and embeddings hold the billions of weights that their names say."""
  for name, billions in (("facebook/opt-6.7b", 6.7), ("facebook/opt-13b", 13)):
    model = OPT_SIZES[name]
    block = 4 * model.hidden_size**2 + 2 * model.hidden_size * model.intermediate_size
    total = model.num_layers * block + model.vocab_size * model.hidden_size
    assert total == pytest.approx(billions * 1e9, rel=0.03)
