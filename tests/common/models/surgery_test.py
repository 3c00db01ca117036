"""Finding, replacing and observing layers by path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.models.decoder import make_context
from common.models.surgery import (
  get_module,
  linear_paths,
  output_gradients,
  record_inputs,
  replace_module,
)
from tests.common.models.small_decoders import ARCHITECTURES, random_decoder

LINEARS = [f"attention.{x}_proj" for x in "koqv"] + [
  f"mlp.{x}_proj" for x in ("down", "gate", "up")
]


@pytest.fixture
def model():
  return random_decoder(ARCHITECTURES["llama"])


def test_paths_reach_layers_lists_and_attributes(model):
  assert linear_paths(model.blocks[0]) == LINEARS
  in_blocks = [f"blocks.{i}.{path}" for i in range(2) for path in LINEARS]
  assert linear_paths(model) == [*in_blocks, "lm_head"]
  assert get_module(model, "blocks.1.mlp.up_proj") is model.blocks[1].mlp.up_proj
  assert get_module(model, "config.num_heads") == 4
  with pytest.raises(AttributeError):
    get_module(model, "blocks.1.mlp.side_proj")


def test_layers_without_a_place_are_not_listed():
  # No gate, and a head that is the embedding.
  plain = random_decoder(ARCHITECTURES["opt"]).blocks[0]
  assert linear_paths(plain) == [path for path in LINEARS if "gate" not in path]
  assert "lm_head" not in linear_paths(random_decoder(ARCHITECTURES["qwen2, grouped-query"]))


def test_replacing_is_in_place(model):
  other = random_decoder(ARCHITECTURES["llama"], seed=1)
  replace_module(model, "blocks.1.mlp.up_proj", other.blocks[0].mlp.up_proj)
  assert model.blocks[1].mlp.up_proj is other.blocks[0].mlp.up_proj
  replace_module(model, "blocks.0", other.blocks[1])
  assert model.blocks[0] is other.blocks[1]
  replace_module(model, "lm_head", other.lm_head)
  assert model.lm_head is other.lm_head


def test_inputs_are_recorded_and_the_module_is_left_as_it_was(model):
  block = model.blocks[0]
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 32)), jnp.float32)
  ids = jnp.broadcast_to(jnp.arange(5), (2, 5))
  context, _ = make_context(model.config, ids, jnp.ones_like(ids))

  @functools.partial(jax.jit, static_argnums=0)
  def run(graphdef, state, x):
    block = nnx.merge(graphdef, state)
    before = [get_module(block, path) for path in LINEARS]
    recorded = record_inputs(block, LINEARS, lambda block: block(x, context)[0])
    assert [get_module(block, path) for path in LINEARS] == before
    assert nnx.split(block)[0] == graphdef
    return recorded

  out, inputs = run(*nnx.split(block), x)
  # Float32 in another order of fusion.
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
  close(out, block(x, context)[0])
  assert list(inputs) == LINEARS
  close(inputs["attention.q_proj"], block.attention_norm(x))
  np.testing.assert_array_equal(inputs["attention.q_proj"], inputs["attention.v_proj"])
  attended = x + block.attention.o_proj(inputs["attention.o_proj"])
  close(inputs["mlp.up_proj"], block.mlp_norm(attended))
  close(out, attended + block.mlp.down_proj(inputs["mlp.down_proj"]))


def test_the_module_is_left_as_it_was_by_a_failure(model):
  block = model.blocks[0]
  before = [get_module(block, path) for path in LINEARS]

  def fail(block):
    raise RuntimeError

  with pytest.raises(RuntimeError):
    record_inputs(block, LINEARS, fail)
  assert [get_module(block, path) for path in LINEARS] == before
  with pytest.raises(AttributeError):
    record_inputs(block, [*LINEARS, "mlp.side_proj"], lambda block: None)
  assert [get_module(block, path) for path in LINEARS] == before


def test_gradients_by_outputs_of_layers(model):
  """Of layers and of what returns a tuple; those behind a residual are known."""
  block = model.blocks[0]
  x, weights = (
    jnp.asarray(np.random.default_rng(seed).normal(size=(2, 5, 32)), jnp.float32) for seed in (0, 1)
  )
  ids = jnp.broadcast_to(jnp.arange(5), (2, 5))
  context, _ = make_context(model.config, ids, jnp.ones_like(ids))
  paths = ["attention", "mlp.up_proj", "mlp.down_proj"]
  before = [get_module(block, path) for path in paths]

  @nnx.jit
  def run(block):
    found = output_gradients(block, paths, lambda block: jnp.vdot(block(x, context)[0], weights))
    h = x + block.attention(block.attention_norm(x), context)[0]
    after = lambda h: jnp.vdot(h + block.mlp(block.mlp_norm(h)), weights)
    return found, jax.grad(after)(h)

  found, expected = run(block)
  assert [get_module(block, path) for path in paths] == before
  np.testing.assert_array_equal(found["mlp.down_proj"], weights)
  np.testing.assert_allclose(found["attention"], expected, atol=1e-5, rtol=1e-5)
  assert found["mlp.up_proj"].shape == (2, 5, block.mlp.up_proj.kernel.shape[1])
