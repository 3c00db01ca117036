import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.models.decoder import Decoder, DecoderConfig, KVCache
from common.models.scan import abstract_stack, stack, unstack
from common.quantization.calibration import rtn_block
from common.quantization.quantized_array import IntegerFormat
from common.training.losses import next_token_loss
from common.training.optimizer import make_optimizer
from common.training.train_step import init_train_state, make_train_step

CONFIG = DecoderConfig(
  vocab_size=64,
  hidden_size=32,
  intermediate_size=48,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  max_position_embeddings=64,
)
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12)).astype(np.int32)
SEGMENTS = np.repeat([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0]], 2, axis=0).astype(np.int32)


@pytest.fixture(scope="module")
def model():
  return nnx.jit(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))()


def loss(logits):
  return next_token_loss(logits, TOKENS, SEGMENTS)[0]


@pytest.mark.parametrize("remat", [True, False])
def test_logits_and_gradients_equal_those_of_the_list_of_blocks(model, remat):
  graphdef, state = nnx.split(model)
  scanned, params = stack(model, remat=remat)
  plain = lambda state: nnx.merge(graphdef, state)(TOKENS, segment_ids=SEGMENTS)[0]
  stacked = lambda params: scanned(params, TOKENS, segment_ids=SEGMENTS)[0]
  np.testing.assert_allclose(jax.jit(stacked)(params), jax.jit(plain)(state), atol=1e-5)
  gradient = jax.jit(jax.grad(lambda s: loss(plain(s))))(state)
  expected = stack(nnx.merge(graphdef, gradient))[1]
  gradient = jax.jit(jax.grad(lambda p: loss(stacked(p))))(params)
  assert jax.tree.structure(gradient) == jax.tree.structure(expected)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient, expected)


def test_unstack_undoes_stack(model):
  again = unstack(*stack(model))
  assert nnx.graphdef(again) == nnx.graphdef(model)
  jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))
  assert len(model.blocks) == CONFIG.num_layers  # Stacking leaves the model alone.


def test_decoding_with_the_stacked_cache_continues_the_prompt(model):
  scanned, params = stack(model)
  listed_run = nnx.jit(lambda m, cache: m(TOKENS, cache=cache))
  whole, listed = listed_run(model, KVCache.empty(CONFIG, 2, 16))
  step = jax.jit(lambda params, tokens, cache: scanned(params, tokens, cache=cache))
  logits, cache = step(params, TOKENS[:, :7], scanned.empty_cache(2, 16))
  parts = [logits]
  for i in range(7, 12):
    logits, cache = step(params, TOKENS[:, i : i + 1], cache)
    parts.append(logits)
  np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)
  np.testing.assert_allclose(cache.keys, jnp.stack(listed.keys), atol=1e-5)
  np.testing.assert_array_equal(cache.segment_ids, listed.segment_ids)
  assert int(cache.length) == 12


def test_stacked_parameters_train(model):
  scanned, params = stack(model)
  optimizer = make_optimizer(learning_rate=1e-2, num_steps=6)
  step = make_train_step(lambda p, batch, key: next_token_loss(
    scanned(p, batch["tokens"])[0], batch["tokens"], jnp.ones_like(batch["tokens"])
  ), optimizer)  # fmt: skip
  state, losses = init_train_state(params, optimizer, jax.random.key(0)), []
  for _ in range(6):
    state, metrics = step(state, {"tokens": TOKENS})
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0] - 0.3


def test_packed_blocks_can_be_stacked(model):
  packed = nnx.clone(model)
  packed.blocks = nnx.List([rtn_block(b, IntegerFormat(3, 16)) for b in model.blocks])
  scanned, params = stack(packed)
  logits = jax.jit(lambda params: scanned(params, TOKENS)[0])(params)
  np.testing.assert_allclose(logits, nnx.jit(lambda m: m(TOKENS)[0])(packed), atol=1e-5)


def test_abstract_stack_has_the_shapes_of_stack(model):
  scanned, params = stack(model)
  abstract, shapes = abstract_stack(CONFIG)
  assert abstract == scanned
  assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
    lambda x: (x.shape, x.dtype), shapes
  )


def test_abstract_stack_of_packed_half_precision_blocks():
  edit = lambda block: rtn_block(block, IntegerFormat(4, 16))
  _, params = abstract_stack(CONFIG, jnp.bfloat16, edit_block=edit)
  weight = params["blocks"]["mlp"]["up_proj"]["weight"]
  assert weight.values.shape == (2, 32, 48) and weight.values.dtype == jnp.uint4
  assert params["embed_tokens"]["embedding"].dtype == jnp.bfloat16


def test_blocks_that_differ_are_refused():
  config = dataclasses.replace(CONFIG, sliding_window=4, full_attention_layers=(0,))
  with pytest.raises(ValueError, match="all alike"):
    stack(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
  with pytest.raises(ValueError, match="all alike"):
    abstract_stack(config)
