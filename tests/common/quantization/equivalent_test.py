import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import UserError
from common.models.surgery import get_module
from common.quantization.equivalent import (
  ScaledActivation,
  ScalingGroup,
  fold_scale,
  fold_shift,
  scaling_groups,
  smoothquant_scale,
)
from tests.common.models.small_decoders import (
  ARCHITECTURES,
  logits,
  random_decoder,
  random_tokens,
)

QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
GROUPS = {
  "llama": {
    "attention_norm": QKV,
    "attention.v_proj": ("attention.o_proj",),
    "mlp_norm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
  },
  # One value channel feeds several query heads.
  "qwen2, grouped-query": {
    "attention_norm": QKV,
    "mlp_norm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
  },
  "opt": {
    "attention_norm": QKV,
    "attention.v_proj": ("attention.o_proj",),
    "mlp_norm": ("mlp.up_proj",),
    "mlp.up_proj": ("mlp.down_proj",),
  },
  # The norms' outputs also go to the residual stream.
  "opt, post-norm": {
    "attention.v_proj": ("attention.o_proj",),
    "mlp.up_proj": ("mlp.down_proj",),
  },
  "bloom": {
    "attention_norm": QKV,
    "attention.v_proj": ("attention.o_proj",),
    "mlp_norm": ("mlp.up_proj",),
    "mlp.activation": ("mlp.down_proj",),
  },
}
GROUPS["neox"] = GROUPS["bloom"]


def random_scale(size, seed):
  """Positive, over two orders of magnitude."""
  return jnp.asarray(np.exp(np.random.default_rng(seed).uniform(-2.3, 2.3, size)), jnp.float32)


def input_size(block, group):
  return get_module(block, group.linears[0]).in_features


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_groups_of_each_architecture(name):
  groups = scaling_groups(ARCHITECTURES[name])
  assert {g.previous: g.linears for g in groups} == GROUPS[name]
  inspect = {"attention_norm": "attention"}
  if ARCHITECTURES[name].gated_mlp:
    inspect["mlp_norm"] = "mlp"
  for group in groups:
    # One linear is inspected by itself, several by the module that they belong to.
    assert group.inspect == inspect.get(group.previous, group.linears[0])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scaling_leaves_the_logits_unchanged(name):
  """Every group by itself, in every block with another scale, then once more on top."""
  config = ARCHITECTURES[name]
  model, tokens = random_decoder(config), random_tokens(config)
  expected = logits(model, tokens)
  for group in scaling_groups(config):
    changed = random_decoder(config)
    for repeat in range(2):
      for i, block in enumerate(changed.blocks):
        kernels = [get_module(block, path).kernel[...] for path in group.linears]
        scale = random_scale(input_size(block, group), 10 * repeat + i)
        fold_scale(block, group, scale)
        for path, kernel in zip(group.linears, kernels):
          np.testing.assert_array_equal(
            get_module(block, path).kernel[...], kernel * scale[:, None]
          )
    result = logits(changed, tokens)
    # Rounding only: 1e-4 of the largest logit.
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_all_groups_together():
  """Groups that touch the same linear (v_proj, up_proj) from both sides do not disturb each other."""
  for name in ("llama", "bloom"):
    config = ARCHITECTURES[name]
    model, tokens = random_decoder(config), random_tokens(config)
    expected = logits(model, tokens)
    for i, group in enumerate(scaling_groups(config)):
      for block in model.blocks:
        fold_scale(block, group, random_scale(input_size(block, group), i))
    np.testing.assert_allclose(
      logits(model, tokens), expected, rtol=0, atol=1e-4 * np.abs(expected).max()
    )


def test_relu_passes_the_scale_and_gelu_does_not():
  """Folding into up_proj, right for ReLU, changes the output of a GELU model: the check bites."""
  wrong = ScalingGroup("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj")
  for name, exact in (("opt", True), ("bloom", False)):
    config = ARCHITECTURES[name]
    model, tokens = random_decoder(config), random_tokens(config)
    expected = logits(model, tokens)
    for block in model.blocks:
      fold_scale(block, wrong, random_scale(64, 0))
    error = np.abs(logits(model, tokens) - expected).max() / np.abs(expected).max()
    assert (error < 1e-4) == exact, (name, error)


def test_scaled_activation():
  activation = ScaledActivation(jax.nn.relu, jnp.array([1.0, 2.0, 4.0]))
  x = jnp.array([[-1.0, 2.0, 2.0]])
  np.testing.assert_array_equal(activation(x), [[0.0, 1.0, 0.5]])
  assert activation(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
  # The scale is a parameter, so that checkpoints and shardings see it.
  assert [v.shape for v in jax.tree.leaves(nnx.state(activation, nnx.Param))] == [(3,)]


def test_folding_twice_keeps_one_scaled_activation():
  block = random_decoder(ARCHITECTURES["bloom"]).blocks[0]
  group = next(g for g in scaling_groups(ARCHITECTURES["bloom"]) if g.previous == "mlp.activation")
  fold_scale(block, group, jnp.full(64, 2.0))
  fold_scale(block, group, jnp.full(64, 3.0))
  assert not isinstance(block.mlp.activation.activation, ScaledActivation)
  np.testing.assert_array_equal(block.mlp.activation.scale[...], 6.0)


@pytest.mark.parametrize("name", ("qwen2, grouped-query", "bloom"))
def test_parameters_keep_their_types(name):
  """A float32 scale must not turn a bfloat16 model into a float32 one."""
  config = dataclasses.replace(ARCHITECTURES[name], num_layers=1)
  block = random_decoder(config, dtype=jnp.bfloat16).blocks[0]
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # JAX casts in place of us, and warns that it will stop to.
    for group in scaling_groups(config):
      fold_scale(block, group, random_scale(input_size(block, group), 0))
  types = {path: v.get_value().dtype for path, v in nnx.state(block, nnx.Param).flat_state()}
  types.pop(("mlp", "activation", "scale"), None)
  assert set(types.values()) == {jnp.dtype(jnp.bfloat16)}, types


def test_smoothquant_scale():
  rng = np.random.default_rng(0)
  x_max = rng.uniform(0.1, 10, 6).astype(np.float32)
  kernels = [rng.normal(size=(6, n)).astype(np.float32) for n in (3, 5)]
  w_max = np.abs(np.concatenate(kernels, axis=1)).max(axis=1)
  for alpha in (0.0, 0.5, 0.8):
    expected = x_max**alpha / w_max ** (1 - alpha)
    # Two float32 powers and a quotient.
    np.testing.assert_allclose(smoothquant_scale(x_max, kernels, alpha), expected, rtol=1e-5)
  # At one half, inputs and weights meet in the middle.
  scale = smoothquant_scale(x_max, kernels)
  np.testing.assert_allclose(x_max / scale, w_max * scale, rtol=1e-5)


def test_smoothquant_scale_of_dead_channels_is_positive_and_finite():
  scale = smoothquant_scale(jnp.array([0.0, 1.0, 0.0]), [jnp.array([[1.0], [0.0], [0.0]])])
  assert np.isfinite(scale).all() and (scale >= 1e-5).all()


@pytest.mark.parametrize("name", ("opt", "bloom", "neox"))
def test_a_shift_leaves_the_function(name):
  config = ARCHITECTURES[name]
  model = random_decoder(config)
  shifted = nnx.clone(model)
  for block in shifted.blocks:
    for i, group in enumerate(scaling_groups(config)):
      if isinstance(get_module(block, group.previous), nnx.LayerNorm):
        z = jax.random.normal(jax.random.key(i), (config.hidden_size,))
        before = get_module(block, group.previous).bias[...]
        fold_shift(block, group, z)
        after = get_module(block, group.previous).bias[...]
        np.testing.assert_allclose(before - after, z, atol=1e-6)
  tokens = random_tokens(config)
  np.testing.assert_allclose(logits(shifted, tokens), logits(model, tokens), atol=1e-4, rtol=1e-4)


def test_a_shift_needs_biases():
  block = random_decoder(ARCHITECTURES["opt"]).blocks[0]
  group = scaling_groups(ARCHITECTURES["opt"])[0]
  block.attention.v_proj.bias = None
  with pytest.raises(UserError, match="attention.v_proj has no bias that could make good"):
    fold_shift(block, group, jnp.ones(32))
  through = ScalingGroup("attention.v_proj", ("attention.o_proj",), "attention.o_proj")
  with pytest.raises(UserError, match="attention.v_proj has no bias that could take a shift"):
    fold_shift(block, through, jnp.ones(32))
