import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from common.checkpoints.huggingface import Checkpoint, hf_config, load_decoder
from common.checkpoints.shards import CheckpointWriter
from common.errors import UserError
from common.models.surgery import get_module, linear_paths
from common.quantization import autoawq, rtn
from common.quantization.calibration import rtn_block
from common.quantization.equivalent import fold_scale, scaling_groups
from common.quantization.linear import QuantizedLinear, quantized_weights
from common.quantization.quantized_array import IntegerFormat, from_codes
from tests.common.models.small_decoders import (
  ARCHITECTURES,
  logits,
  random_decoder,
  random_tokens,
)

CONFIG = dataclasses.replace(ARCHITECTURES["llama"], num_layers=1)
quantize = jax.jit(rtn.quantize, static_argnums=1)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def half(bits, group_size=16):
  return IntegerFormat(bits, group_size, scale_dtype=jnp.float16)


def quantized_model(config, format):
  model = random_decoder(config)
  model.blocks = nnx.List([rtn_block(block, format) for block in model.blocks])
  return model


def write(path, model, format, config=CONFIG):
  quantization = {"quantization_config": autoawq.quantization_config(format)}
  with CheckpointWriter(path, hf_config(config) | quantization) as writer:
    writer.add(autoawq.to_tensors(model, config))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A 4-bit checkpoint directory and its model."""
  path = tmp_path_factory.mktemp("awq") / "model"
  model = quantized_model(CONFIG, half(4))
  write(path, model, half(4))
  return path, model


@pytest.fixture
def copy_of(saved, tmp_path):
  """Returns a function that writes the checkpoint with changed tensors and quantization config."""

  def copy(tensors=(), quantization=()):
    tensors = safetensors.numpy.load_file(saved[0] / "model.safetensors") | dict(tensors)
    config = json.loads((saved[0] / "config.json").read_text())
    config["quantization_config"] |= dict(quantization)
    config["quantization_config"] = {
      k: v for k, v in config["quantization_config"].items() if v is not ...
    }
    path = tmp_path / "copy"
    path.mkdir()
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path

  return copy


def slow_pack_words(codes, order, bits):
  """AutoAWQ's packing, one code at a time: word j of a row holds columns j * n + order[k]."""
  per_word = 32 // bits
  words = np.zeros((codes.shape[0], codes.shape[1] // per_word), np.int64)
  for row, word in np.ndindex(words.shape):
    for k in range(per_word):
      words[row, word] |= int(codes[row, word * per_word + order[k]]) << (bits * k)
  return words.astype(np.uint32).view(np.int32)


def slow_unpack_words(words, order, bits):
  per_word = 32 // bits
  codes = np.zeros((words.shape[0], words.shape[1] * per_word), np.int64)
  for row, word in np.ndindex(words.shape):
    for k in range(per_word):
      value = (int(words[row, word]) & 0xFFFFFFFF) >> (bits * k)
      codes[row, word * per_word + order[k]] = value & (2**bits - 1)
  return codes


def random_weight(bits, rows=40, columns=32, group=8):
  """Codes, zero points, scales (float16) and the `QuantizedArray` of them."""
  rng = np.random.default_rng(bits)
  codes = rng.integers(0, 2**bits, (rows, columns))
  zeros = rng.integers(0, 2**bits, (rows // group, columns))
  scales = rng.uniform(0.5, 1.5, zeros.shape).astype(np.float16)
  arrays = jnp.asarray(codes), jnp.asarray(scales), jnp.asarray(zeros)
  return codes, zeros, scales, from_codes(*arrays, half(bits, group))


@pytest.fixture
def block_tensors():
  """Returns a function from a weight of o_proj's size to the tensors of a block with it."""

  def tensors(weight):
    block = random_decoder(CONFIG).blocks[0]
    block.attention.o_proj = QuantizedLinear(weight)
    return autoawq.to_tensors(block, CONFIG, ("blocks", 3))

  return tensors


def test_four_bits_are_laid_out_as_autoawq_does(block_tensors):
  codes, zeros, scales, weight = random_weight(4, rows=32)
  tensors = block_tensors(weight)
  name = "model.layers.3.self_attn.o_proj"
  assert f"{name}.weight" not in tensors and "model.layers.3.self_attn.q_proj.weight" in tensors
  expected = {
    "qweight": slow_pack_words(codes, ORDER, 4),
    "qzeros": slow_pack_words(zeros, ORDER, 4),
    "scales": scales,
  }
  assert expected["qweight"].shape == (32, 4) and expected["qzeros"].shape == (4, 4)
  for part, value in expected.items():
    stored = tensors[f"{name}.{part}"]
    assert stored.dtype == value.dtype
    np.testing.assert_array_equal(stored, value)


def test_four_bits_are_read_as_autoawq_does(saved, copy_of):
  """Words that are not from our writer, bit 31 included."""
  name = "model.layers.0.self_attn.o_proj"
  rng = np.random.default_rng(0)
  qweight = rng.integers(-(2**31), 2**31, (32, 4)).astype(np.int32)
  qzeros = rng.integers(-(2**31), 2**31, (2, 4)).astype(np.int32)
  scales = rng.uniform(0.5, 1.5, (2, 32)).astype(np.float16)
  changed = {f"{name}.qweight": qweight, f"{name}.qzeros": qzeros, f"{name}.scales": scales}
  # AutoAWQ's own config spells the version in capitals.
  loaded = load_decoder(copy_of(changed, {"version": "GEMM"}))
  codes, zeros = slow_unpack_words(qweight, ORDER, 4), slow_unpack_words(qzeros, ORDER, 4)
  spread = lambda v: v.repeat(16, axis=0).astype(np.float32)
  # (code - zero) * scale is exact but for one rounding.
  np.testing.assert_array_equal(
    loaded.blocks[0].attention.o_proj.weight.get_value().dequantize(),
    (codes - spread(zeros)) * spread(scales),
  )


@pytest.mark.parametrize("bits", (2, 3, 8))
def test_layout_of_the_other_widths(bits, block_tensors):
  codes, zeros, scales, weight = random_weight(bits)
  tensors = block_tensors(weight)
  qweight, qzeros, stored = (
    tensors[f"model.layers.3.self_attn.o_proj.{part}"] for part in ("qweight", "qzeros", "scales")
  )
  np.testing.assert_array_equal(stored, scales)
  if bits == 3:
    # Bit planes of 32 rows; zero points in bytes.
    assert qweight.shape == (2 * 3, 32) and qweight.dtype == np.int32
    for row, column in np.ndindex(codes.shape):
      planes = qweight[3 * (row // 32) : 3 * (row // 32) + 3, column].astype(np.int64)
      code = sum((int(planes[b]) >> row % 32 & 1) << b for b in range(3))
      assert code == codes[row, column]
    np.testing.assert_array_equal(qzeros, slow_pack_words(zeros, range(4), 8))
  else:
    natural = range(32 // bits)
    np.testing.assert_array_equal(qweight, slow_pack_words(codes, natural, bits))
    np.testing.assert_array_equal(qzeros, slow_pack_words(zeros, natural, bits))
  # The report of the packed size is what goes to disk.
  assert weight.packed_bytes() == qweight.nbytes + qzeros.nbytes + stored.nbytes


# A hidden size that is no multiple of 32 pads the bit planes of 3-bit weights.
NARROW = dataclasses.replace(CONFIG, hidden_size=48, head_dim=12)


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("group_size, config", ((16, CONFIG), (-1, NARROW)))
def test_round_trip_through_a_directory(bits, group_size, config, tmp_path):
  format = half(bits, group_size)
  model, tokens = quantized_model(config, format), random_tokens(config)
  write(tmp_path / "model", model, format, config)
  loaded = load_decoder(tmp_path / "model")
  before, after = quantized_weights(model), quantized_weights(loaded)
  assert before.keys() == after.keys() and len(after) == 7
  for path, weight in before.items():
    assert after[path].format == weight.format == format and after[path].shape == weight.shape
    jax.tree.map(np.testing.assert_array_equal, after[path], weight)
    assert [v.dtype for v in jax.tree.leaves(after[path])] == [
      v.dtype for v in jax.tree.leaves(weight)
    ]
  if group_size == 16:
    # The very same computation on the same codes.
    np.testing.assert_array_equal(logits(loaded, tokens), logits(model, tokens))


def test_biases_and_unpacked_linears_are_kept(tmp_path):
  """A model may be quantized in part; modules that are not stay as they were."""
  config = dataclasses.replace(ARCHITECTURES["opt"], num_layers=1)
  model, tokens = random_decoder(config), random_tokens(config)
  up = model.blocks[0].mlp.up_proj
  quantized = quantize(up.kernel[...], half(4))
  model.blocks[0].mlp.up_proj = QuantizedLinear(quantized, up.bias[...])
  write(tmp_path / "model", model, half(4), config)
  loaded = load_decoder(tmp_path / "model")
  assert set(quantized_weights(loaded)) == {"blocks.0.mlp.up_proj"}
  assert len(linear_paths(loaded.blocks)) == 5
  np.testing.assert_array_equal(loaded.blocks[0].mlp.up_proj.bias[...], up.bias[...])
  same = lambda a, b: np.testing.assert_array_equal(a, b)
  jax.tree.map(same, nnx.state(loaded), nnx.state(model))
  # The same numbers; float32 sums over a hundred terms of size 1 may run in another order.
  np.testing.assert_allclose(logits(loaded, tokens), logits(model, tokens), atol=1e-4)


def test_config_names_the_method_and_the_layout(saved):
  config = json.loads((saved[0] / "config.json").read_text())["quantization_config"]
  assert config == {
    "quant_method": "awq",
    "version": "gemm",
    "bits": 4,
    "group_size": 16,
    "zero_point": True,
    "modules_to_not_convert": None,
  }
  # Other tools must not take our own layouts for AutoAWQ's.
  assert all(autoawq.quantization_config(half(bits))["version"] != "gemm" for bits in (2, 3, 8))
  assert autoawq.read_format(config) == half(4)


UNSUPPORTED_FORMATS = {
  "symmetric": dataclasses.replace(half(4), symmetric=True),
  "output groups": dataclasses.replace(half(4), axis=1),
  "per tensor": dataclasses.replace(half(4, -1), axis=None),
  "float32 scales": IntegerFormat(4, 16),
}


@pytest.mark.parametrize("case", UNSUPPORTED_FORMATS)
def test_formats_that_the_layout_cannot_hold_are_refused(case, block_tensors):
  format = UNSUPPORTED_FORMATS[case]
  message = "asymmetric weights grouped along the input with float16 scales"
  with pytest.raises(UserError, match=message):
    autoawq.quantization_config(format)
  with pytest.raises(UserError, match=message):
    block_tensors(quantize(jnp.ones((32, 32)), format))


def test_outputs_that_do_not_fill_words_are_refused(block_tensors):
  weight = quantize(jnp.ones((32, 12)), half(4))
  with pytest.raises(UserError, match="12 output channels .* multiple of 8"):
    block_tensors(weight)


@pytest.mark.parametrize("name", ("bloom", "neox"))
def test_fused_qkv_is_refused(name):
  with pytest.raises(UserError, match="fuses q, k and v in one tensor.*search result"):
    autoawq.to_tensors(random_decoder(ARCHITECTURES[name]), ARCHITECTURES[name])


def test_scaled_activations_are_refused():
  # An OPT with GELU: separate q, k, v, but an activation that the scale cannot pass.
  config = dataclasses.replace(ARCHITECTURES["opt"], activation="gelu")
  model = random_decoder(config)
  group = scaling_groups(config)[-1]
  assert group.previous == "mlp.activation"
  fold_scale(model.blocks[1], group, jnp.full(64, 2.0))
  with pytest.raises(UserError, match="cannot hold the scaled gelu activation.*search result"):
    autoawq.to_tensors(model, config)


FOREIGN = {
  "GPTQ": {"quant_method": "gptq"},
  "no method": {"quant_method": ...},
  "another kernel's layout": {"version": "gemv"},
  "no zero points": {"zero_point": False},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_other_methods_and_layouts_are_refused(case, copy_of):
  with pytest.raises(UserError, match="copy: .*is not supported; supported: awq with version gemm"):
    load_decoder(copy_of(quantization=FOREIGN[case]))


@pytest.mark.parametrize(
  "change, message",
  (
    ({"bits": ...}, "lacks the integer bits"),
    ({"bits": "4"}, "lacks the integer bits"),
    ({"group_size": None}, "lacks the integer group_size"),
    ({"bits": 5}, "bits=5 is not supported"),
    ({"group_size": 24}, "group_size=24 does not divide"),
    ({"group_size": 32}, r"qzeros is int32 \[2, .*takes int32 \[1,"),
    ({"bits": 8, "version": "flaxworks"}, r"qweight is int32 \[32, 4\].*takes int32 \[32, 8\]"),
    ({"bits": 3, "version": "flaxworks"}, r"qweight is int32 \[32, 4\].*takes int32 \[3, 32\]"),
  ),
)
def test_a_config_that_disagrees_with_the_tensors_is_refused(change, message, copy_of):
  with pytest.raises(UserError, match=message):
    load_decoder(copy_of(quantization=change))


O_PROJ = "model.layers.0.self_attn.o_proj"
CORRUPT = {
  "floating codes": ("qweight", np.zeros((32, 4), np.float32), r"o_proj.qweight is float32"),
  "too few rows": ("qweight", np.zeros((16, 4), np.int32), r"\[16, 4\].*takes int32 \[32, 4\]"),
  "too many columns": ("qweight", np.zeros((32, 8), np.int32), r"\[32, 8\].*takes int32 \[32, 4\]"),
  "flat codes": ("qweight", np.zeros(128, np.int32), r"\[128\].*takes int32 \[32, 4\]"),
  "zero points missing a group": (
    "qzeros",
    np.zeros((1, 4), np.int32),
    r"qzeros is int32 \[1, 4\]",
  ),
  "float32 scales": ("scales", np.ones((2, 32), np.float32), "scales is float32"),
  "scales missing a group": (
    "scales",
    np.ones((1, 32), np.float16),
    r"scales is float16 \[1, 32\]",
  ),
  "infinite scales": ("scales", np.full((2, 32), np.inf, np.float16), "NaN or infinite"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_tensors_are_refused(case, copy_of):
  part, value, message = CORRUPT[case]
  with pytest.raises(UserError, match=message):
    load_decoder(copy_of({f"{O_PROJ}.{part}": value}))


def test_a_missing_tensor_is_named(saved, tmp_path):
  path = tmp_path / "model"
  path.mkdir()
  tensors = safetensors.numpy.load_file(saved[0] / "model.safetensors")
  del tensors[f"{O_PROJ}.qzeros"]
  safetensors.numpy.save_file(tensors, path / "model.safetensors")
  (path / "config.json").write_text((saved[0] / "config.json").read_text())
  with pytest.raises(UserError, match=f"missing tensors: {O_PROJ}.qzeros"):
    Checkpoint(path)


def test_one_block_of_a_packed_checkpoint_can_be_read(saved):
  path, model = saved
  block = Checkpoint(path).load_block(0)
  assert all(isinstance(get_module(block, p), QuantizedLinear) for p in quantized_weights(block))
  assert quantized_weights(block).keys() == quantized_weights(model.blocks[0]).keys()
