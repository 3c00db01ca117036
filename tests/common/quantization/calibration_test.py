import dataclasses
import gc
import importlib.util
import math
import weakref
from unittest import mock

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from common.compilation.compile_only import compile_step
from common.compilation.step import Step
from common.compilation.topology import tpu_slice
from common.errors import UserError
from common.models.decoder import Block, make_context
from common.models.encoder import Encoder, EncoderConfig
from common.models.sharding import batch_sharding, place
from common.models.surgery import get_module, linear_paths
from common.models.vit import VisionTransformer, VisionTransformerConfig
from common.quantization import calibration, rtn
from common.quantization.calibration import (
  block_hessians,
  block_inputs,
  check_finite,
  gptq_block,
  largest_inputs,
  quantize_blocks,
  quantize_model,
  rtn_block,
  run_block,
  smoothquant_block,
)
from common.quantization.equivalent import fold_scale, scaling_groups, smoothquant_scale
from common.quantization.gptq import gptq, hessian
from common.quantization.linear import get_kernels, quantized_weights, set_kernels
from common.quantization.quantized_array import IntegerFormat
from common.quantization.reconstruction import in_host_memory
from common.training.mesh import make_mesh
from tests.common.models.small_decoders import (
  ARCHITECTURES,
  random_decoder,
  random_module,
  random_tokens,
)

LLAMA = ARCHITECTURES["llama"]
FORMAT = IntegerFormat(2, 16)
# More than one pass takes, and not a multiple of it.
SAMPLES = 10
assert calibration.ROWS_PER_PASS < SAMPLES
# Float32 rounding of activations of order 1, summed in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def context_of(config, tokens):
  """The context of one row, as `quantize_blocks` makes it."""
  positions = jnp.arange(tokens.shape[1])[None]
  return make_context(config, positions, jnp.ones_like(positions))[0]


def full_context(config, tokens):
  """The context of every row, as the model makes it."""
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return positions, make_context(config, positions, jnp.ones_like(positions))[0]


@pytest.fixture(scope="module")
def model():
  return random_decoder(LLAMA)


@pytest.fixture(scope="module")
def tokens():
  return random_tokens(LLAMA, SAMPLES)


@pytest.fixture(scope="module")
def x():
  """Inputs of a block, [samples, seq, dim]."""
  rng = np.random.default_rng(5)
  correlation = np.eye(32) + rng.normal(size=(32, 32)) / 8
  return jnp.asarray(rng.normal(size=(SAMPLES, 16, 32)) @ correlation, jnp.float32)


@pytest.mark.parametrize("stream", ("full_precision", "quantized"))
@pytest.mark.parametrize("name", ("llama", "bloom", "opt, post-norm"))
def test_streams_equal_a_plain_recomputation(name, stream):
  """What each block is calibrated on, with RoPE, ALiBi and learned positions."""
  config = ARCHITECTURES[name]
  model, tokens = random_decoder(config), random_tokens(config, SAMPLES)
  seen = []

  def quantize_block(index, block, x, context):
    assert index == len(seen) and isinstance(block, Block)
    seen.append(x)
    return rtn_block(block, FORMAT)

  quantized = list(quantize_blocks(model, model.blocks, tokens, quantize_block, stream=stream))
  for old, new in zip(model.blocks, quantized):
    assert len(quantized_weights(new)) == len(linear_paths(old))
  positions, context = full_context(config, tokens)
  expected = model.embed(tokens, positions)
  for i in range(config.num_layers):
    np.testing.assert_allclose(seen[i], expected, **CLOSE)
    block = model.blocks[i] if stream == "full_precision" else quantized[i]
    expected = block(expected, context)[0]
  # Two bits change the stream by far more than the tolerance.
  other = quantized[0] if stream == "full_precision" else model.blocks[0]
  assert np.abs(other(seen[0], context)[0] - seen[1]).max() > 0.1


def test_blocks_are_consumed_lazily_and_released(model, tokens):
  """A block is read when the one before it is done, and nothing holds on to that one."""
  events, alive = [], weakref.WeakSet()

  def blocks():
    for i in range(3):
      gc.collect()
      events.append(("read", i, len(alive)))
      block = random_module(lambda: Block(LLAMA, nnx.Rngs(0)), seed=i)
      alive.add(block)
      yield block
      del block

  def quantize_block(index, block, x, context):
    events.append(("quantize", index))
    return rtn_block(block, FORMAT)

  stream = quantize_blocks(model, blocks(), tokens, quantize_block, stream="full_precision")
  assert events == []
  for quantized in stream:
    events.append("out")
    assert isinstance(quantized, Block)
    alive.add(quantized)
    del quantized
  expected = [event for i in range(3) for event in (("read", i, 0), ("quantize", i), "out")]
  assert events == expected


def test_the_model_is_not_modified(model, tokens):
  before = jax.tree.map(np.asarray, nnx.state(model))
  quantized = quantize_model(
    model, tokens, lambda i, block, x, context: rtn_block(block, FORMAT), stream="quantized"
  )
  assert all(len(quantized_weights(block)) == 7 for block in quantized.blocks)
  assert quantized_weights(model) == {}
  jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))


def test_run_block_in_passes_equals_the_block(model, x):
  context = context_of(LLAMA, x)
  np.testing.assert_allclose(
    run_block(model.blocks[0], x, context), model.blocks[0](x, context)[0], **CLOSE
  )


@pytest.mark.parametrize("samples, rows", ((1, 1), (6, 6), (8, 8), (10, 5), (11, 1), (24, 8)))
def test_rows_per_pass_divide_the_samples(samples, rows):
  x = jnp.arange(samples * 6).reshape(samples, 3, 2)
  passes, contexts = calibration.passes(x, context_of(LLAMA, x))
  assert passes.shape == (samples // rows, rows, 3, 2)
  np.testing.assert_array_equal(passes.reshape(x.shape), x)
  assert contexts.keys.segment_ids.shape == (samples // rows, 1, 3)


def test_both_streams_are_those_of_a_single_one(model, tokens):
  seen = {"full_precision": [], "quantized": [], "both": []}
  for stream, inputs in seen.items():

    def quantize_block(index, block, x, context, inputs=inputs):
      inputs.append(x)
      return rtn_block(block, FORMAT)

    quantize_model(model, tokens, quantize_block, stream=stream)
  for i, streams in enumerate(seen["both"]):
    np.testing.assert_array_equal(streams.full_precision, seen["full_precision"][i])
    np.testing.assert_array_equal(streams.quantized, seen["quantized"][i])


def padded_encoder():
  """An encoder, tokens of which some are padding, and where they are."""
  model = Encoder(
    EncoderConfig(
      vocab_size=50,
      hidden_size=16,
      intermediate_size=32,
      num_layers=2,
      num_heads=2,
      max_position_embeddings=12,
    ),
    rngs=nnx.Rngs(0),
  )
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 50, (SAMPLES, 12))
  segment_ids = (np.arange(12) < rng.integers(3, 13, (SAMPLES, 1))).astype(np.int32)
  return model, jnp.asarray(tokens * segment_ids), jnp.asarray(segment_ids)


def test_an_encoder_is_walked_with_its_padding():
  model, tokens, segment_ids = padded_encoder()
  streams = []

  def keep(index, block, x, context):
    streams.append((x, context))
    return block

  quantize_model(model, tokens, keep, stream="full_precision", segment_ids=segment_ids)
  x, context = streams[-1]
  last = run_block(model.blocks[-1], x, context)
  np.testing.assert_allclose(last, model(tokens, segment_ids=segment_ids).hidden, **CLOSE)
  # Padding is in no statistic: other values there change neither Hessians nor SmoothQuant's scale.
  paths = linear_paths(model.blocks[-1])
  noise = jnp.where(segment_ids[..., None] == 0, 100.0, 0.0)
  clean, noisy = (block_hessians(model.blocks[-1], x + n, context, paths) for n in (0, noise))
  for path in ("attention.q_proj", "mlp.up_proj"):
    np.testing.assert_allclose(noisy[path], clean[path], rtol=1e-4, atol=1e-4)
  scaled = [
    smoothquant_block(model.blocks[-1], x + n, context, model.config.block, FORMAT)
    for n in (0, noise)
  ]
  for a, b in zip(*(quantized_weights(block).values() for block in scaled)):
    np.testing.assert_allclose(a.dequantize(), b.dequantize(), atol=1e-4)


def test_an_encoder_is_walked_with_its_types_of_tokens():
  model, tokens, segment_ids = padded_encoder()
  ids = {"segment_ids": segment_ids, "token_types": jnp.zeros_like(tokens).at[:, 2:].set(1)}
  streams = []

  def keep(index, block, x, context):
    streams.append((x, context))
    return block

  quantize_model(model, tokens, keep, stream="full_precision", **ids)
  last = run_block(model.blocks[-1], *streams[-1])
  np.testing.assert_allclose(last, model(tokens, **ids).hidden, **CLOSE)
  assert np.abs(last - model(tokens, segment_ids=segment_ids).hidden).max() > 0.01


def test_a_vision_transformer_is_walked():
  config = VisionTransformerConfig(
    image_size=(8, 8),
    patch_size=(4, 4),
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    head="classification",
    labels=("a", "b"),
  )
  model = VisionTransformer(config, rngs=nnx.Rngs(0))
  images = jax.random.normal(jax.random.key(0), (SAMPLES, 8, 8, 3))
  keep = lambda index, block, x, context: block
  same = quantize_model(model, images, keep, stream="both")
  np.testing.assert_array_equal(same(images).logits, model(images).logits)
  rounded = lambda index, block, x, context: rtn_block(block, FORMAT)
  quantized = quantize_model(model, images, rounded, stream="quantized")
  assert all(len(quantized_weights(block)) == 6 for block in quantized.blocks)


def observed_inputs(block, x, context):
  """What `nnx.Linear.__call__` is given while the block runs, by path."""
  paths = {id(get_module(block, path)): path for path in linear_paths(block)}
  inputs, original = {}, nnx.Linear.__call__

  def call(self, x):
    inputs[paths[id(self)]] = np.asarray(x)
    return original(self, x)

  with mock.patch.object(nnx.Linear, "__call__", call):
    block(x, context)
  return inputs


@pytest.mark.parametrize("name", ("llama", "bloom", "opt, post-norm"))
def test_block_inputs_and_hessians_are_those_of_the_linears(name, x):
  config = ARCHITECTURES[name]
  block, context = random_decoder(config).blocks[0], context_of(config, x)
  expected = observed_inputs(block, x, context)
  inputs = block_inputs(block, x, context)
  assert inputs.keys() == expected.keys() == set(linear_paths(block))
  for path in inputs:
    np.testing.assert_allclose(inputs[path], expected[path], **CLOSE)
  down = ["mlp.down_proj"]
  (few,) = block_inputs(block, x, context, down, 3).values()
  np.testing.assert_array_equal(few, inputs[down[0]][:3])
  (largest,) = largest_inputs(block, x, context, down).values()
  np.testing.assert_allclose(largest, np.abs(expected[down[0]]).max(axis=(0, 1)), **CLOSE)

  paths = ("attention.o_proj", "mlp.down_proj")
  hessians = block_hessians(block, x, context, paths)
  assert hessians.keys() == set(paths)
  for path in paths:
    flat = expected[path].reshape(-1, expected[path].shape[-1]).astype(np.float64)
    np.testing.assert_allclose(hessians[path], 2 * flat.T @ flat / len(flat), rtol=1e-4, atol=1e-4)
  # Recording leaves the block as it was.
  assert all(type(get_module(block, path)) is nnx.Linear for path in linear_paths(block))


def test_rtn_block(model):
  block = model.blocks[0]
  weights = quantized_weights(rtn_block(block, FORMAT))
  kernels = get_kernels(block)
  assert weights.keys() == kernels.keys()
  for path, kernel in kernels.items():
    np.testing.assert_array_equal(
      weights[path].dequantize(), jax.jit(rtn.fake_quantize, static_argnums=1)(kernel, FORMAT)
    )


def test_gptq_block_sees_the_error_of_the_earlier_stages(model, x):
  """o_proj is calibrated with q, k, v quantized, gate and up with o_proj too, down with all."""
  block, context = model.blocks[0], context_of(LLAMA, x)
  weights = quantized_weights(gptq_block(block, x, context, FORMAT, damping=0.02))
  kernels, partly = get_kernels(block), nnx.clone(block)
  stages = (
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    ("attention.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
  )
  for stage in stages:
    inputs = block_inputs(partly, x, context)
    for path in stage:
      expected = gptq(kernels[path], hessian(inputs[path]), FORMAT, damping=0.02)
      difference = np.abs(weights[path].dequantize() - expected.dequantize())
      # The rounding of the Hessian may tip a tie, which changes the rest of one output channel. A
      # different code would be a difference of about 0.3.
      assert (difference.max(axis=0) < 1e-3).sum() >= difference.shape[1] - 1, path
    set_kernels(partly, {path: weights[path].dequantize() for path in stage})


def test_gptq_block_has_a_smaller_error_than_rtn(model, x):
  block, context = model.blocks[0], context_of(LLAMA, x)
  target = run_block(block, x, context)
  error = lambda new: float(jnp.mean((run_block(new, x, context) - target) ** 2))
  quantized = gptq_block(block, x, context, FORMAT, damping=0.02)
  assert error(quantized) < 0.8 * error(rtn_block(block, FORMAT))


def test_smoothquant_block(model, x):
  block, context = model.blocks[0], context_of(LLAMA, x)
  result = smoothquant_block(block, x, context, LLAMA, FORMAT, alpha=0.3)
  inputs, expected = observed_inputs(block, x, context), nnx.clone(block)
  for group in scaling_groups(LLAMA):
    x_max = np.abs(inputs[group.linears[0]]).max(axis=(0, 1))
    kernels = [get_module(expected, path).kernel[...] for path in group.linears]
    fold_scale(expected, group, smoothquant_scale(x_max, kernels, 0.3))
  expected = rtn_block(expected, FORMAT)
  for path, weight in quantized_weights(result).items():
    same = np.asarray(weight.values) == np.asarray(quantized_weights(expected)[path].values)
    # Scales from inputs computed in another order may tip a tie.
    assert same.mean() > 0.999, path
  np.testing.assert_allclose(
    result.attention_norm.scale[...], expected.attention_norm.scale[...], rtol=1e-4
  )


METHODS = {
  "gptq": lambda i, block, x, context: gptq_block(block, x, context, FORMAT),
  "smoothquant": lambda i, block, x, context: smoothquant_block(block, x, context, LLAMA, FORMAT),
}


@pytest.mark.parametrize("method", METHODS)
def test_blocks_of_one_shape_compile_once(method, model, tokens):
  """What a later block needs is compiled already: blocks differ in their weights only."""
  compiled, before_block = [], []
  listener = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None

  def quantize_block(index, *arguments):
    before_block.append(len(compiled))
    return METHODS[method](index, *arguments)

  blocks = (random_module(lambda: Block(LLAMA, nnx.Rngs(0)), seed=i) for i in range(4))
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    jax.jit(lambda x: x + 1)(jnp.zeros(3))
    assert compiled  # The listener hears.
    list(quantize_blocks(model, blocks, tokens, quantize_block, stream="quantized"))
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)
  assert len(before_block) == 4
  # The second block's making may be the first to run something small, such as a transfer.
  assert len(compiled) == before_block[2], before_block


def test_the_tensor_that_is_not_finite_is_named(model, x):
  block = model.blocks[0]
  check_finite(block, x)
  broken = nnx.clone(block)
  broken.mlp.up_proj.kernel[...] = broken.mlp.up_proj.kernel[...].at[0, 0].set(jnp.nan)
  with pytest.raises(UserError, match="mlp.up_proj.kernel: NaN or infinite values"):
    check_finite(broken)
  with pytest.raises(UserError, match="the calibration activations: NaN"):
    check_finite(block, x.at[0, 0, 0].set(jnp.inf))


def test_activations_in_host_memory_give_the_same_bits(model, tokens):
  """Streams, and what is recorded of them; `quantize_block` is given them there."""

  def walk(sample_memory):
    seen = []

    def quantize_block(index, block, x, context):
      assert {stream.sharding.memory_kind for stream in x} == {sample_memory}
      check_finite(block, x.quantized)
      down = ["mlp.down_proj"]
      hessians = block_hessians(block, x.quantized, context, down)
      largest = largest_inputs(block, x.quantized, context, down)
      seen.append((x, hessians, largest, block_inputs(block, x.full_precision, context)))
      return rtn_block(block, FORMAT)

    quantize_model(model, tokens, quantize_block, stream="both", sample_memory=sample_memory)
    assert len(seen) == LLAMA.num_layers > 1
    return jax.device_get(seen)

  jax.tree.map(np.testing.assert_array_equal, walk("pinned_host"), walk("device"))


def test_on_a_tpu_only_a_pass_of_activations_in_host_memory_is_copied():
  """As its compiler counts the memory of a chip."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  config = dataclasses.replace(LLAMA, hidden_size=128)
  graphdef, state = nnx.split(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))))
  mesh = make_mesh({"data": -1}, tpu_slice("v5e:1x1").devices)
  where = batch_sharding(mesh).with_memory_kind("pinned_host")
  x = jax.ShapeDtypeStruct((1024, 16, 128), jnp.float32, sharding=where)
  everywhere = NamedSharding(mesh, PartitionSpec())
  put = lambda tree: place(tree, jax.tree.map(lambda _: everywhere, tree))
  arguments = put(state), x, put(context_of(config, x))
  down, size = ["mlp.down_proj"], math.prod(x.shape) * x.dtype.itemsize
  for run in (
    run_block,
    lambda block, x, context: largest_inputs(block, x, context, down),
    lambda block, x, context: block_inputs(block, x, context, down, 1),
  ):
    step = lambda state, *arguments, run=run: run(nnx.merge(graphdef, state), *arguments)
    memory = compile_step(Step("a pass", step, arguments)).memory
    assert memory.total < 0.5 * size
    assert run is not run_block or memory.outputs == 0


def test_activations_in_host_memory_that_are_not_finite_are_named(model, x):
  check_finite(model.blocks[0], in_host_memory(x))
  with pytest.raises(UserError, match="the calibration activations: NaN"):
    check_finite(model.blocks[0], in_host_memory(x.at[3, 0, 0].set(jnp.nan)))


def test_a_memory_that_does_not_exist_is_an_error(model, tokens):
  with pytest.raises(UserError, match="sample_memory='disk'.*device, pinned_host"):
    quantize_model(model, tokens, None, stream="both", sample_memory="disk")
