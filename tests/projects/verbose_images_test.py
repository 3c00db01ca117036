"""The losses against the official code and brute force, the attack's invariants, defences, bad input."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file
from scipy.stats import ortho_group

from common.checkpoints.huggingface import save_model
from common.decoding.generation import Sampling, generate
from common.errors import UserError
from common.models.vit import VisionTransformer
from projects.verbose_images import captions, config, defences, experiment, measures
from projects.verbose_images import verbose_images as vi
from projects.verbose_images.attack import Budget, attack, losses_of, random_noise
from projects.verbose_images.generation import (
  NO_BIAS,
  EosBias,
  beam_captions,
  caption_step,
  prefix_decoder,
  row_sampling,
  sample_keys,
)
from projects.verbose_images.victims import Victim, attributes_of, build
from projects.verbose_images.vlm import (
  PrefixProjector,
  VisionLanguageModel,
  load_vlm,
  of_steps,
  teacher_forced,
)
from tests.common.models.small_decoders import ARCHITECTURES, random_decoder

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "verbose_images"
WIDTH, SAMPLES = 12, 2


def golden(name):
  with np.load(GOLDEN / f"{name}.npz") as arrays:
    return dict(arrays)


@pytest.fixture(scope="module")
def settings():
  """The tiny preset with another width of text."""
  tiny = config.get_config("tiny")
  tiny.cap, tiny.ablate_cap = WIDTH, ()
  return tiny


@pytest.fixture(scope="module")
def digits(settings):
  return captions.digit_images(settings.image_size)


@pytest.fixture(scope="module")
def victim(settings, digits):
  """An untrained model with its images."""
  some = captions.Images(*(x[:4] for x in digits[1]))
  return Victim(
    model=build(settings, 0),
    images=some,
    clean=some,
    calibration=some,
    batch=4,
    separator=captions.IDS[captions.SEPARATOR],
    count_words=len,
    training=digits[0],
  )


@pytest.fixture(scope="module")
def protocol():
  return measures.Protocol(jax.random.key(3), SAMPLES, Sampling(1.0, top_p=0.9), WIDTH, WIDTH)


# --- losses and weights -------------------------------------------------------------------------


def test_losses_of_the_official_code():
  g = golden("losses_and_weights")
  logits, eos = jnp.asarray(g["logits"]), int(g["eos_id"])
  mask = jnp.ones(logits.shape[:2], bool)
  # float32 sums in another order.
  np.testing.assert_allclose(vi.uncertainty_loss(logits, mask)[0], g["loss_uncertainty"], rtol=1e-5)
  np.testing.assert_allclose(vi.eos_loss(logits, mask, eos)[0], g["loss_eos"], rtol=1e-5)
  stacked = vi.all_layers(jnp.asarray(g["hidden_states"]))
  rows = jnp.ones(stacked.shape[:2], bool)
  np.testing.assert_allclose(vi.diversity_loss(stacked, rows)[0], g["loss_diversity"], rtol=1e-5)


def test_weights_of_the_official_code():
  g = golden("losses_and_weights")
  history = g["history"]
  expected = g["ratio1_ratio2_lambda1_lambda2_loss"]
  weights = vi.Weights(jnp.ones(1), jnp.ones(1))
  for t, (uncertainty, eos, diversity) in enumerate(history, 1):
    column = lambda x: jnp.full(1, x, jnp.float32)
    zero = column(0.0)
    losses = vi.Losses(column(eos), column(uncertainty), column(diversity), zero, zero)
    weights = vi.update_weights(weights, losses, jnp.int32(t), 1.0, 0.9)
    found = (*vi.temporal_decay(t), weights.eos[0], weights.diversity[0])
    # The reference is float64; T1 near its change of sign loses three digits.
    np.testing.assert_allclose(found, expected[t - 1, :4], rtol=1e-4)
    total = vi.total_loss(losses, weights, vi.VERBOSE)
    np.testing.assert_allclose(total[0], expected[t - 1, 4], rtol=1e-3)


def test_projection_of_the_official_code():
  g = golden("pixel_clamp")
  mean = np.array([0.48145466, 0.4578275, 0.40821073])[:, None, None]
  std = np.array([0.26862954, 0.26130258, 0.27577711])[:, None, None]
  low, high = (jnp.asarray((bound - mean) / std, jnp.float32) for bound in (0, 1))
  clean, delta = jnp.asarray(g["clean_normalised"]), jnp.asarray(g["delta"])
  valid = vi.project(delta, clean, jnp.inf, low, high)
  # The constants of CLIP times float32.
  np.testing.assert_allclose(valid, g["after_pixel_clamp"], atol=1e-6)
  found = vi.project(delta, clean, float(g["eps"]), low, high)
  np.testing.assert_allclose(found, g["after_eps_clamp"], atol=1e-6)


def test_losses_by_their_definition():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(3, 5, 7)), jnp.float32)
  mask = jnp.asarray(np.arange(5) < np.array([[5], [3], [1]]))
  log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
  kl = (-np.log(7) - log_p.mean(axis=-1)) * mask
  np.testing.assert_allclose(vi.uncertainty_loss(logits, mask), kl.sum(axis=1), rtol=1e-5)
  uniform = jnp.full((1, 5, 7), 2.5)
  everywhere = jnp.ones((1, 5), bool)
  # Five steps of float32.
  np.testing.assert_allclose(vi.uncertainty_loss(uniform, everywhere), 0, atol=1e-5)
  assert (vi.uncertainty_loss(logits, mask) > 0.01).all()
  np.testing.assert_allclose(vi.eos_loss(uniform, everywhere, 2), 1 / 7, rtol=1e-6)
  raised = [float(vi.eos_loss(logits.at[..., 2].add(b), mask, 2)[0]) for b in (-1.0, 0.0, 1.0)]
  assert raised == sorted(raised) and raised[0] < raised[2]
  # NICGSlowDown, written out for one row.
  tokens = jnp.asarray(rng.integers(0, 7, (3, 5)))
  z, p, y = np.asarray(logits[1], float), np.exp(log_p[1]), np.asarray(tokens[1])
  steps = [z[t, 2] + z[t, y[t]] - 2 * (p[t] * z[t]).sum() for t in range(3)]
  np.testing.assert_allclose(vi.nicg_loss(logits, tokens, mask, 2)[1], np.mean(steps), rtol=1e-5)
  layers = [
    rng.normal(size=(2, 3, 4)).astype(np.float32),
    rng.normal(size=(2, 5)).astype(np.float32),
  ]
  expected = [-sum(np.linalg.norm(layer[i]) for layer in layers) for i in range(2)]
  np.testing.assert_allclose(vi.sponge_loss([jnp.asarray(x) for x in layers]), expected, rtol=1e-5)


def test_nuclear_norm_and_its_gradient():
  rng = np.random.default_rng(0)
  h = rng.normal(size=(2, 6, 4)).astype(np.float32)
  found = vi.nuclear_norm(jnp.asarray(h))
  expected = [scipy.linalg.svdvals(x).sum() for x in h]
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  frobenius = np.linalg.norm(h, axis=(1, 2))
  assert (frobenius <= found).all() and (found <= 2 * frobenius * (1 + 1e-6)).all()
  q = ortho_group.rvs(6, random_state=0).astype(np.float32)
  np.testing.assert_allclose(vi.nuclear_norm(q @ h), found, rtol=1e-5)
  rank_one = np.outer(h[0, :, 0], h[1, 0])[None]
  np.testing.assert_allclose(vi.nuclear_norm(rank_one), np.linalg.norm(rank_one), rtol=1e-5)
  direction = rng.normal(size=h.shape).astype(np.float32)
  gradient = jax.grad(lambda x: vi.nuclear_norm(x).sum())(jnp.asarray(h))
  with jax.enable_x64():
    step = 1e-5 * direction.astype(np.float64)
    singular = lambda x: np.linalg.svd(x, compute_uv=False).sum()
    slope = (singular(h + step) - singular(h - step)) / 2e-5
  # float32 of a decomposition.
  np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-3)
  # Zero and repeated singular values have a subgradient of norm 1 at most.
  for singular in (rank_one, np.zeros((1, 6, 4), np.float32), np.eye(6, 4, dtype=np.float32)[None]):
    gradient = np.asarray(jax.grad(lambda x: vi.nuclear_norm(x).sum())(jnp.asarray(singular)))
    assert np.isfinite(gradient).all() and scipy.linalg.svdvals(gradient[0])[0] < 1 + 1e-5


def test_weights_balance_the_losses():
  losses = vi.Losses(*(jnp.array([x]) for x in (0.02, 130.0, -80.0, 0.0, 0.0)))
  for t in (1, 7, 8, 100):
    first, second = vi.temporal_decay(t)
    weights = vi.balanced_weights(losses, (first, second))
    np.testing.assert_allclose(abs(weights.eos * losses.eos * first), 130, rtol=1e-5)
    np.testing.assert_allclose(abs(weights.diversity * losses.diversity * second), 130, rtol=1e-5)
  # T1 = 0 at t = e^2.
  assert abs(float(vi.temporal_decay(np.exp(2.0))[0])) >= vi.SMALLEST_DECAY * (1 - 1e-6)
  # Weights of the first iteration are kept with smoothing 1.
  old = vi.update_weights(vi.Weights(jnp.ones(1), jnp.ones(1)), losses, jnp.int32(1), 0.0, 1.0)
  new = vi.update_weights(old, losses._replace(eos=jnp.array([0.5])), jnp.int32(2), 0.0, 1.0)
  np.testing.assert_array_equal(new.eos, old.eos)


def test_gradients_against_finite_differences(victim):
  images = jnp.asarray(victim.images.pixels[:2])
  tokens = jnp.asarray(np.random.default_rng(0).integers(2, 20, (2, WIDTH)))
  steps = jnp.array([WIDTH, 5])
  direction = jax.random.normal(jax.random.key(0), images.shape)

  @jax.jit
  def along(t):
    """The losses of both images, summed, some way along the direction."""
    losses = losses_of(victim.model, images + t * direction, tokens, steps, "paper")
    return jnp.stack(losses).sum(axis=1)

  # The nuclear norm has a backward rule only.
  slopes = jax.jacrev(along)(0.0)
  h = 5e-3
  differences = (along(h) - along(-h)) / (2 * h)
  # Rounding of float32 losses over 2 h, and the third derivative's share.
  assert (jnp.abs(slopes - differences) < 1e-3 * jnp.abs(along(0.0)) + 0.02 * jnp.abs(slopes)).all()
  assert (jnp.abs(slopes) > 0).all()


# --- the attack ---------------------------------------------------------------------------------


def run_attack(victim, objective, eps):
  return attack(
    victim.model,
    jnp.asarray(victim.images.pixels),
    jax.random.key(0),
    jax.tree.map(jnp.float32, objective),
    Budget(jnp.float32(eps), jnp.float32(2 / 255), jnp.int32(WIDTH)),
    width=WIDTH,
    iterations=5,
    samples=SAMPLES,
    sampling=Sampling(1.0, top_p=0.9),
    transform=defences.Transform(jnp.int32(0), jnp.float32(0)),
  )


def test_attack_stays_in_the_ball_and_selects_the_longest(victim):
  eps, images = np.float32(16 / 255), victim.images.pixels
  for objective in (vi.VERBOSE, vi.SPONGE):
    found = run_attack(victim, objective, eps)
    assert (found.images >= 0).all() and (found.images <= 1).all()
    # x + delta is rounded once.
    assert (jnp.abs(found.images - images) <= eps + 6e-8).all()
    best = np.maximum(np.max(found.lengths, axis=0), found.clean_length)
    np.testing.assert_array_equal(found.length, best)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
  losses = losses_of(
    victim.model, found.images, jnp.zeros((4, WIDTH), jnp.int32), jnp.full(4, 3), "code"
  )
  assert all(np.isfinite(x).all() for x in losses)


def test_projection_is_exact():
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.random((200, 8, 8, 1)), jnp.float32).at[:, 0].set(0).at[:, 1].set(1)
  eps = jnp.float32(8 / 255)
  delta = vi.project(jnp.asarray(rng.normal(size=images.shape), jnp.float32), images, eps)
  assert jnp.max(jnp.abs(delta)) == eps
  assert jnp.min(images + delta) >= 0 and jnp.max(images + delta) <= 1
  noise = random_noise(images, jax.random.key(0), eps)
  inside = (images > eps) & (images < 1 - eps)
  np.testing.assert_allclose(jnp.abs(noise - images)[inside], eps, atol=6e-8)
  assert jnp.min(noise) >= 0 and jnp.max(noise) <= 1


def test_no_budget_changes_nothing(victim, protocol):
  found = run_attack(victim, vi.VERBOSE, 0.0)
  np.testing.assert_array_equal(found.images, victim.images.pixels)
  look = lambda images: measures.measure(
    victim, np.asarray(images), protocol, attributes=attributes_of(victim.images)
  )
  one, other = look(found.images), look(victim.images.pixels)
  jax.tree.map(np.testing.assert_array_equal, one.captions, other.captions)
  assert one.quality == other.quality
  np.testing.assert_array_equal(one.flops, other.flops)


# --- generation and the model -------------------------------------------------------------------


def greedy(victim, cap, bias=NO_BIAS):
  graphdef, params = nnx.split(victim.model)
  keys = sample_keys(jax.random.key(0), 4, SAMPLES)
  rows = row_sampling(Sampling(), 4 * SAMPLES)
  bias = EosBias(jnp.float32(bias.slope), jnp.float32(bias.start))
  return caption_step(
    graphdef, params, jnp.asarray(victim.images.pixels), keys, rows, jnp.int32(cap), WIDTH, bias
  )


def test_captions_are_those_of_the_shared_decoding(victim):
  images = jnp.asarray(victim.images.pixels)
  found = greedy(victim, WIDTH)
  decoder, prompts = prefix_decoder(victim.model, victim.model.encode(images)[0])
  expected = generate(decoder, prompts, max_new_tokens=WIDTH, stop_tokens=victim.model.eos)
  for row, length, text in zip(found.tokens[:, 0], found.lengths[:, 0], expected):
    assert row[:length].tolist() == text
  beams = beam_captions(victim.model, images, max_new_tokens=WIDTH, num_beams=1)
  assert [h.tokens for h in beams] == expected
  # And of the pass over the whole text, of which the drawn tokens are the likeliest.
  forced = teacher_forced(victim.model, images, found.tokens[:, 0])
  logits, _ = of_steps(forced, victim.model.num_prefix)
  meant = np.arange(WIDTH) < np.asarray(found.steps[:, 0])[:, None]
  assert (np.asarray(logits.argmax(-1) == found.tokens[:, 0]) | ~meant).all()
  entropy = -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(-1)
  # Keys and values of a cache against those of one pass, float32.
  np.testing.assert_allclose(found.entropy[:, 0], np.where(meant, entropy, 0), atol=1e-4)


def test_cap_and_eos_bias(victim):
  longest = greedy(victim, 7)
  assert longest.lengths.max() <= 7 and longest.steps.max() <= 7
  soon = greedy(victim, WIDTH, EosBias(1e6, 3.0))
  assert soon.lengths.max() <= 4
  never = greedy(victim, WIDTH, EosBias(-1e6, -1.0))
  assert (never.lengths == WIDTH).all()


def test_parts_of_a_loaded_model(tmp_path, victim):
  vision_config = dataclasses.replace(victim.model.vision.config, pooler_size=16)
  vision = VisionTransformer(vision_config, rngs=nnx.Rngs(0))
  decoder = random_decoder(ARCHITECTURES["opt"])
  width = decoder.config.embedding_dim or decoder.config.hidden_size
  projector = PrefixProjector(16, 2, 3, width, rngs=nnx.Rngs(1))
  save_model(vision, tmp_path / "vision")
  save_model(decoder, tmp_path / "decoder")
  tensors = {
    ".".join(map(str, path)): np.asarray(x[...]) for path, x in nnx.state(projector).flat_state()
  }
  file = tmp_path / "projector.safetensors"
  save_file(tensors, file)
  parts = [str(tmp_path / "vision"), str(tmp_path / "decoder")]
  loaded = load_vlm(*parts, str(file), eos=2)
  ours = VisionLanguageModel(vision, projector, decoder, eos=2, mean=loaded.mean, std=loaded.std)
  images = jnp.asarray(victim.images.pixels[:1])
  tokens = jnp.ones((1, 4), jnp.int32)
  ours.mean = loaded.mean = (0.5,)
  ours.std = loaded.std = (0.5,)
  found, expected = (teacher_forced(m, images, tokens).logits for m in (loaded, ours))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  for wrong, message in (
    ({"queries": tensors["queries"] * np.nan}, "'queries' holds NaN"),
    ({"k_proj.kernel": np.zeros((3, 3), np.float32)}, "k_proj.kernel has shape"),
  ):
    save_file(tensors | wrong, file)
    with pytest.raises(UserError, match=message):
      load_vlm(*parts, str(file), eos=1)
  with pytest.raises(UserError, match="no projector"):
    load_vlm(*parts, "", eos=1)
  with pytest.raises(UserError, match="no vision transformer"):
    load_vlm(parts[1], parts[1], str(file), eos=1)
  blip = tmp_path / "blip"
  blip.mkdir()
  (blip / "config.json").write_text('{"model_type": "blip-2"}')
  with pytest.raises(UserError, match="Q-Former cannot be read"):
    load_vlm(str(blip), parts[1], str(file), eos=1)


# --- data, measures, defences -------------------------------------------------------------------


def test_captions_say_what_applies(digits):
  rng = np.random.default_rng(0)
  tokens = captions.caption_array(digits[1].attributes, 24, rng)
  lengths = (tokens != captions.IDS[captions.PAD]).sum(axis=1) - 1
  assert lengths.min() == 3 and lengths.max() == captions.LONGEST
  for row, length, truth in zip(tokens[:50], lengths, digits[1].attributes):
    assert captions.caption_quality(row[:length], truth) == (1.0, 0.0, 0.0)
  words = lambda text: np.array([captions.IDS[w] for w in text.split()])
  text = words("the digit two , using much ink , using much ink , leaning to the left")
  assert captions.mentions(text) == [(0, 2), (3, 2), (3, 2), (2, 1)]
  # Ink is right, slant is false, thickness is missing, symmetry is rightly not said.
  quality = captions.caption_quality(text, np.array([2, 1, 0, 2, 0]))
  np.testing.assert_allclose(quality, (3 / 5, 1 / 4, 1))


def test_similarity_and_flops(victim):
  images = victim.images.pixels
  np.testing.assert_allclose(measures.ssim(images, images), 1)
  shifted = measures.ssim(images, np.clip(images + 0.3, 0, 1))
  assert (shifted < 0.95).all()
  np.testing.assert_allclose(measures.l2_distance(images, images + 0.5), 0.5 * 16, rtol=1e-6)
  # More steps cost more; and the slope is at least two FLOPs for each weight of the decoder.
  flops = measures.caption_flops(victim.model, np.array([1, 2, 10]))
  weights = 4 * 16 * 16 + 2 * 16 * 32 + 16 * len(captions.WORDS)
  assert flops[1] - flops[0] > 2 * weights and flops[2] - flops[1] > 8 * 2 * weights
  low, high = measures.paired_interval(np.arange(50.0), np.arange(50.0) - 2, 100)
  assert low == high == 2


def test_transforms(victim):
  images, key = jnp.asarray(victim.images.pixels), jax.random.key(0)
  moved = jnp.asarray(np.random.default_rng(0).random(images.shape), jnp.float32)
  apply = jax.jit(defences.apply_transform)
  for index, name in enumerate(defences.TRANSFORMS):
    none = apply(moved, defences.Transform(jnp.int32(index), jnp.float32(0)), key)
    # The Gaussian's weights are divided by their sum.
    np.testing.assert_allclose(none, moved, atol=1e-6, err_msg=name)
    some = apply(moved, defences.Transform(jnp.int32(index), jnp.float32(0.4)), key)
    assert some.min() >= 0 and some.max() <= 1
    assert index == 0 or jnp.abs(some - moved).max() > 0.01
  levels = np.unique(apply(moved, defences.Transform(jnp.int32(2), jnp.float32(0.5)), key))
  np.testing.assert_allclose(levels, [0, 0.5, 1])
  median = scipy.ndimage.median_filter(np.asarray(images), (1, 3, 3, 1), mode="nearest")
  found = apply(images, defences.transform("median filter", 1.0), key)
  np.testing.assert_allclose(found, median, atol=1e-6)
  blurred = scipy.ndimage.gaussian_filter(
    np.asarray(images), (0, 1, 1, 0), mode="nearest", truncate=3
  )
  found = apply(images, defences.transform("Gaussian filter", 1.0), key)
  np.testing.assert_allclose(found, blurred, atol=1e-5)


def test_budget_and_monitor():
  comma, text = 9, np.array([[1, 2, 9, 3, 4, 5, 9, 6], [1, 2, 3, 4, 5, 6, 7, 8]])
  lengths = np.array([8, 8])
  cut = lambda budget: defences.graceful_lengths(text, lengths, np.full(2, budget), comma).tolist()
  assert cut(8) == [8, 8] and cut(7) == [6, 7] and cut(5) == [2, 5] and cut(0) == [0, 0]
  options = {"window": 2, "ngram": 2, "repeats": 1, "entropy_limit": np.inf}
  tokens = np.array([[1, 2, 3, 1, 2, 5], [1, 2, 3, 4, 5, 6]])
  stop = lambda entropy, **changes: defences.monitored_lengths(
    tokens, np.array([6, 6]), entropy, **options | changes
  ).tolist()
  calm = np.zeros((2, 6))
  assert stop(calm) == [5, 6] and stop(calm, repeats=9) == [6, 6]
  assert stop(np.tile([0.0, 0, 1, 1, 1, 1], (2, 1)), entropy_limit=0.9) == [4, 4]
  # Nothing behind the end raises an alarm.
  found = defences.monitored_lengths(tokens, np.array([4, 2]), calm, **options)
  assert found.tolist() == [4, 2]
  perfect = defences.detection(np.zeros(200), np.ones(5))
  assert perfect == (1.0, 1.0)
  assert defences.detection(np.arange(100.0), np.arange(100.0)).auroc == 0.5


def test_bad_input_is_refused(tmp_path):
  for name, value, message in (
    ("cap", 0, "cap=0 must be positive"),
    ("images", 5, "images=5: expected a multiple of batch_images=4"),
    ("eps", 300.0, "eps=300.0: expected pixels of 255"),
    ("variant", "other", "expected paper or code"),
    ("seeds", (), "expected at least one"),
    ("transforms", (("sharpen", 1.0),), "'sharpen' with strength"),
    ("adaptive_transforms", ("other",), "not among the transforms"),
    ("monitor_window", 99, "expected 1 to cap"),
    ("clean_images", 400, "397 held-out"),
    ("top_p", 0.0, "top_p in"),
    ("patch_size", 5, "expected a multiple of 8"),
    ("num_steps", 0, "warmup_steps"),
  ):
    wrong = config.get_config("tiny")
    wrong[name] = value
    with pytest.raises(UserError, match=message):
      experiment.check(wrong)
  wrong = config.get_config("tiny")
  wrong.seeds = (0,)
  for source, message in (("tfds:coco", "folder:PATH"), ("folder:nowhere", "there is no folder")):
    wrong.data = source
    with pytest.raises(UserError, match=message):
      experiment.check(wrong)
  Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
  wrong.data = f"folder:{tmp_path}"
  with pytest.raises(UserError, match="1 images .* expected 20"):
    experiment.check(wrong)


def test_tiny_run(tmp_path):
  report = experiment.run(config.get_config("tiny"), tmp_path)
  rows = {row[0]: row for row in report.tables[0].rows}
  assert set(rows) == {
    "original",
    "random noise",
    "Sponge samples",
    "NICGSlowDown",
    "verbose images",
  }
  assert rows["original"][3] == 1
  titles = {table.title for table in report.tables}
  assert {"Losses and weights", "Decoding", "Black-box transfer"} <= titles
  assert all((tmp_path / figure.path).stat().st_size for figure in report.figures)
  assert len(report.claims) >= 10
