"""Every method of `./run.sh quantize` on a small checkpoint, in this process."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from apps.quantization.methods import METHODS, WEIGHT_ONLY, Options, make_method
from common.checkpoints.huggingface import Checkpoint, load_decoder, save_model
from common.errors import UserError
from common.quantization.checkpoint import quantize_checkpoint
from tests.common.models.small_decoders import (
  ARCHITECTURES,
  logits,
  random_decoder,
  random_tokens,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = dataclasses.replace(ARCHITECTURES["llama"], num_layers=2)
OPTIONS = Options(group_size=16, steps=4, epochs=1, rank=2, vector_length=2)


@pytest.fixture(scope="module")
def model():
  return random_decoder(CONFIG)


@pytest.fixture(scope="module")
def source(model, tmp_path_factory):
  path = tmp_path_factory.mktemp("source") / "model"
  save_model(model, path)
  return Checkpoint(path)


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_of_the_method_loads(name, model, source, tmp_path):
  activation_bits = 16 if name in WEIGHT_ONLY else 8
  options = dataclasses.replace(OPTIONS, activation_bits=activation_bits)
  method = make_method(name, CONFIG, options)
  tokens = jnp.asarray(random_tokens(CONFIG, 8))
  layout = options.weights if method.plain else None
  blocks = []
  quantize_checkpoint(
    source,
    tmp_path / "out",
    tokens,
    method.quantize_block,
    settings={"method": name},
    format=layout,
    stream=method.stream,
    track=lambda stream: (blocks.append(block) or block for block in stream),
  )
  method.finish()
  loaded = load_decoder(tmp_path / "out")
  in_memory = load_decoder(source.path)
  in_memory.blocks = type(in_memory.blocks)(blocks)
  # The same blocks; AutoAWQ's layout has scales of 16 bits, as the options say.
  np.testing.assert_allclose(logits(loaded, tokens), logits(in_memory, tokens), atol=1e-5)
  error = np.abs(logits(loaded, tokens) - logits(model, tokens))
  assert 1e-3 < error.max()
  # Random weights have nothing that 4 bits would lose altogether.
  assert error.mean() < 0.5 * np.abs(logits(model, tokens)).mean()


def test_autoawq_s_layout_is_for_what_it_holds():
  plain = lambda name, family, **changes: (
    make_method(name, ARCHITECTURES[family], dataclasses.replace(OPTIONS, **changes)).plain
  )
  assert plain("awq", "llama") and plain("gptq", "opt") and plain("awq", "opt")
  # Fused q, k and v; a division in the activation; 6 bits; rounded inputs.
  assert not plain("gptq", "bloom") and not plain("awq", "neox")
  assert not plain("rtn", "llama", bits=6) and not plain("rtn", "llama", activation_bits=8)
  assert not plain("adadim", "llama")


@pytest.mark.parametrize(
  "name, changes, message",
  (
    ("nothing", {}, "method 'nothing' is not supported; supported: rtn, smoothquant"),
    ("gptq", {"activation_bits": 8}, "gptq quantizes weights only, got activation_bits=8"),
    ("vptq", {"vector_length": 5}, "vectors of 5 at 4 bits take indices of 20 bits"),
    ("llm_fp4", {}, "activation_bits=16 is not supported"),
    ("outlier_suppression_plus", {}, "activation_bits must be below 16"),
    ("qllm", {}, "activation_bits must be below 16"),
    ("rtn", {"activation_bits": 9}, "activations of 9 bits are not supported"),
  ),
)
def test_options_that_do_not_fit_are_refused(name, changes, message):
  with pytest.raises(UserError, match=message):
    make_method(name, CONFIG, dataclasses.replace(OPTIONS, **changes))
