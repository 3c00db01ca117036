"""Belief propagation for label proportions: invariants, PGMax, enumeration, losses, bad input."""

import functools
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import make_moons
from sklearn.metrics import roc_auc_score

from common.errors import UserError
from projects.llp_bp import (
  belief_propagation,
  cardinality,
  config,
  data,
  experiment,
  graph,
  llp_bp,
  losses,
  training,
)
from projects.llp_bp.belief_propagation import BAG_FACTORS, Ising
from projects.llp_bp.counts import bag_counts
from projects.llp_bp.estimator import BagClassifier

GOLDEN = json.loads(
  (pathlib.Path(__file__).parents[1] / "golden" / "llp_bp" / "pgmax_0.6.1.json").read_text()
)
N, K = 10, 2
X = np.random.default_rng(0).normal(size=(N, 3))
BAGS = np.array([0, 1, 0, 2, 1, 0, 2, 0, 1, 0])  # Sizes 5, 3, 2: padded to 8, 4, 2.
COUNTS = np.array([2, 3, 1])


def edge_list(n: int, pairs, weight=1.0) -> graph.Edges:
  """Edges of given pairs, without padding."""
  source, target = np.array([*pairs, *((j, i) for i, j in pairs)], np.int32).T
  order = np.argsort(target, kind="stable")
  reverse = np.argsort(order)[(order + len(pairs)) % (2 * len(pairs))]
  weights = np.tile(np.broadcast_to(np.float32(weight), len(pairs)), 2)[order]
  return graph.Edges(source[order], target[order], reverse.astype(np.int32), weights)


def infer(
  bags=BAGS, counts=COUNTS, x=X, lambda_s=0.3, lambda_bag=3.0, factor="cardinality", **more
):
  groups = graph.group_bags(bags, counts)
  edges = graph.neighbour_edges(graph.nearest(x, K))
  if factor == "quadratic":
    edges = graph.merge_bag_mates(edges, groups)
  settings = {"damping": 0.5, "max_iterations": 300, "tolerance": 1e-5} | more
  return belief_propagation.infer(
    edges, groups, lambda_s, lambda_bag, bag_factor=factor, **settings
  )


def mu(**arguments):
  return np.asarray(infer(**arguments).probability)


def all_labels(n: int) -> np.ndarray:
  return np.array(list(itertools.product([0, 1], repeat=n)))


def log_gibbs(y, pairs, weights, bags, counts, lambda_s, lambda_bag):
  """The definition; y [..., n]."""
  smooth = sum(w * (y[..., i] - y[..., j]) ** 2 for (i, j), w in zip(pairs, weights))
  total = -lambda_s * smooth
  for b, s in enumerate(counts):
    inside = bags == b
    total = total - lambda_bag / inside.sum() * (y[..., inside].sum(axis=-1) - s) ** 2
  return total


def exact_marginals(log_weight, y):
  weight = np.exp(log_weight - log_weight.max())
  return weight @ y / weight.sum()


def test_the_ising_form_is_the_gibbs_energy():
  """On all 2^10 labelings, in both layouts; float32 h and J of size 10 sum to errors of 1e-5."""
  groups = graph.group_bags(BAGS, COUNTS)
  edges = graph.neighbour_edges(graph.nearest(X, K), kernel="rbf")
  merged = graph.merge_bag_mates(edges, groups)
  real = edges.weight > 0
  pairs = {(i, j): w for i, j, w in zip(edges.source[real], edges.target[real], edges.weight[real])}
  pairs = {pair: w for pair, w in pairs.items() if pair[0] < pair[1]}
  y = all_labels(N)
  model = belief_propagation.ising(merged, groups, 0.3, 3.0, "quadratic")
  coupling = np.zeros((N, N))
  np.add.at(coupling, (merged.target, merged.source), np.asarray(model.coupling))
  inside_edges = 0
  for rows, dense, weight in zip(groups.members, model.bag_coupling, merged.bag_weight):
    inside_edges += (weight > 0).sum()
    for members, j in zip(rows, np.asarray(dense)):
      here = members < N
      assert (j[~here] == 0).all() and (j[:, ~here] == 0).all() and (np.diag(j) == 0).all()
      coupling[np.ix_(members[here], members[here])] += j[np.ix_(here, here)]
  assert inside_edges > 0 and (merged.weight > 0).sum() + inside_edges == real.sum()
  ising = y @ np.asarray(model.field) + np.einsum("ri,ij,rj->r", y, np.triu(coupling), y)
  gibbs = log_gibbs(y, pairs, pairs.values(), BAGS, COUNTS, 0.3, 3.0)
  np.testing.assert_allclose(coupling, coupling.T)
  np.testing.assert_allclose(ising - gibbs, (ising - gibbs)[0], atol=2e-5)


@pytest.mark.parametrize("kind", ["chain", "star"])
def test_belief_propagation_is_exact_on_trees(kind):
  rng = np.random.default_rng(1)
  pairs = [(i, i + 1) if kind == "chain" else (0, i + 1) for i in range(N - 1)]
  edges = edge_list(N, pairs)
  h, j = rng.normal(size=N), 2 * rng.normal(size=len(pairs))
  lookup = {pair: value for pair, value in zip(pairs, j)}
  directed = [lookup[min(a, b), max(a, b)] for a, b in zip(edges.source, edges.target)]
  single = graph.group_bags(np.arange(N), np.zeros(N))
  model = Ising(jnp.float32(h), jnp.float32(directed), (jnp.zeros((N, 1, 1)),))
  beliefs = belief_propagation.sum_product(model, edges, single, 0.0, 0.0, 50, 1e-6)
  y = all_labels(N)
  log_weight = y @ h + sum(value * y[:, a] * y[:, b] for (a, b), value in lookup.items())
  assert beliefs.converged
  np.testing.assert_allclose(beliefs.probability, exact_marginals(log_weight, y), atol=1e-5)


@pytest.mark.parametrize("iterations", [1, 5, 100])
def test_pgmax(iterations):
  h, pairs = GOLDEN["field"], [tuple(pair) for pair in GOLDEN["pairs"]]
  edges = edge_list(len(h), pairs)
  lookup = dict(zip(pairs, GOLDEN["coupling"]))
  directed = [lookup[min(a, b), max(a, b)] for a, b in zip(edges.source, edges.target)]
  single = graph.group_bags(np.arange(len(h)), np.zeros(len(h)))
  model = Ising(jnp.float32(h), jnp.float32(directed), (jnp.zeros((len(h), 1, 1)),))
  beliefs = belief_propagation.sum_product(
    model, edges, single, 0.0, GOLDEN["damping"], iterations, -1.0
  )
  assert beliefs.iterations == iterations
  expected = GOLDEN["marginals_by_iterations"][str(iterations)]
  np.testing.assert_allclose(beliefs.probability, expected, atol=1e-5)


def test_bags_joined_by_one_edge_are_a_tree_of_factors():
  """So that belief propagation with the cardinality factor is exact; over pairs it is not."""
  bags, counts, pairs = np.repeat([0, 1], 5), np.array([1, 3]), [(0, 5)]
  groups, edges = graph.group_bags(bags, counts), edge_list(N, pairs, 0.7)
  y = all_labels(N)
  exact = exact_marginals(log_gibbs(y, pairs, [0.7], bags, counts, 1.5, 6.0), y)
  settings = {"max_iterations": 300, "tolerance": 1e-6}
  beliefs = belief_propagation.infer(edges, groups, 1.5, 6.0, bag_factor="cardinality", **settings)
  assert beliefs.converged
  np.testing.assert_allclose(beliefs.probability, exact, atol=1e-5)
  pairwise = belief_propagation.infer(
    graph.merge_bag_mates(edges, groups), groups, 1.5, 6.0, bag_factor="quadratic", **settings
  )
  error = np.abs(np.asarray(pairwise.probability) - exact).max()
  assert 1e-3 < error < 0.15


@pytest.mark.parametrize("size", [1, 3, 40])
@pytest.mark.parametrize("strength", [0.0, 4.0, 50.0])
def test_cardinality_messages(size, strength):
  """Against convolutions in float64, below and above the size from which transforms are used.

  The largest messages are 50, at a relative error of 1e-5; float32's own is 1e-7 per convolution.
  """
  rng = np.random.default_rng(size)
  log_odds = (3 * rng.normal(size=(3, size))).astype(np.float32)
  counts, lambda_ = np.array([0, size // 2, size]), strength / size
  width = 1 << (size - 1).bit_length()
  padded = np.pad(log_odds, ((0, 0), (0, width - size)), constant_values=-np.inf)
  messages = cardinality.bag_messages(
    jnp.asarray(padded), jnp.float32(counts), jnp.full(3, lambda_, jnp.float32)
  )
  for row, count, sent in zip(log_odds.astype(float), counts, np.asarray(messages)[:, :size]):
    for i in range(0, size, max(1, size // 5)):
      others = functools.reduce(
        lambda d, p: np.convolve(d, [1 - p, p]), 1 / (1 + np.exp(-np.delete(row, i))), np.ones(1)
      )
      c = np.arange(size)
      up, down = (np.log(others @ np.exp(-lambda_ * (c + y - count) ** 2)) for y in (1, 0))
      assert sent[i] == pytest.approx(up - down, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("factor", BAG_FACTORS)
def test_without_terms_nothing_is_known(factor):
  np.testing.assert_allclose(mu(lambda_s=0.0, lambda_bag=0.0, factor=factor), 0.5, atol=1e-6)


@pytest.mark.parametrize("factor", BAG_FACTORS)
def test_bags_of_one_are_labels(factor):
  y = np.random.default_rng(3).integers(0, 2, N)
  p = mu(bags=np.arange(N), counts=y, lambda_bag=40.0, factor=factor)
  np.testing.assert_allclose(p, y, atol=1e-6)


@pytest.mark.parametrize("factor", BAG_FACTORS)
def test_without_edges_bag_mates_are_equal(factor):
  """The cardinality factor is exact: binomial weights of the counts."""
  p = mu(lambda_s=0.0, factor=factor)
  for b, s in enumerate(COUNTS):
    mates = p[BAGS == b]
    m = len(mates)
    c = np.arange(m + 1)
    weight = np.array([len(list(itertools.combinations(range(m), k))) for k in c])
    weight = weight * np.exp(-3.0 / m * (c - s) ** 2)
    np.testing.assert_allclose(mates, mates[0], atol=1e-5)
    exact = weight @ c / weight.sum() / m
    assert mates[0] == pytest.approx(exact, abs=1e-5 if factor == "cardinality" else 0.1)


@pytest.mark.parametrize("factor", BAG_FACTORS)
def test_pure_bags_are_labelled(factor):
  p = mu(bags=np.repeat([0, 1], 5), counts=np.array([0, 5]), lambda_bag=40.0, factor=factor)
  np.testing.assert_allclose(p, np.repeat([0, 1], 5), atol=1e-3)


@pytest.mark.parametrize("factor", BAG_FACTORS)
def test_complement_and_permutation(factor):
  beliefs = infer(factor=factor)
  assert beliefs.converged and 0 < beliefs.iterations < 300 and beliefs.residual <= 1e-5
  p = np.asarray(beliefs.probability)
  assert p.std() > 0.1
  flipped = mu(counts=np.bincount(BAGS) - COUNTS, factor=factor)
  np.testing.assert_allclose(flipped, 1 - p, atol=1e-4)
  order = np.random.default_rng(4).permutation(N)
  np.testing.assert_allclose(mu(bags=BAGS[order], x=X[order], factor=factor), p[order], atol=1e-4)


def test_non_convergence_is_reported():
  """Messages between the pairs of a bag overshoot without damping if the weight is large."""
  settings = {"bags": np.zeros(N, int), "counts": np.array([4]), "lambda_bag": 200.0}
  beliefs = infer(factor="quadratic", damping=0.0, **settings)
  assert not beliefs.converged and beliefs.iterations == 300 and beliefs.residual > 1
  assert infer(factor="cardinality", **settings).converged


def test_the_default_damping_holds_all_weights_of_the_default_grid():
  """A bag of 64 flips for ever unless the damping exceeds (lambda_bag - 2) / (lambda_bag + 2)."""
  settings = config.get_config()
  bags = graph.group_bags(np.zeros(64, int), np.array([20.0]))
  pairs = (np.zeros((64, 1)), np.arange(64)[:, None] ^ 1)
  edges = graph.merge_bag_mates(graph.neighbour_edges(pairs), bags)
  for lambda_bag, damping in itertools.product(settings.lambda_bag, (0.5, settings.damping)):
    found = belief_propagation.infer(edges, bags, 0.0, lambda_bag, damping=damping)
    holds = damping > (lambda_bag - 2) / (lambda_bag + 2)
    assert found.converged == holds, (lambda_bag, damping)
    assert holds or damping == 0.5
    if holds:
      assert np.all((found.probability > 0.3) & (found.probability < 0.5))  # The share is 0.31.


def test_the_graph_of_neighbours():
  distance, rows = graph.nearest(X, K)
  full = np.linalg.norm(X[:, None] - X, axis=-1) + np.diag(np.full(N, np.inf))
  np.testing.assert_array_equal(rows, np.argsort(full, axis=1)[:, :K])
  cosine = X / np.linalg.norm(X, axis=1, keepdims=True)
  similar = cosine @ cosine.T - np.diag(np.full(N, np.inf))
  np.testing.assert_array_equal(
    graph.nearest(X, K, metric="cosine")[1], np.argsort(-similar, axis=1)[:, :K]
  )
  unit = np.median(distance)
  for kernel, width, most in itertools.product(graph.KERNELS, (1.0, 0.5), (np.inf, 1.0)):
    edges = graph.neighbour_edges((distance, rows), kernel=kernel, width=width, max_distance=most)
    assert len(edges.source) == 2 * N * K and (np.diff(edges.target) >= 0).all()
    np.testing.assert_array_equal(edges.source[edges.reverse], edges.target)
    np.testing.assert_array_equal(edges.reverse[edges.reverse], np.arange(2 * N * K))
    real = edges.weight > 0
    found = set(zip(edges.source[real], edges.target[real]))
    wanted = {(i, j) for i in range(N) for j in rows[i] if full[i, j] <= most * unit}
    assert found == wanted | {(j, i) for i, j in wanted} and real.sum() == len(found)
    assert (edges.source != edges.target)[real].all()
    d = full[edges.source[real], edges.target[real]] / unit / width
    u = {"constant": d**0, "rbf": np.exp(-(d**2) / 2)}
    u["matern"] = (1 + 3**0.5 * d) * np.exp(-(3**0.5) * d)
    np.testing.assert_allclose(edges.weight[real], u[kernel], rtol=1e-6)


def test_tree_order_is_a_permutation_of_near_rows():
  x = np.random.default_rng(2).random((200, 2))
  order = graph.tree_order(x)
  np.testing.assert_array_equal(np.sort(order), np.arange(200))
  step = lambda rows: np.linalg.norm(np.diff(rows, axis=0), axis=1).mean()
  assert step(x[order]) < 0.8 * step(x)
  np.testing.assert_array_equal(graph.tree_order(np.ones((5, 16))), np.arange(5))


def test_identical_rows_are_not_their_own_neighbours():
  rows = graph.nearest(np.repeat(X[:2], 4, axis=0), 3)[1]
  assert (rows != np.arange(8)[:, None]).all()
  edges = graph.neighbour_edges(graph.nearest(np.zeros((8, 2)), 3), kernel="rbf")
  assert np.isfinite(edges.weight).all()


def test_pseudo_labels():
  p = np.random.default_rng(5).random(N)
  labels = functools.partial(llp_bp.pseudo_labels, p, BAGS, COUNTS)
  np.testing.assert_array_equal(labels("hard", 0.3), p >= 0.3)
  np.testing.assert_allclose(labels("soft"), p, rtol=1e-6)
  top = labels("top")
  np.testing.assert_array_equal(np.bincount(BAGS, weights=top), COUNTS)
  for b in range(3):
    inside = BAGS == b
    assert min(p[inside & (top == 1)]) > max(p[inside & (top == 0)], default=-1)


@pytest.fixture(scope="module")
def network():
  return training.Classifier("mlp", 3, (4, 3), rngs=nnx.Rngs(0))


def batch(x=X, bags=BAGS, counts=COUNTS, target=None, prior=0.5):
  """One batch of all rows with two padded rows and one padded bag."""
  n, sizes = len(x), np.bincount(bags)
  pad = lambda values, width: jnp.float32(np.pad(values, (0, width)))
  return losses.Batch(
    jnp.float32(np.pad(x, ((0, 2), (0, 0)), constant_values=7.0)),
    pad(np.zeros(n) if target is None else target, 2),
    pad(np.ones(n), 2),
    jnp.int32(np.pad(bags, (0, 2))),
    pad(counts, 1),
    pad(sizes, 1),
    jnp.float32(prior),
  )


KEY = jax.random.key(0)
sigmoid = lambda z: 1 / (1 + np.exp(-np.asarray(z, np.float64)))
cross_entropy = lambda p, y: -(y * np.log(p) + (1 - y) * np.log(1 - p))


def test_losses_are_their_formulas(network):
  """On a padded batch, which must not show."""
  y = (np.arange(N) % 2).astype(float)

  @jax.jit
  def compute(params):
    model = nnx.merge(nnx.graphdef(network), params)
    draw = jax.vmap(lambda key: losses.genbags_loss(model, batch(), key, 0.0))
    phi = model.embed(jnp.float32(X))
    pooled = jnp.stack([phi[BAGS == b].mean(axis=0) for b in range(3)])
    return {
      "p": jax.nn.sigmoid(model(jnp.float32(X))),
      "bag_p": jax.nn.sigmoid(model.bag_head(pooled))[:, 0],
      "dllp": losses.dllp_loss(model, batch(), KEY, 0.0),
      "easyllp": losses.easyllp_loss(model, batch(prior=0.3), KEY, 0.0),
      "pseudo": losses.pseudo_label_loss(model, batch(target=y), KEY, 0.7),
      "genbags": draw(jax.random.split(KEY, 300)),
      "vat": losses.llp_vat_loss(model, batch(), KEY, 1.0),
      "vat 0": losses.llp_vat_loss(model, batch(), KEY, 0.0),
    }

  got = jax.tree.map(lambda v: np.asarray(v, np.float64), compute(nnx.state(network)))
  p, share = got["p"], COUNTS / np.bincount(BAGS)
  mean = np.bincount(BAGS, weights=p) / np.bincount(BAGS)
  dllp = cross_entropy(np.clip(mean, 1e-6, 1 - 1e-6), share).mean()
  assert got["dllp"] == pytest.approx(dllp, rel=1e-5)
  # a = m (s/m - p) + p.
  a = (np.bincount(BAGS) * (share - 0.3) + 0.3)[BAGS]
  assert got["easyllp"] == pytest.approx(cross_entropy(p, a).mean(), rel=1e-5)
  both = cross_entropy(p, y).mean() + 0.7 * cross_entropy(got["bag_p"], share).mean()
  assert got["pseudo"] == pytest.approx(both, rel=1e-5)
  error = 5 * got["genbags"].std() / 300**0.5
  assert got["genbags"].mean() == pytest.approx(((mean - share) ** 2).mean(), abs=error)
  assert dllp < got["vat"] < dllp + 1
  assert got["vat 0"] == pytest.approx(dllp, rel=1e-5)


def test_easyllp_is_unbiased():
  """Over random bags of 8 the mean of a is the label: within 5 standard errors."""
  rng = np.random.default_rng(6)
  y = (rng.random((4000, 8)) < 0.3).astype(float)
  a = y.sum(axis=1, keepdims=True) - 7 * 0.3
  a = np.broadcast_to(a, y.shape)
  for label in (0, 1):
    # One instance of each bag, as bag mates share a.
    values = a[:, 0][y[:, 0] == label]
    assert values.mean() == pytest.approx(label, abs=5 * values.std() / len(values) ** 0.5)


def test_dllp_is_minimal_at_the_proportion():
  class Constant(nnx.Module):
    def __init__(self, value):
      self.value = nnx.Param(jnp.float32(value))

    def __call__(self, x):
      return self.value * jnp.ones(len(x))

  bags, counts = np.repeat([0, 1], 5), np.array([2, 2])
  slope = nnx.grad(lambda model: losses.dllp_loss(model, batch(X, bags, counts), KEY, 0.0))
  assert abs(slope(Constant(np.log(2 / 3))).value[...]) < 1e-6
  assert slope(Constant(1.0)).value[...] > 0.1


def test_llp_fc_is_the_posterior_of_the_bag(network):
  """Two bags: each other's partners. Bayes by hand, from the densities that p and the prior imply."""
  bags, counts, prior = np.array([0] * 6 + [1] * 4), np.array([4, 1]), 0.4
  p = sigmoid(network(jnp.float32(X)))
  positive, negative = p / prior, (1 - p) / (1 - prior)  # p(x | y) / p(x)
  share, size = counts / [6, 4], np.array([6, 4])
  density = size * (share * positive[:, None] + (1 - share) * negative[:, None])
  posterior = density[np.arange(N), bags] / density.sum(axis=1)
  loss = losses.llp_fc_loss(network, batch(X, bags, counts, prior=prior), KEY, 0.0)
  assert loss == pytest.approx(-np.log(posterior).mean(), rel=1e-4)
  alone = losses.llp_fc_loss(network, batch(X, np.zeros(N, int), np.array([3])), KEY, 0.0)
  assert alone == 0  # No partner.


def test_batches_hold_whole_bags_once():
  rng = np.random.default_rng(7)
  bags = rng.permutation(np.repeat(np.arange(12), rng.integers(1, 9, 12)))
  counts = rng.integers(0, 2, 12)
  packed = training.pack_bags(bags, counts, 16, 20, rng)
  rows = packed.row[packed.row < len(bags)]
  np.testing.assert_array_equal(np.sort(rows), np.arange(len(bags)))
  assert packed.size.sum() == len(bags) and packed.count.sum() == counts.sum()
  epoch = packed.order[: len(packed.row)]
  assert len(packed.order) == 20 and sorted(epoch) == list(range(len(packed.row)))
  for row, bag_of, count, size in zip(*packed[:4]):
    for slot in np.flatnonzero(size):
      (bag,) = set(bags[row[(bag_of == slot) & (row < len(bags))]])
      assert size[slot] == (bags == bag).sum() and count[slot] == counts[bag]
  assert training.pack_bags(np.zeros(40, int), np.ones(1), 16, 3, rng).row.shape == (1, 40)


def test_scores():
  rng = np.random.default_rng(8)
  p, y = rng.integers(0, 6, 50) / 6, rng.integers(0, 2, 50)  # With ties.
  score = training.auc(jnp.float32(p), jnp.float32(y))
  assert score == pytest.approx(roc_auc_score(y, p), abs=1e-6)
  p, share = rng.random(N), COUNTS / np.bincount(BAGS)
  mean = np.bincount(BAGS, weights=p) / np.bincount(BAGS)
  validation = jnp.int32(BAGS), jnp.float32(COUNTS), jnp.float32(np.bincount(BAGS))
  expected = -cross_entropy(np.clip(mean, 1e-6, 1 - 1e-6), share).mean()
  assert training.bag_fit(jnp.float32(p), validation) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def moons():
  """Two half moons of 400, in bags of 16."""
  x, y = make_moons(400, noise=0.1, random_state=0)
  bags = np.random.default_rng(9).permutation(400) // 16
  return x, y, bags, np.bincount(bags, weights=y)


def test_estimator(moons):
  x, y, bags, counts = moons
  # The shapes of the command below, which finds the compiled programs in the cache.
  make = lambda: BagClassifier(rounds=1, neighbours=(8,), lambda_s=(0.3,), lambda_bag=(4.0, 8.0))
  model = make().fit(x, bags, counts)
  probability = model.predict_proba(x)
  np.testing.assert_allclose(probability.sum(axis=1), 1, rtol=1e-6)
  np.testing.assert_array_equal(model.predict(x), probability[:, 1] >= 0.5)
  assert roc_auc_score(y, probability[:, 1]) > 0.95
  (done,) = model.rounds_
  assert roc_auc_score(y[model.training_rows_], done.probability) > 0.95
  assert len(done.candidates) == 2 and done.chosen in done.candidates
  assert done.chosen.score == max(c.score for c in done.candidates)
  assert model.converged_ == done.chosen.converged
  # Bags of any name, counts by name: the same fit.
  names = np.array([f"bag {b:02d}" for b in bags])
  by_name = {f"bag {b:02d}": count for b, count in enumerate(counts)}
  again = make().fit(x, names, by_name)
  np.testing.assert_array_equal(again.predict_proba(x), probability)


def changed(value, row=3, column=1):
  x = X.copy()
  x[row, column] = value
  return x


@pytest.mark.parametrize(
  "x, bags, counts, message",
  [
    (changed(np.nan), BAGS, COUNTS, "column 1 of x has 1 missing"),
    (X * [1, 0, 1], BAGS, COUNTS, "column 1 of x is constant"),
    (X[:, 0], BAGS, COUNTS, r"x is of shape \(10,\)"),
    (X.astype(str) + "a", BAGS, COUNTS, "x must be numbers"),
    (X, BAGS[1:], COUNTS, r"bags is of shape \(9,\)"),
    (X, np.where(BAGS == 1, np.nan, BAGS), COUNTS, "bags has 3 missing"),
    (X, np.where(BAGS == 1, None, BAGS), COUNTS, "missing values"),
    (X, BAGS, [2, 3, 1, 0], "3 bags have rows; .* empty bags"),
    (X, BAGS, {0: 2, 1: 3, 2: 1, 9: 0}, "bag 9 has a count but no rows"),
    (X, BAGS, {0: 2, 1: 3}, "bag 2 has no count"),
    (X, BAGS, [2, 4, 1], "the count of bag 1 is 4; expected a whole number from 0 to its 3 rows"),
    (X, BAGS, [-1, 3, 1], "the count of bag 0 is -1"),
    (X, BAGS, [1.5, 3, 1], "the count of bag 0 is 1.5"),
    (X, BAGS, [np.nan, 3, 1], "the count of bag 0 is nan"),
    (X, BAGS, ["a", 3, 1], "counts must be numbers"),
    (X, BAGS * 0, [3], "there is 1 bag"),
    (X, BAGS, COUNTS, "8 neighbours"),
  ],
)
def test_bad_data(x, bags, counts, message):
  with pytest.raises(UserError, match=message):
    BagClassifier(neighbours=(8,)).fit(x, bags, counts)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"lambda": 1}, "no option lambda"),
    ({"bag_factor": "pairs"}, "bag_factor is 'pairs'; expected quadratic or cardinality"),
    ({"lambda_s": (-1.0,)}, "lambda_s is .* negative"),
    ({"neighbours": (0,)}, "no 0 neighbours"),
    ({"lambda_bag": 4.0}, "expected a tuple"),
    ({"damping": 1.0}, "damping is 1.0"),
    ({"steps": 5, "validations": 10}, "no more validations than steps"),
    ({"validation_share": 0.0}, "validation_share is 0"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(UserError, match=message):
    BagClassifier(**options)
  with pytest.raises(UserError, match="not fitted"):
    BagClassifier().predict(X)


def test_counts_of_a_table():
  table = {"bag": np.array([1.0, 1, 1, 2, 2]), "share": np.array([0.333] * 3 + [0.5] * 2)}
  assert bag_counts(table, "bag", "share", proportion=True) == {1.0: 1, 2.0: 1}
  with pytest.raises(UserError, match="the same in all rows of a bag"):
    bag_counts(table | {"share": np.arange(5.0)}, "bag", "share", proportion=False)
  with pytest.raises(UserError, match="about a whole number"):
    bag_counts(table | {"share": np.full(5, 0.5)}, "bag", "share", proportion=True)


def test_a_table_from_the_command_line(moons, tmp_path):
  x, y, bags, counts = moons
  rows = [f"{a},{b},bag{g},{int(counts[g])}" for (a, b), g in zip(x, bags)]
  (tmp_path / "my.csv").write_text("\n".join(["a,b,street,ill", *rows]))
  command = [sys.executable, "-m", "projects.llp_bp.main", f"--data={tmp_path / 'my.csv'}"]
  command += ["--bag=street", f"--workdir={tmp_path / 'out'}", "--rounds=1", "--neighbours=8"]
  command += ["--covariates=a,b"]
  run = functools.partial(subprocess.run, capture_output=True, text=True)
  done = run([*command, "--count=ill"])
  assert done.returncode == 0, done.stderr
  assert "converged" in done.stdout and "residual" in done.stdout
  written = np.genfromtxt(tmp_path / "out" / "probabilities.csv", skip_header=1)
  assert roc_auc_score(y, written) > 0.95
  assert (tmp_path / "out" / "bags.png").stat().st_size > 0
  done = run(command)
  assert done.returncode == 2 and "--count=COLUMN" in done.stderr and done.stderr.count("\n") == 1


def test_random_bags_and_splits():
  bags = data.random_bags(100, 8, np.random.default_rng(0))
  np.testing.assert_array_equal(np.bincount(bags[bags >= 0]), [8] * 12)
  x, y = data.load("digits")
  parts = data.split(x, y, (0.1, 0.2), seed=0)
  assert [len(parts.y), len(parts.validation_y), len(parts.test_y)] == [1257, 180, 360]
  np.testing.assert_allclose(parts.x.mean(axis=0), 0, atol=1e-5)
  with pytest.raises(UserError, match="unknown data set 'digit'; did you mean digits"):
    data.load("digit")


def test_tables_of_the_paper_setting(tmp_path, monkeypatch):
  (tmp_path / "adult").mkdir()
  text = "age,work,same,income\n39,Private,1,<=50K\n50,,1,>50K.\n,Gov,1,<=50K\n"
  (tmp_path / "adult" / "adult.csv").write_text(text)
  monkeypatch.setenv("FLAXWORKS_DATA", str(tmp_path))
  x, y = data.load("adult")
  np.testing.assert_array_equal(y, [0, 1, 0])
  np.testing.assert_array_equal(x, [[39, 1, 0], [50, 0, 1], [44.5, 0, 0]])
  settings = config.get_config("paper")
  settings.datasets = ("bank",)
  report = experiment.run(settings, tmp_path)
  assert report.tables[0].title == "Not run: bank" and not report.claims


def test_tiny_run(tmp_path):
  settings = config.get_config("tiny")
  report = experiment.run(settings, tmp_path)
  assert len(report.tables) == 3 and len(report.claims) == 2
  quality = report.tables[0].rows
  assert [row[1] for row in quality[-3:]] == ["DLLP", "random labels", "supervised oracle"]
  assert all(0.3 < row[2] <= 1 and 0 <= row[5] < 1 for row in quality)
  for figure in report.figures:
    assert (tmp_path / figure.path).stat().st_size > 0
  settings.baselines = ("DLP",)
  with pytest.raises(UserError, match="no baseline DLP"):
    experiment.run(settings, tmp_path)
