import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.models.resnet import ResNet, ResNetConfig

CONFIG = ResNetConfig(
  embedding_size=4, hidden_sizes=(8, 16), depths=(1, 1), block="basic", labels=("a", "b", "c")
)


def random_images(seed, count=4):
  return np.random.default_rng(seed).normal(1.0, 2.0, (count, 8, 8, 3)).astype(np.float32)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("first_stage, side", [(False, 8), (True, 4)])
def test_resolutions(block, first_stage, side):
  config = dataclasses.replace(CONFIG, block=block, downsample_in_first_stage=first_stage)
  model = nnx.eval_shape(lambda: ResNet(config, rngs=nnx.Rngs(0)))
  images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
  out = nnx.eval_shape(lambda m, x: m(x), model, images)
  # The stem divides by 4, each later stage by 2.
  assert out.hidden.shape == (2, side, side, 16)
  assert out.pooled.shape == (2, 16) and out.logits.shape == (2, 3)


def test_where_a_bottleneck_puts_its_stride():
  strides = {}
  for early in (False, True):
    config = dataclasses.replace(CONFIG, block="bottleneck", downsample_in_bottleneck=early)
    model = nnx.eval_shape(lambda config=config: ResNet(config, rngs=nnx.Rngs(0)))
    block = model.stages[1][0]
    assert model.stages[0][0].shortcut.conv.strides == 1
    strides[early] = [layer.conv.strides for layer in block.layers]
    assert block.shortcut.conv.strides == 2
  assert strides == {False: [1, 2, 1], True: [2, 1, 1]}


def test_inference_uses_and_keeps_the_running_statistics():
  model = ResNet(CONFIG, rngs=nnx.Rngs(0))
  images = random_images(0)
  statistics = lambda: jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))
  before, run = statistics(), nnx.jit(lambda model, images: model(images).logits)
  first = run(model, images)
  images[1:] *= -2
  np.testing.assert_allclose(run(model, images)[0], first[0], atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, before, statistics())


def test_training_normalises_by_the_batch_and_reaches_every_parameter():
  model = ResNet(CONFIG, rngs=nnx.Rngs(0))
  images = random_images(1)
  stem = np.asarray(model.stem.conv(images))
  loss = lambda model, images: jnp.sum(model(images, train=True).logits ** 2)
  gradients = nnx.jit(nnx.grad(loss))(model, images)
  mean, variance = stem.mean(axis=(0, 1, 2)), stem.var(axis=(0, 1, 2))
  np.testing.assert_allclose(model.stem.norm.mean[...], 0.1 * mean, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(model.stem.norm.var[...], 0.9 + 0.1 * variance, rtol=1e-3)
  for path, gradient in gradients.flat_state():
    assert np.abs(gradient.get_value()).max() > 0, path
