"""RADD: vectors of the official code, the theorems by enumeration, samplers, and the tiny run."""

import functools
import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import comb

from common.decoding.generation import Sampling
from common.errors import UserError
from projects.radd import config, exact, experiment, likelihood, network, radd, sampling
from projects.radd.network import Denoiser, decoder_config
from projects.radd.training import parameter_ema

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "radd"
V, LENGTH = 3, 3  # Of everything that is enumerated; the mask token is V.
MASKS = np.array(list(itertools.product([False, True], repeat=LENGTH))[1:])
LONG = 12  # Of samples.
LOG_LINEAR = radd.log_linear(1e-6)  # Leaves nothing out of time.

initialise = nnx.jit(
  lambda time: Denoiser(
    decoder_config(V, 16, 1, 2, LONG), time_conditioned=time, rngs=nnx.Rngs(0)
  ),
  static_argnums=0,
)  # fmt: skip
apply = nnx.jit(lambda model, tokens, noise: model(tokens, noise))


@pytest.fixture(scope="module")
def source():
  """p_0(x), float64 [V] * LENGTH."""
  return exact.markov_chain(V, LENGTH, np.random.default_rng(0))


@pytest.fixture(scope="module")
def conditionals(source):
  """c(z)[i, a] with the truth for every partly masked z; 1 / V where nothing is asked."""
  joint = exact.joint(source)
  total = joint.sum(axis=-1, keepdims=True)
  return np.where(total > 0, joint / np.where(total > 0, total, 1), 1 / V)


def with_head(model, seed=0):
  """The model with a head that is not zero, so that its output says something."""
  kernel = model.lm_head.kernel
  kernel[...] = jax.random.normal(jax.random.key(seed), kernel.shape) / 4
  return model


@pytest.fixture(scope="module")
def denoiser():
  return with_head(initialise(False))


@pytest.fixture(scope="module")
def sedd():
  return initialise(True)


def test_schedules_and_unmasking_of_the_official_code():
  with np.load(GOLDEN / "schedules.npz") as golden:
    t, times = golden["t"], golden["timesteps"]
    dt = (1 - float(golden["eps"])) / int(golden["steps"])
    for name, key in (("log_linear", "loglinear"), ("geometric", "geometric")):
      schedule = radd.SCHEDULES[name]
      np.testing.assert_allclose(schedule.noise(t), golden[f"{key}_total"], rtol=2e-5)
      np.testing.assert_allclose(schedule.rate(t), golden[f"{key}_rate"], rtol=2e-5)
      for rule in sampling.RULES:
        rho = sampling.unmask_probability(rule, name, times[:-1], dt)
        # The official code forms exp(-noise) in float32: a difference of two such near 1.
        np.testing.assert_allclose(rho, golden[f"{key}_{rule}_rate"], rtol=2e-4, atol=2e-6)


def test_losses_of_the_official_code():
  with np.load(GOLDEN / "losses.npz") as golden:
    x, mask_token = jnp.asarray(golden["x"], jnp.int32), int(golden["mask_id"])
    for name in ("t_DSE", "t_DCE", "lambda_DCE", "k_DCE"):
      logits, masked = golden[f"{name}_logits"], golden[f"{name}_noisy"] == mask_token
      log_c = jax.nn.log_softmax(logits[..., :mask_token])
      expected, function = golden[f"{name}_value"], getattr(radd, name.lower())
      if name.startswith("t"):
        t = golden[f"{name}_t"]
        noise, rate = (f(t) for f in radd.SCHEDULES["log_linear"])
        value = function(log_c, x, masked, noise, rate)
        if name == "t_DCE":
          # The code's value has a term without parameters besides, which is no part of the loss.
          ratio = np.expm1(np.float64(noise))
          expected = expected - masked.sum(axis=1) * rate / ratio * np.log(ratio)
      else:
        value = function(log_c, x, masked, golden[f"{name}_{name.partition('_')[0]}"])
      np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)


def test_every_mask_of_a_size_has_one_weight():
  """1 / (k C(l, k)), by the losses' own weights; the integral over lambda is a polynomial's."""
  log_c, x = jnp.full((1, LENGTH, V), -1.0), jnp.zeros((1, LENGTH), jnp.int32)
  nodes, weights = np.polynomial.legendre.leggauss(16)
  nodes, weights = (nodes + 1) / 2, weights / 2
  for masked in MASKS:
    k = masked.sum()
    expected = 1 / (k * comb(LENGTH, k)) * k  # Each of the k positions costs 1 here.
    any_order = radd.k_dce(log_c, x, masked[None], k)[0] / (LENGTH * comb(LENGTH, k))
    chance = nodes**k * (1 - nodes) ** (LENGTH - k)
    losses = [radd.lambda_dce(log_c, x, masked[None], node)[0] for node in nodes]
    np.testing.assert_allclose(any_order, expected, rtol=1e-6)
    np.testing.assert_allclose(weights @ (chance * np.array(losses)), expected, rtol=1e-6)


def expectations(table, x, schedule):
  """The expectations of the four losses for one x, over all masks and levels: {loss: nats}.

  Args:
    table: c of every partly masked sequence.
    x: [LENGTH].
    schedule: of the t losses, by whose mask probabilities the integral over time is cut.
  """
  z = np.where(MASKS, V, x)
  rows = np.ravel_multi_index(tuple(z.T), (V + 1,) * LENGTH)
  log_c = jnp.log(jnp.asarray(table[rows], jnp.float32))
  x = jnp.broadcast_to(jnp.asarray(x), z.shape)
  nodes, weights = np.polynomial.legendre.leggauss(40)
  return _expectations(log_c, x, np.float32((nodes + 1) / 2), weights / 2, schedule)


@functools.partial(jax.jit, static_argnums=4)
def _expectations(log_c, x, nodes, weights, schedule):
  k = MASKS.sum(axis=1)
  chance = lambda level: level[:, None] ** k * (1 - level[:, None]) ** (LENGTH - k)
  over_levels = lambda loss, *levels: jax.vmap(lambda *level: loss(log_c, x, MASKS, *level))(
    *levels
  )
  noise, rate = schedule.noise(nodes), schedule.rate(nodes)
  whole = lambda level: level[:, None] + jnp.zeros(len(MASKS))
  t_chance = chance(radd.mask_probability(noise))
  result = {
    name: weights @ jnp.sum(t_chance * over_levels(loss, whole(noise), whole(rate)), axis=1)
    for name, loss in (("t_dse", radd.t_dse), ("t_dce", radd.t_dce))
  }
  lambda_losses = over_levels(radd.lambda_dce, nodes)
  result["lambda_dce"] = weights @ jnp.sum(chance(nodes) * lambda_losses, axis=1)
  uniform = 1 / (LENGTH * comb(LENGTH, k))
  return result | {"k_dce": radd.k_dce(log_c, x, MASKS, k) @ uniform}


@pytest.mark.parametrize("schedule", [LOG_LINEAR, radd.geometric()])
def test_with_the_true_conditionals_every_loss_is_the_likelihood(schedule, source, conditionals):
  """And change of variable: both schedules give one number, but for what they leave out of time."""
  for x in ((0, 1, 2), (2, 2, 0)):
    values = expectations(conditionals, np.array(x), schedule)
    # Quadrature over the geometric schedule leaves the mask probabilities below 1e-4 out.
    np.testing.assert_allclose(list(values.values()), -math.log(source[x]), rtol=1e-3)


def test_a_uniform_network_costs_log_v_for_each_token(sedd):
  table = np.full(((V + 1) ** LENGTH, LENGTH, V), 1 / V)
  values = expectations(table, np.array([0, 1, 2]), LOG_LINEAR)
  np.testing.assert_allclose(list(values.values()), LENGTH * math.log(V), rtol=1e-4)
  tokens, noise = jnp.full((4, LONG), V), jnp.array([0.1, 1.0, 3.0, 6.0])
  for model in (initialise(False), sedd):
    np.testing.assert_allclose(apply(model, tokens, noise), -math.log(V), rtol=1e-6)


def test_score_entropy_is_cross_entropy_where_c_is_normalised():
  rng = np.random.default_rng(1)
  log_c = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(8, 5, 4)), jnp.float32))
  x, masked = jnp.asarray(rng.integers(4, size=(8, 5))), rng.random((8, 5)) < 0.5
  noise, rate = (f(jnp.linspace(0.01, 0.99, 8)) for f in radd.SCHEDULES["log_linear"])
  a, b = (f(log_c, x, masked, noise, rate) for f in (radd.t_dse, radd.t_dce))
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_concrete_score_is_a_conditional_times_a_scalar(t, source, conditionals):
  """Theorem 1, with p_t by brute force over all clean sequences."""
  noise = float(radd.SCHEDULES["log_linear"].noise(t))
  stays = np.vstack([math.exp(-noise) * np.eye(V), np.full(V, 1 - math.exp(-noise))])
  p_t = np.einsum("abc,xa,yb,zc->xyz", source, stays, stays, stays)
  z = exact.partly_masked(V, LENGTH)
  for row, i, a in itertools.product(range(len(z)), range(LENGTH), range(V)):
    if z[row, i] == V:
      moved = z[row].copy()
      moved[i] = a
      score = p_t[tuple(moved)] / p_t[tuple(z[row])]
      np.testing.assert_allclose(score, conditionals[row, i, a] / np.expm1(noise), rtol=1e-5)


def test_the_exact_bound_of_the_truth_is_the_entropy(source, conditionals):
  assert exact.expected_bound(source, np.log(conditionals)) == pytest.approx(exact.entropy(source))
  assert exact.expected_bound(source, np.full(conditionals.shape, -math.log(V))) == pytest.approx(
    LENGTH * math.log(V)
  )


def test_bounds_and_orders_of_a_network_by_enumeration(source, denoiser):
  """The bound is the mean over all orders of the likelihood in that order, for a network as well."""
  graphdef, state = nnx.split(denoiser)
  log_c = np.asarray(experiment.log_c_of(graphdef, state, exact.partly_masked(V, LENGTH)), float)
  x = np.array(list(itertools.product(range(V), repeat=LENGTH)), np.int32)
  orders = list(itertools.permutations(range(LENGTH)))
  nll = np.mean([likelihood.ordered_nll(denoiser, x, np.array(o)) for o in orders], axis=0)
  expected = exact.expected_bound(source, log_c)
  assert source.ravel() @ nll == pytest.approx(expected, rel=1e-5)
  estimated = likelihood.bound(denoiser, x, jax.random.key(0), draws=256, loss="t_dse")
  np.testing.assert_allclose(estimated.nll, nll.mean() / LENGTH, atol=4 * estimated.nll_error)


def test_levels_and_masks():
  key = jax.random.key(0)
  parts = np.floor((radd.low_discrepancy_times(key, 64) - 1e-3) / (1 - 1e-3) * 64 - 1e-4)
  assert len(set(parts)) >= 63  # Equidistant; rounding may put one on a border.
  levels = radd.stratified_probabilities(key, 64)
  np.testing.assert_array_equal(np.ceil(np.asarray(levels) * 64), np.arange(1, 65))
  k = jnp.arange(1, 8)
  np.testing.assert_array_equal(radd.mask_exactly(key, k, 7).sum(axis=1), k)
  share = radd.mask_independently(key, jnp.array([0.0, 0.3, 1.0]), 10_000).mean(axis=1)
  np.testing.assert_allclose(share, [0, 0.3, 1], atol=4 * math.sqrt(0.21 / 10_000))
  nothing = jnp.zeros((1, LENGTH), bool)
  log_c, x = jnp.zeros((1, LENGTH, V)), jnp.zeros((1, LENGTH), jnp.int32)
  assert radd.lambda_dce(log_c, x, nothing, jnp.array([1e-9]))[0] == 0


@pytest.mark.parametrize("schedule", list(radd.SCHEDULES))
def test_unmasking_telescopes(schedule):
  steps = sampling.make_steps(16, schedule=schedule, padded_to=20)
  survival = np.cumprod(1 - np.float64(steps.rho[:15]))
  times = np.linspace(1, sampling.LAST_TIME, 17)[1:16]
  levels = radd.mask_probability(radd.SCHEDULES[schedule].noise(np.append(1.0, times)))
  np.testing.assert_allclose(survival, levels[1:] / levels[0], rtol=1e-3, atol=1e-6)
  assert steps.rho[15] == 1 and not steps.rho[16:].any()


def test_expected_calls_without_a_network():
  length, rows = 20, 4000
  for count in (5, 20, 60):
    rho = np.asarray(sampling.make_steps(count).rho)
    rng = np.random.default_rng(count)
    masked, calls = np.ones((rows, length), bool), np.zeros(rows)
    for chance in rho:
      unmasked = masked & (rng.random(masked.shape) < chance)
      masked &= ~unmasked
      calls += unmasked.any(axis=1)
    assert not masked.any()
    # Five standard errors; LAST_TIME and eps change the times by less.
    reach = 5 * calls.std() / math.sqrt(rows)
    assert calls.mean() == pytest.approx(sampling.expected_calls(count, length), abs=reach + 1e-3)
    assert sampling.expected_calls(count, length) <= min(count, length)


def test_the_network_sees_tokens_only(denoiser, sedd):
  tokens = jax.random.randint(jax.random.key(1), (4, LONG), 0, V + 1)
  log_c = apply(denoiser, tokens, jnp.zeros(4))
  np.testing.assert_array_equal(log_c, apply(denoiser, tokens, jnp.full(4, 5.0)))
  np.testing.assert_allclose(apply(denoiser, tokens[::-1], jnp.zeros(4))[::-1], log_c, atol=1e-6)
  np.testing.assert_allclose(jnp.exp(log_c).sum(axis=-1), 1, rtol=1e-5)
  assert log_c.shape == (4, LONG, V)
  changed = with_head(nnx.clone(sedd))
  changed.modulation.kernel[...] = jnp.ones_like(changed.modulation.kernel[...])
  a, b = (apply(changed, tokens, jnp.full(4, noise)) for noise in (0.0, 5.0))
  assert np.abs(a - b).max() > 1e-3  # The other one does read the noise.


def test_a_scanned_stack_of_blocks_is_the_same(denoiser, monkeypatch):
  tokens = jax.random.randint(jax.random.key(1), (4, LONG), 0, V + 1)
  one_by_one = apply(denoiser, tokens, jnp.zeros(4))
  monkeypatch.setattr(network, "SCANNED_FROM", 1)
  scanned = nnx.jit(lambda model, tokens: model(tokens))(denoiser, tokens)
  np.testing.assert_allclose(scanned, one_by_one, atol=1e-6)


def test_samples_are_equal_with_and_without_cache_and_keep_what_is_given(denoiser):
  tokens = np.asarray(jax.random.randint(jax.random.key(2), (2, LONG), 0, V))
  known = (np.arange(LONG) < 4) | (np.arange(LONG) >= 10)
  x = sampling.infilling(tokens, known, V)
  for count in (5, 40):
    steps = sampling.make_steps(count, padded_to=40)
    run = functools.partial(sampling.sample, denoiser, x, jax.random.key(3), steps)
    cached, plain = run(), run(cached=False)
    np.testing.assert_array_equal(cached.tokens, plain.tokens)
    np.testing.assert_array_equal(cached.tokens[:, known], tokens[:, known])
    assert cached.tokens.max() < V
    np.testing.assert_array_equal(plain.calls, count)
    # Six positions are masked.
    assert 1 <= cached.calls.min() and cached.calls.max() <= min(count, 6)
  order = sampling.random_orders(jax.random.key(4), 2, LONG)
  filled = sampling.sample_any_order(denoiser, x, jax.random.key(3), order)
  np.testing.assert_array_equal(filled.tokens[:, known], tokens[:, known])
  assert filled.tokens.max() < V
  np.testing.assert_array_equal(filled.calls, 6)


def test_draws_follow_the_distribution_and_its_truncation():
  p = jnp.array([0.5, 0.3, 0.2])
  log_c = jnp.broadcast_to(jnp.log(p), (1, 20_000, 3))
  share = lambda s: np.bincount(
    np.asarray(sampling.draw_tokens(log_c, jax.random.split(jax.random.key(0), 1), s))[0],
    minlength=3,
  ) / 20_000  # fmt: skip
  reach = 4 * math.sqrt(0.25 / 20_000)
  np.testing.assert_allclose(share(sampling.DIRECT), p, atol=reach)
  nucleus = share(Sampling(temperature=1.0, top_p=0.7))
  np.testing.assert_allclose(nucleus, [0.625, 0.375, 0], atol=reach)
  np.testing.assert_array_equal(share(Sampling(temperature=1.0, top_k=1)), [1, 0, 0])


def test_ema_of_the_parameters():
  params = {"w": jnp.ones(2)}
  ema = parameter_ema(0.5)
  state, expected, w = ema.init(params), np.ones(2), np.ones(2)
  for n in range(1, 30):
    updates = {"w": jnp.full(2, 0.1)}
    updates, state = ema.update(updates, state, params)
    params = optax.apply_updates(params, updates)
    w = w + 0.1
    d = min(0.5, (1 + n) / (10 + n))
    expected = d * expected + (1 - d) * w
  np.testing.assert_allclose(state.average["w"], expected, rtol=1e-5)


def test_bad_input_is_refused(denoiser, sedd):
  x = np.full((2, LONG), V, np.int32)
  with pytest.raises(UserError, match="3 is the mask"):
    likelihood.bound(denoiser, x, jax.random.key(0), draws=2)
  with pytest.raises(UserError, match="expected t_dse"):
    likelihood.bound(sedd, x * 0, jax.random.key(0), draws=2)
  with pytest.raises(UserError, match="permutation"):
    likelihood.ordered_nll(denoiser, x * 0, np.zeros(LONG, int))
  with pytest.raises(UserError, match="cached=False"):
    sampling.sample(sedd, jnp.asarray(x), jax.random.key(0), sampling.make_steps(2))
  with pytest.raises(UserError, match="known tokens are 3"):
    sampling.infilling(x, np.ones(LONG, bool), V)
  with pytest.raises(UserError, match="tweedie, euler"):
    sampling.make_steps(4, rule="heun")
  for name, value, message in (
    ("schedule", "cosine", "log_linear, geometric"),
    ("compared_steps", 7, "sampling_steps"),
    ("num_heads", 3, "even width"),
    ("accumulate_steps", 3, "must divide"),
    ("tokenizer", "nowhere", "no tokenizer"),
    ("train_source", "embedded:verse", "embedded:verse"),
    ("judge", "nowhere", "no base model"),
  ):
    bad = config.get_config("tiny")
    bad[name] = value
    with pytest.raises(UserError, match=message):
      experiment.run(bad, pathlib.Path())


def test_tiny_run_reports_tables_and_claims(tmp_path):
  settings = config.get_config("tiny")
  report = experiment.run(settings, tmp_path)
  titles = [t.title for t in report.tables]
  assert titles[0] == "Perplexity, or its upper bound" and len(titles) == 7
  assert {row[0] for row in report.tables[0].rows} >= {"autoregressive", "SEDD", "RADD AO"}
  assert all((tmp_path / figure.path).stat().st_size for figure in report.figures)
  statements = {c.statement: c for c in report.claims}
  same = next(c for s, c in statements.items() if s.startswith("equal seeds give equal text"))
  assert same.holds and len(statements) == 10
