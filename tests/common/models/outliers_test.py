import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from common.models.decoder import make_context
from common.models.outliers import inject_down_outliers, inject_outliers
from common.quantization.calibration import block_inputs
from tests.common.models.small_decoders import (
  ARCHITECTURES,
  logits,
  random_decoder,
  random_tokens,
)


@pytest.mark.parametrize("architecture", ["llama", "bloom"])  # Norms without and with a bias.
def test_outputs_stay_and_activations_get_outliers(architecture):
  model = random_decoder(ARCHITECTURES[architecture])
  changed = inject_outliers(model, jax.random.key(0), fraction=0.1, gain=30.0)
  tokens = jnp.asarray(random_tokens(model.config))
  # The same products up to rounding, through gains of 30 and 1/30.
  np.testing.assert_allclose(logits(changed, tokens), logits(model, tokens), atol=1e-4, rtol=1e-4)

  positions = jnp.arange(tokens.shape[1])[None]
  context, _ = make_context(model.config, positions, jnp.ones_like(positions))

  def spread(model):
    x = model.embed(tokens, jnp.broadcast_to(positions, tokens.shape))
    channels = jnp.abs(block_inputs(model.blocks[0], x, context)["attention.q_proj"]).mean((0, 1))
    return float(channels.max() / jnp.median(channels))

  assert spread(changed) > 8 * spread(model)


def test_every_norm_gets_its_own_channels():
  model = random_decoder(ARCHITECTURES["llama"])
  changed = inject_outliers(model, jax.random.key(0), fraction=0.1, gain=30.0)
  raised = [
    tuple(
      np.flatnonzero(np.asarray(getattr(new, name).scale[...] / getattr(old, name).scale[...]) > 2)
    )
    for old, new in zip(model.blocks, changed.blocks)
    for name in ("attention_norm", "mlp_norm")
  ]
  assert all(len(channels) == 3 for channels in raised)
  assert len(set(raised)) > 1


def test_norms_that_the_residual_stream_reads_too_are_refused():
  model = random_decoder(ARCHITECTURES["opt, post-norm"])
  with pytest.raises(UserError, match="norm_placement='post'.*supported: norm_placement='pre'"):
    inject_outliers(model, jax.random.key(0))


def test_shifted_outliers_lie_to_one_side_and_outputs_stay():
  model = random_decoder(ARCHITECTURES["opt"])
  changed = inject_outliers(model, jax.random.key(0), fraction=0.1, gain=4.0, shift=40.0)
  tokens = jnp.asarray(random_tokens(model.config))
  # Biases of 40 times the weights are taken off sums of that size again: float32 rounding.
  np.testing.assert_allclose(logits(changed, tokens), logits(model, tokens), atol=5e-3, rtol=1e-3)
  x, context = changed.stem(tokens)
  inputs = block_inputs(changed.blocks[0], x, context)["attention.q_proj"]
  mean, deviation = jnp.abs(inputs.mean((0, 1))), inputs.std((0, 1))
  assert int(jnp.sum(mean > 20)) == 3 and float(deviation.max()) < 20


def test_a_norm_without_a_bias_cannot_be_shifted():
  with pytest.raises(UserError, match="attention_norm has no bias that could take a shift"):
    inject_outliers(random_decoder(ARCHITECTURES["llama"]), jax.random.key(0), shift=1.0)


@pytest.mark.parametrize("architecture", ["llama", "opt"])  # Behind a gate, and behind relu.
def test_outliers_before_down_proj_keep_the_function(architecture):
  model = random_decoder(ARCHITECTURES[architecture])
  changed = inject_down_outliers(model, jax.random.key(0), fraction=0.05, gain=30.0)
  tokens = jnp.asarray(random_tokens(model.config))
  np.testing.assert_allclose(logits(changed, tokens), logits(model, tokens), atol=1e-4, rtol=1e-4)
  x, context = model.stem(tokens)
  largest = lambda model: jnp.abs(block_inputs(model.blocks[0], x, context)["mlp.down_proj"]).max()
  assert float(largest(changed)) > 3 * float(largest(model))


def test_outliers_that_nothing_can_take_are_refused():
  with pytest.raises(UserError, match="cannot be injected before down_proj behind gelu_tanh"):
    inject_down_outliers(random_decoder(ARCHITECTURES["bloom"]), jax.random.key(0))
