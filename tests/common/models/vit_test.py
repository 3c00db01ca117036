import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.models.vit import VisionTransformer, VisionTransformerConfig

VIT = VisionTransformerConfig(
  image_size=(8, 12),
  patch_size=(4, 3),
  hidden_size=16,
  intermediate_size=24,
  num_layers=1,
  num_heads=2,
  head="classification",
  labels=("a", "b", "c"),
)
DEIT = dataclasses.replace(VIT, distillation_token=True, head="distilled", family="deit")


@nnx.jit
def run(model, images):
  return model(images)


def random_images(seed, count=2):
  return np.random.default_rng(seed).normal(size=(count, 8, 12, 3)).astype(np.float32)


def test_patches_are_cut_row_by_row():
  model = VisionTransformer(VIT, rngs=nnx.Rngs(0))
  images = random_images(0)
  patches = images.reshape(2, 2, 4, 4, 3, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 8, 36)
  kernel = model.embed_patches.kernel[...].reshape(36, 16)
  expected = patches @ np.asarray(kernel) + np.asarray(model.embed_patches.bias[...])
  np.testing.assert_allclose(model.embed_patches(images).reshape(2, 8, 16), expected, atol=1e-5)


def test_shapes_and_special_tokens():
  assert VIT.sequence_length == 9 and DEIT.sequence_length == 10
  out = run(VisionTransformer(VIT, rngs=nnx.Rngs(1)), random_images(1))
  assert out.hidden.shape == (2, 9, 16) and out.logits.shape == (2, 3) and out.pooled is None
  bare = dataclasses.replace(VIT, head="none", labels=(), pooler_size=5)
  model = nnx.eval_shape(lambda: VisionTransformer(bare, rngs=nnx.Rngs(1)))
  out = nnx.eval_shape(lambda model, x: model(x), model, random_images(1))
  assert out.pooled.shape == (2, 5) and out.logits is None


def test_images_do_not_see_each_other():
  model = VisionTransformer(VIT, rngs=nnx.Rngs(2))
  images = random_images(2)
  before = run(model, images).logits
  images[1] *= -2
  after = run(model, images).logits
  np.testing.assert_allclose(after[0], before[0], atol=1e-6)
  assert np.abs(after[1] - before[1]).max() > 1e-3


def test_deit_averages_the_heads_of_its_two_tokens():
  model = VisionTransformer(DEIT, rngs=nnx.Rngs(3))
  out = run(model, random_images(3))
  by_class = model.class_classifier(out.hidden[:, 0])
  by_distillation = model.distillation_classifier(out.hidden[:, 1])
  np.testing.assert_allclose(out.logits, (by_class + by_distillation) / 2, atol=1e-6)
  assert np.abs(by_class - by_distillation).max() > 1e-2


def test_another_image_size_is_refused():
  model = VisionTransformer(VIT, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="images of shape"):
    model(jnp.zeros((1, 12, 8, 3)))
