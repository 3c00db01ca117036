"""OFQ on Swin: what is rounded where, attention in windows, annealing, integers."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from common.checkpoints.huggingface import Checkpoint, parameter_count
from common.errors import UserError
from common.models.surgery import get_module
from projects.ofq import compile_steps, config, ofq
from projects.ofq.integer_model import to_integer
from projects.ofq.ofq import QATSettings
from projects.ofq.oscillation import not_confident
from projects.ofq.training import TrainingSettings, make_optimizer_for

# Windows of 4 x 4 on 8 x 8 tokens, shifted in the second block of the first stage.
CHECKPOINT = pathlib.Path(__file__).parents[1] / "golden" / "hf_checkpoints" / "swin"
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16, 16, 3)), jnp.float32)


@functools.cache
def full_precision():
  model = Checkpoint(CHECKPOINT).load_model()
  model.stages[1].blocks.pop()  # One window is all its tokens: the two blocks are alike.
  return model


@functools.cache
def quantized():
  model = ofq.quantize(full_precision(), QATSettings())
  ofq.calibrate(model, IMAGES)
  return model


@nnx.jit
def logits(model):
  return model(IMAGES).logits


def test_every_linear_layer_is_rounded_with_a_step_per_token():
  model = quantized()
  layers = ofq.block_layers(model)
  in_block = ["attention.query_key", "attention.v_proj", "attention.o_proj"]
  in_block += ["mlp.up_proj", "mlp.down_proj"]
  blocks = ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0"]
  expected = {f"{block}.{name}" for block in blocks for name in in_block}
  assert layers.keys() == expected | {"stages.0.merging.reduction"}
  assert all(layer.weight_quantizer.bits == 2 for layer in layers.values())
  attention = model.stages[0].blocks[1].attention
  for quantizer in (attention.input_quantizer, attention.key_quantizer):
    assert quantizer.step.shape == (16, 1)  # Tokens of a window.
  assert model.stages[0].blocks[1].mlp.up_proj.input_quantizer.step.shape == (64, 1)
  assert model.stages[0].merging.reduction.input_quantizer.step.shape == (16, 1)
  assert not model.stages[0].blocks[0].mlp.down_proj.input_quantizer.signed
  for layer in (model.embed_patches, model.classifier):
    assert layer.weight_quantizer.bits == layer.input_quantizer.bits == 8


def test_qkr_without_rounding_is_attention_in_windows(monkeypatch):
  model = nnx.clone(full_precision())
  for stage in model.stages:
    for block in stage.blocks:
      for projection in (block.attention.q_proj, block.attention.k_proj):
        projection.bias[...] = jnp.zeros_like(projection.bias[...])
  expected = logits(model)
  for kind in (ofq.WeightQuantizer, ofq.ActivationQuantizer):
    monkeypatch.setattr(kind, "__call__", lambda self, x: x)
  found = nnx.jit(lambda model: ofq.prepare(nnx.clone(model), QATSettings())(IMAGES).logits)(model)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  # The windows' bias and mask are in it.
  model.stages[0].blocks[1].relative_position_bias[...] *= 0
  assert np.abs(logits(model) - expected).max() > 1e-3


def test_annealing_freezes_weights_of_all_stages_bit_for_bit():
  model = quantized()
  graphdef, params = nnx.split(model)
  options = TrainingSettings(learning_rate=1e-2, num_steps=10, boundary_range=0.05)
  optimizer = make_optimizer_for(graphdef, options)

  @jax.jit
  def step(params):
    state = optax.tree.set(optimizer.init(params), annealing=jnp.array(True))
    updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    return optax.apply_updates(params, updates), state.oscillation

  @nnx.jit
  def trained_weights(model):
    layers = ofq.block_layers(model).items()
    return {path: not_confident(layer, 0.05) for path, layer in layers}

  after, oscillation = step(params)
  new, of_all = nnx.merge(graphdef, after), trained_weights(model)
  for path, layer in ofq.block_layers(model).items():
    if isinstance(layer, ofq.QueryKeyProduct):
      assert not np.array_equal(layer.query[...], get_module(new, path).query[...])
    else:
      same = np.asarray(layer.latent()) == np.asarray(get_module(new, path).latent())
      np.testing.assert_array_equal(same, ~np.asarray(of_all[path]), err_msg=path)
  bias = lambda model: model.stages[1].blocks[0].relative_position_bias[...]
  assert not np.array_equal(bias(new), bias(model))
  assert oscillation.keys() == ofq.block_layers(model).keys()


def test_the_integer_model_computes_the_same():
  model = quantized()
  integer = to_integer(model)
  # Sums in another order; an activation on a tie could round the other way, and none does.
  np.testing.assert_allclose(logits(integer), logits(model), atol=1e-4)


def test_what_is_not_there_for_swin_is_refused():
  rectified = QATSettings(weight_quantizer="lsq", qkr=False, rectify_queries_and_keys=True)
  with pytest.raises(UserError, match="not for Swin"):
    ofq.quantize(full_precision(), rectified)


def test_published_sizes():
  paper = config.get_config("paper")
  paper.model = "microsoft/swin-tiny-patch4-window7-224"
  assert parameter_count(compile_steps.vision_config(paper)) == 28_288_354
