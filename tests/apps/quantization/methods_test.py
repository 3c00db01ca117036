"""Every method of `./run.sh quantize` on a small checkpoint, in this process."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apps.quantization.methods import METHODS, WEIGHT_ONLY, Options, make_method
from common.checkpoints.huggingface import Checkpoint, load_decoder, save_model
from common.errors import UserError
from common.quantization.activations import IntegerLinear, QuantizedInput, integer_linears
from common.quantization.checkpoint import quantize_checkpoint
from common.quantization.online_transforms import (
  TransformedIntegerLinear,
  integer_transformed_linears,
)
from projects.awq import search_result
from tests.common.models.small_decoders import (
  ARCHITECTURES,
  logits,
  random_decoder,
  random_tokens,
)

CONFIG = dataclasses.replace(ARCHITECTURES["llama"], num_layers=2)
OPTIONS = Options(group_size=16, steps=4, epochs=1, rank=2, vector_length=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  path = tmp_path_factory.mktemp("source") / "model"
  save_model(random_decoder(CONFIG), path)
  return Checkpoint(path)


def quantized(name, options, source, out, stop_at=None, sample_memory="device"):
  """Quantizes a checkpoint as the command does. Returns the blocks; raises Stop at one of them."""
  method = make_method(name, source.config, options)
  blocks = []

  def track(stream):
    for block in stream:
      if len(blocks) == stop_at:
        raise Stop
      blocks.append(block)
      yield block

  quantize_checkpoint(
    source,
    out,
    jnp.asarray(random_tokens(source.config, 8)),
    method.quantize_block,
    settings={"method": name},
    format=options.weights if method.plain else None,
    stream=method.stream,
    sample_memory=sample_memory,
    track=track,
  )
  method.finish()
  return blocks


class Stop(Exception):
  pass


def check_it_loads(name, options, source, out, **changes):
  """The checkpoint at `out` has the blocks that the method made, and they are near the original."""
  blocks = quantized(name, options, source, out, **changes)
  loaded, original = load_decoder(out), load_decoder(source.path)
  in_memory = nnx.clone(original)
  in_memory.blocks = type(in_memory.blocks)(blocks)
  tokens = jnp.asarray(random_tokens(source.config, 8))
  # The same blocks; AutoAWQ's layout has scales of 16 bits, as the options say.
  np.testing.assert_allclose(logits(loaded, tokens), logits(in_memory, tokens), atol=1e-5)
  error = np.abs(logits(loaded, tokens) - logits(original, tokens))
  assert 1e-3 < error.max()
  # Random weights have nothing that 4 bits would lose altogether.
  assert error.mean() < 0.5 * np.abs(logits(original, tokens)).mean()
  return loaded


def options_of(name, **changes):
  return dataclasses.replace(OPTIONS, activation_bits=16 if name in WEIGHT_ONLY else 8, **changes)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"flatquant"}))
def test_a_checkpoint_of_the_method_loads(name, source, tmp_path):
  """Also when the activations lie in the host's memory, which a method must expect."""
  out = tmp_path / "out"
  check_it_loads(name, options_of(name), source, out, sample_memory="pinned_host")


# What config.json of the family cannot say otherwise.
CHANGES = {"bloom": {"intermediate_size": 128, "tie_word_embeddings": True}}


@pytest.mark.parametrize(
  "name, family",
  (
    ("rtn", "bloom"),
    ("awq", "neox"),
    ("outlier_suppression_plus", "bloom"),
    ("outlier_suppression_plus", "opt, post-norm"),
  ),
)
def test_other_architectures(name, family, tmp_path):
  config = dataclasses.replace(ARCHITECTURES[family], num_layers=1, **CHANGES.get(family, {}))
  save_model(random_decoder(config), tmp_path / "model")
  check_it_loads(name, options_of(name), Checkpoint(tmp_path / "model"), tmp_path / "out")


def check_integer_products(model, kind):
  """Of a model whose weights and activations are symmetric: the same logits from integer products."""
  integer = nnx.clone(model)
  for block in integer.blocks:
    integer_transformed_linears(block)
    integer_linears(block)
  kinds = [type(module) for _, module in nnx.iter_modules(integer)]
  assert kinds.count(kind) == 7 * CONFIG.num_layers and QuantizedInput not in kinds
  tokens = jnp.asarray(random_tokens(CONFIG, 8))
  expected = logits(model, tokens)
  error = np.abs(logits(integer, tokens) - expected)
  # Sums in another order, and now and then a code on the other side of a tie.
  assert np.median(error) < 1e-4 * np.abs(expected).max()
  assert error.max() < 0.1 * np.abs(expected).max()


def test_symmetric_codes_are_multiplied_as_integers(source, tmp_path):
  loaded = check_it_loads("rtn", options_of("rtn", symmetric=True), source, tmp_path / "out")
  check_integer_products(loaded, IntegerLinear)


def test_flatquant_s_are_symmetric(source, tmp_path):
  options, out = options_of("flatquant", kv_bits=8), tmp_path / "out"
  loaded = check_it_loads("flatquant", options, source, out, sample_memory="pinned_host")
  check_integer_products(loaded, TransformedIntegerLinear)


def test_awq_keeps_its_search_over_a_kill(source, tmp_path):
  whole = options_of("awq", search=str(tmp_path / "whole.safetensors"))
  quantized("awq", whole, source, tmp_path / "whole")
  options = options_of("awq", search=str(tmp_path / "search.safetensors"))
  with pytest.raises(Stop):
    quantized("awq", options, source, tmp_path / "out", stop_at=1)
  assert not pathlib.Path(options.search).exists()
  quantized("awq", options, source, tmp_path / "out")
  assert not (tmp_path / "search.safetensors.partial").exists()
  (found, settings), (expected, same) = map(search_result.load, (options.search, whole.search))
  assert settings == same and len(found) == CONFIG.num_layers
  for one, other in zip(found, expected):
    jax.tree.map(np.testing.assert_array_equal, vars(one), vars(other))


def test_calibration_activations_that_are_not_finite_are_named(tmp_path):
  model = random_decoder(CONFIG)
  # Sums of products with weights near the largest float32 overflow.
  model.blocks[0].mlp.down_proj.kernel[...] = jnp.full_like(
    model.blocks[0].mlp.down_proj.kernel[...], 3e38
  )
  save_model(model, tmp_path / "model")
  with pytest.raises(UserError, match="the calibration activations: NaN or infinite"):
    quantized("rtn", OPTIONS, Checkpoint(tmp_path / "model"), tmp_path / "out")


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
    ("rtn", {"kv_bits": 4}, "kv_bits=4 belongs to flatquant, not rtn"),
  ),
)
def test_options_that_do_not_fit_are_refused(name, changes, message):
  with pytest.raises(UserError, match=message):
    make_method(name, CONFIG, dataclasses.replace(OPTIONS, **changes))
