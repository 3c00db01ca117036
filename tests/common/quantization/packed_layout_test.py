"""The layout of our own: every layer comes back, damage is named."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.checkpoints.huggingface import Checkpoint, load_decoder, save_model
from common.errors import UserError
from common.models.activations import gelu
from common.models.decoder import Block
from common.models.surgery import get_module, replace_module
from common.quantization import packed_layout, rtn
from common.quantization.activations import ActivationFormat, quantize_inputs
from common.quantization.attention import QuantizedAttention
from common.quantization.calibration import rtn_block
from common.quantization.checkpoint import quantize_checkpoint
from common.quantization.equivalent import ScaledActivation
from common.quantization.float_format import FloatFormat
from common.quantization.float_linear import FloatLinear
from common.quantization.linear import QuantizedLinear
from common.quantization.low_rank import CompensatedLinear, low_rank, quantize_factors
from common.quantization.quantized_array import IntegerFormat
from common.quantization.reassembly import ReassembledInput, Reassembly
from common.quantization.vector_quantized import VectorQuantizedArray, VectorQuantizedLinear
from kernels.lookup_matmul.api import pack_indices
from tests.common.models.small_decoders import (
  ARCHITECTURES,
  logits,
  random_decoder,
  random_tokens,
)

CONFIG = dataclasses.replace(ARCHITECTURES["opt"], num_layers=2)
KEY = jax.random.key(0)


def vector_quantized(shape):
  codes = lambda n, k: pack_indices(jax.random.randint(KEY, (n, shape[1] // 4), 0, k), k)
  return VectorQuantizedArray(
    indices=codes(shape[0] - 8, 16),
    codebooks=jax.random.normal(KEY, (1, 16, 4), jnp.float16),
    residual_indices=None,
    residual_codebooks=None,
    outlier_indices=codes(8, 4),
    outlier_codebook=jax.random.normal(KEY, (1, 4, 4), jnp.float16),
    scale=None,
    bias=None,
    order=jax.random.permutation(KEY, shape[0]),
    shape=shape,
    outliers=8,
  )


def every_layer(block, x):
  """A copy of the block with a layer of each kind."""
  block = nnx.clone(block)
  for path, format in (
    ("attention.q_proj", IntegerFormat(4, 16, symmetric=True)),
    ("attention.k_proj", IntegerFormat(3, 16, scale_dtype=jnp.float16)),
    ("attention.v_proj", IntegerFormat(2, 8, axis=1)),
    ("mlp.up_proj", IntegerFormat(8)),
  ):
    linear = get_module(block, path)
    layer = QuantizedLinear(rtn.quantize(linear.kernel[...], format), linear.bias[...])
    replace_module(block, path, layer)
  factors = quantize_factors(low_rank(jax.random.normal(KEY, (32, 32)) / 32, 4))
  block.attention.q_proj = CompensatedLinear(block.attention.q_proj, factors)
  block.attention.o_proj = VectorQuantizedLinear(vector_quantized((32, 32)), jnp.ones(32))
  down = block.mlp.down_proj
  block.mlp.down_proj = FloatLinear(
    jax.random.randint(KEY, down.kernel.shape, 0, 16).astype(jnp.uint4),
    jnp.full(32, 5.5),
    jax.random.randint(KEY, (down.kernel.shape[0],), 0, 3),
    jnp.float32(3.2),
    None,
    weight_format=FloatFormat(2, 1),
    activation_format=FloatFormat(3, 4),
  )
  quantize_inputs(
    block,
    ["mlp.up_proj"],
    ActivationFormat(8, "per_tensor"),
    {"mlp.up_proj": (jnp.float32(-3), jnp.float32(4))},
  )
  block.attention.attend = nnx.data(
    QuantizedAttention(
      {"key": ActivationFormat(8), "value": ActivationFormat(6, "per_tensor")},
      {"value": (jnp.float32(-2), jnp.float32(2))},
    )
  )
  channels = Reassembly(
    source=jnp.array([1, 32], jnp.int32),
    target=jnp.array([2, 32], jnp.int32),
    copy_of=jnp.array([0, 0, *range(2, 32)], jnp.int32),
    scale=jnp.array([0.5, 0.5, 0.5, *[1.0] * 29]),
    used=jnp.ones(32),
  )
  block.mlp_norm = nnx.Sequential(block.mlp_norm, ReassembledInput(channels))
  block.mlp.activation = nnx.data(ScaledActivation(gelu, jnp.full(down.kernel.shape[0], 2.0)))
  return block


@pytest.fixture(scope="module")
def model():
  return random_decoder(CONFIG)


def abstract(config=CONFIG):
  return nnx.eval_shape(lambda: Block(config, nnx.Rngs(0)))


def test_every_layer_comes_back(model):
  block = every_layer(model.blocks[0], None)
  tensors, layers = packed_layout.to_tensors(block)
  layers = json.loads(json.dumps(layers))
  again = packed_layout.from_tensors(abstract(), tensors, layers)
  assert nnx.graphdef(again) == nnx.graphdef(block)
  widen = lambda a: np.asarray(a).astype(np.float64)
  for a, b in zip(
    jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(block)), strict=True
  ):
    assert a.dtype == b.dtype and a.shape == b.shape
    np.testing.assert_array_equal(widen(a), widen(b))
  # Codes take their bits: 16 of 4 bits, no more.
  assert tensors["attention.q_proj.quantized.weight.values"].nbytes == 32 * 32 // 2


def test_a_checkpoint_of_any_layers_loads(model, tmp_path):
  save_model(model, tmp_path / "source")
  tokens = jnp.asarray(random_tokens(CONFIG, 6))
  block = lambda index, block, x, context: every_layer(block, x)
  source = Checkpoint(tmp_path / "source")
  quantize_checkpoint(source, tmp_path / "out", tokens, block, settings={"method": "mixed"})
  loaded = load_decoder(tmp_path / "out")
  expected = nnx.clone(model)
  expected.blocks = nnx.List([every_layer(b, None) for b in model.blocks])
  # The same arrays in the same program.
  np.testing.assert_array_equal(logits(loaded, tokens), logits(expected, tokens))
  assert Checkpoint(tmp_path / "out").quantization["method"] == "mixed"


def test_damage_is_named(model):
  tensors, layers = packed_layout.to_tensors(rtn_block(model.blocks[0], IntegerFormat(4, 16)))
  up = layers["mlp.up_proj"]
  for changed, message in (
    (up | {"$class": "eval"}, "layer mlp.up_proj is damaged: KeyError"),
    (up | {"extra": 1}, "layer mlp.up_proj is damaged: TypeError"),
    (up | {"bias": {"$tensor": "nowhere"}}, "layer mlp.up_proj is damaged: KeyError"),
  ):
    with pytest.raises(UserError, match=message):
      packed_layout.from_tensors(abstract(), tensors, layers | {"mlp.up_proj": changed})
  with pytest.raises(UserError, match="layer nowhere.at_all is damaged"):
    packed_layout.from_tensors(abstract(), tensors, layers | {"nowhere.at_all": up})
  with pytest.raises(UserError, match="tensor mlp_norm.scale has shape .3,., expected .32,."):
    packed_layout.from_tensors(abstract(), tensors | {"mlp_norm.scale": np.ones(3)}, layers)
  lacking = {k: v for k, v in tensors.items() if k != "mlp_norm.bias"}
  with pytest.raises(UserError, match="tensor mlp_norm.bias is missing"):
    packed_layout.from_tensors(abstract(), lacking, layers)
  with pytest.raises(UserError, match="unexpected tensors: more"):
    packed_layout.from_tensors(abstract(), tensors | {"more": np.ones(3)}, layers)


def test_layers_without_a_place_are_named(model):
  class Invented(nnx.Module):
    def __init__(self):
      self.weight = nnx.BatchStat(jnp.ones(3))

  block = nnx.clone(model.blocks[0])
  block.mlp.down_proj = Invented()
  with pytest.raises(
    UserError, match="mlp.down_proj.weight: the layout has no place for a BatchStat"
  ):
    packed_layout.to_tensors(block)


def test_other_versions_are_refused():
  config = packed_layout.quantization_config("rtn", [{}])
  assert packed_layout.read_config(config) == [{}]
  assert packed_layout.read_config({"quant_method": "awq"}) is None
  for other in (config | {"version": 1}, {k: v for k, v in config.items() if k != "version"}):
    with pytest.raises(UserError, match="has version 1, expected 2; quantize the original"):
      packed_layout.read_config(other)
