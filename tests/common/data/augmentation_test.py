"""RandAugment, mixup, cutmix, repeated augmentation: magnitudes, labels, identities, seeds."""

import functools

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from common.data import augmentation

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
IMAGES = jax.random.normal(jax.random.key(0), (4, 6, 8, 3))
LABELS = jax.nn.one_hot(jnp.arange(4), 5)


def apply(name, strength, sign=1, pixels=PIXELS):
  return np.asarray(augmentation.OPERATIONS[name](Image.fromarray(pixels), strength, sign))


# RandAugment.


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", augmentation.OPERATIONS)
def test_magnitude_zero_is_the_identity(name, sign):
  found = apply(name, 0.0, sign)
  assert found.shape == PIXELS.shape and found.dtype == np.uint8
  if name in ("autocontrast", "equalize", "invert"):  # Have no magnitude.
    np.testing.assert_array_equal(found, apply(name, 1.0, sign))
  elif name == "posterize":  # 4 bits are kept.
    np.testing.assert_array_equal(found, PIXELS & 0b11110000)
  else:
    np.testing.assert_array_equal(found, PIXELS)


@pytest.mark.parametrize("name", [*augmentation.OPERATIONS][3:])
def test_a_greater_magnitude_changes_more(name):
  # Of middle values, that nothing saturates; dark for solarizing, which takes the bright first.
  pixels = np.random.default_rng(1).normal(64 if name == "solarize" else 120, 12, (20, 30, 3))
  if name.startswith(("rotate", "shear", "translate")):  # Noise is as far from noise anywhere.
    pixels = np.broadcast_to(
      np.linspace(0, 100, 20)[:, None, None] + np.arange(90).reshape(1, 30, 3), (20, 30, 3)
    )
  pixels = pixels.astype(np.uint8)
  strengths = (0.2, 0.6, 1.0)
  change = [np.abs(apply(name, s, 1, pixels).astype(int) - pixels).mean() for s in strengths]
  assert change[0] < change[1] < change[2]


def test_operations_by_hand():
  np.testing.assert_array_equal(apply("invert", 1.0), 255 - PIXELS)
  np.testing.assert_array_equal(apply("posterize", 0.5), PIXELS & 0b11000000)
  turned = np.where(PIXELS >= 128, 255 - PIXELS, PIXELS)
  np.testing.assert_array_equal(apply("solarize", 0.5), turned)
  added = np.where(PIXELS < 128, PIXELS.astype(int) + 55, PIXELS)
  np.testing.assert_array_equal(apply("solarize_add", 0.5), added)
  brighter = np.clip(PIXELS.astype(float) * 1.45, 0, 255).astype(int)
  np.testing.assert_allclose(apply("brightness", 0.5), brighter, atol=1)
  np.testing.assert_array_equal(
    apply("color", 1 / 0.9, -1)[..., 0], apply("color", 1 / 0.9, -1)[..., 1]
  )
  # 0.45 x 30 / 1.5 = 9 columns; what comes in is the mean pixel.
  moved = apply("translate_x", 2 / 3)
  np.testing.assert_array_equal(moved[:, :21], PIXELS[:, 9:])
  np.testing.assert_array_equal(moved[:, 21:], np.broadcast_to(augmentation.FILL, (20, 9, 3)))
  np.testing.assert_array_equal(apply("translate_y", 2 / 3, -1)[6:], PIXELS[:14])
  # An edge at column 15 moves by 0.3 columns a row.
  edge = np.broadcast_to(np.where(np.arange(30) < 15, 0, 255)[None, :, None], (20, 30, 3))
  sheared = apply("shear_x", 1.0, pixels=edge.astype(np.uint8))
  found = np.argmax(sheared[..., 0] >= 128, axis=1)
  np.testing.assert_allclose(found, 15 - 0.3 * (np.arange(20) + 0.5), atol=0.6)


def test_the_seed_decides_and_magnitudes_are_noisy(monkeypatch):
  image = Image.fromarray(PIXELS)
  run = functools.partial(augmentation.rand_augment, image, magnitude=9)
  draw = lambda seed: np.asarray(run(np.random.default_rng(seed)))
  np.testing.assert_array_equal(draw(3), draw(3))
  assert len({draw(seed).tobytes() for seed in range(20)}) > 8
  same = np.mean([np.array_equal(draw(seed), PIXELS) for seed in range(200)])
  assert 0.15 < same < 0.4  # A quarter draws neither operation, some are without effect.

  seen = []
  record = lambda image, strength, sign: seen.append((strength, sign)) or image
  monkeypatch.setattr(augmentation, "OPERATIONS", dict.fromkeys("abc", record))
  rng = np.random.default_rng(0)
  for _ in range(400):
    run(rng)
  strengths, signs = np.array(seen).T
  assert 330 < len(seen) < 470 and strengths.max() == 1.0 and abs(signs.mean()) < 0.15
  # Clipping at 1 takes off a little of N(0.9, 0.05).
  np.testing.assert_allclose(strengths.mean(), 0.9, atol=0.01)
  augmentation.rand_augment(image, rng, magnitude=4, magnitude_std=0, num_ops=5, probability=1)
  assert [strength for strength, _ in seen[-5:]] == [0.4] * 5
  with pytest.raises(ValueError, match="magnitude=11; expected 0 to 10"):
    augmentation.rand_augment(image, rng, magnitude=11)


# Mixing.


@functools.partial(jax.jit, static_argnums=(1, 2))
def mixed(keys, mixup_alpha, cutmix_alpha):
  mix = functools.partial(
    augmentation.mix_batch, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha
  )
  return jax.vmap(lambda key: mix(key, IMAGES, LABELS))(keys)


KEYS = jax.random.split(jax.random.key(1), 200)


def shares(labels):
  """The share of each draw's own label; labels sum to one, and mix a batch with its reverse."""
  np.testing.assert_allclose(labels.sum(-1), 1, rtol=1e-5)
  share = labels[:, 0, 0]
  own, other = np.asarray(LABELS), np.asarray(LABELS)[::-1]
  expected = share[:, None, None] * own + (1 - share)[:, None, None] * other
  np.testing.assert_allclose(labels, expected, atol=1e-6)
  return share


def test_mixup_mixes_images_as_it_mixes_labels():
  images, labels = map(np.asarray, mixed(KEYS, 0.8, 0.0))
  share = shares(labels)
  weight = share[:, None, None, None, None]
  expected = weight * np.asarray(IMAGES) + (1 - weight) * np.asarray(IMAGES)[::-1]
  np.testing.assert_allclose(images, expected, atol=1e-5)
  # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)); three standard errors of 200 draws.
  np.testing.assert_allclose(share.mean(), 0.5, atol=0.07)
  np.testing.assert_allclose(share.var(), 1 / 10.4, atol=0.02)


def test_cutmix_counts_the_pixels_of_its_box():
  images, labels = map(np.asarray, mixed(KEYS, 0.0, 1.0))
  share = shares(labels)
  own = np.isclose(images[:, 0], np.asarray(IMAGES)[0]).all(-1)  # [draws, height, width]
  other = np.isclose(images[:, 0], np.asarray(IMAGES)[3]).all(-1)
  assert (own ^ other).all()
  np.testing.assert_allclose(own.mean((1, 2)), share, atol=1e-6)
  rows, columns = other.any(2), other.any(1)
  np.testing.assert_array_equal(other, rows[:, :, None] & columns[:, None])
  assert 0.3 < share.mean() < 0.9 and share.std() > 0.1


def test_one_of_the_two_at_a_time():
  images, labels = map(np.asarray, mixed(KEYS, 0.8, 1.0))
  shares(labels)
  cut = [np.isin(image, IMAGES).all() for image in images]
  assert 0.35 < np.mean(cut) < 0.65
  same, labels = augmentation.mix_batch(KEYS[0], IMAGES, LABELS, mixup_alpha=0.0, cutmix_alpha=0.0)
  assert same is IMAGES and labels is LABELS


# Repeated augmentation.


def test_copies_of_an_image_follow_each_other_and_epochs_differ():
  parent = grain.MapDataset.range(10).seed(0).shuffle()
  repeated = augmentation.RepeatedAugmentation(parent, 3)
  assert len(repeated) == 30
  epochs = repeated.repeat(2).random_map(lambda x, rng: (int(x), float(rng.random())))
  order = np.array([x for x, _ in epochs]).reshape(2, 10, 3)
  assert (order == order[..., :1]).all()
  first, second = order[..., 0]
  assert sorted(first) == sorted(second) == list(range(10)) and first.tolist() != second.tolist()
  assert len({noise for _, noise in epochs}) == 60  # Each copy is augmented in its own way.
