"""What a classifier is trained on: pseudo labels with the aggregate embedding, and the baselines.

Every loss takes the network, a `Batch` of whole bags, a key and its own `strength`, and returns a
scalar. p_i = sigmoid(f(x_i)); a bag has m instances, s positives and the mean prediction p_B.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from projects.llp_bp.network import Classifier, forward


class Batch(NamedTuple):
  """R rows of whole bags, S bags at most; padded rows and bags have weight and size 0."""

  x: jax.Array  # float32 [R, d]
  target: jax.Array  # float32 [R]: labels in [0, 1]; only `pseudo_label_loss` reads them.
  weight: jax.Array  # float32 [R], 1 or 0
  bag_of: jax.Array  # int32 [R], below S
  count: jax.Array  # float32 [S]
  size: jax.Array  # float32 [S]
  prior: jax.Array  # float32 []: share of positives of all training bags.


def pseudo_label_loss(network: Classifier, batch: Batch, key: jax.Array, strength) -> jax.Array:
  """BCE to the targets + strength (lambda_a) * BCE of the bag's mean embedding to s/m (step 5)."""
  del key
  logits, bag_logits = forward(network, batch.x, batch.weight, batch.bag_of, batch.size)
  instance = optax.sigmoid_binary_cross_entropy(logits, batch.target)
  aggregate = optax.sigmoid_binary_cross_entropy(bag_logits, _share(batch))
  return _mean(instance, batch.weight) + strength * _mean(aggregate, batch.size > 0)


def dllp_loss(network: Classifier, batch: Batch, key: jax.Array, strength) -> jax.Array:
  """DLLP (Ardehaly and Culotta, 2017): cross-entropy of s/m and p_B. `strength` is not used."""
  del key, strength
  return _bag_cross_entropy(network(batch.x), batch)


def easyllp_loss(network: Classifier, batch: Batch, key: jax.Array, strength) -> jax.Array:
  """EasyLLP (Busa-Fekete et al., 2023): a BCE(f, 1) + (1 - a) BCE(f, 0), a = m (s/m - p) + p.

  Over random bags E[a | x, y] = y: its expectation is the loss of the hidden labels. a may be
  outside [0, 1] and the loss negative. `strength` is not used.
  """
  del key, strength
  a = (batch.count - (batch.size - 1) * batch.prior)[batch.bag_of]
  return _mean(optax.sigmoid_binary_cross_entropy(network(batch.x), a), batch.weight)


def genbags_loss(network: Classifier, batch: Batch, key: jax.Array, strength) -> jax.Array:
  """Generalised bags (Saket et al., 2022) with covariance I: E_w (sum_B w_B (p_B - s/m))^2.

  The expectation is over 32 Gaussian combinations w of the batch's bags, divided by their number.
  Covariance I is that paper's choice for random bags. `strength` is not used.
  """
  del strength
  p = jax.nn.sigmoid(network(batch.x)) * batch.weight
  predicted = jax.ops.segment_sum(p, batch.bag_of, len(batch.size))
  error = (predicted - batch.count) / jnp.maximum(batch.size, 1)
  w = jax.random.normal(key, (32, len(batch.size)))
  return jnp.mean((w @ error) ** 2) / jnp.maximum((batch.size > 0).sum(), 1)


def llp_vat_loss(network: Classifier, batch: Batch, key: jax.Array, strength) -> jax.Array:
  """LLP-VAT (Tsai and Lin, 2020): DLLP + strength * KL(p(x) || p(x + r)), r adversarial.

  r of norm 0.1 sqrt(d) is one power iteration away from a random direction, as in virtual
  adversarial training; columns are standardised, so that sqrt(d) is the norm of a typical row.
  """
  logits = network(batch.x)
  fixed = jax.lax.stop_gradient(logits)

  def divergence(shift):
    moved = network(batch.x + shift)
    p = jax.nn.sigmoid(fixed)
    entropy = optax.sigmoid_binary_cross_entropy(fixed, p)
    return _mean(optax.sigmoid_binary_cross_entropy(moved, p) - entropy, batch.weight)

  unit = lambda v: v / jnp.maximum(jnp.linalg.norm(v, axis=1, keepdims=True), 1e-12)
  direction = unit(jax.random.normal(key, batch.x.shape))
  # Not smaller: float32 loses the second-order change that the gradient is about.
  gradient = jax.grad(divergence)(0.1 * direction)
  radius = 0.1 * batch.x.shape[1] ** 0.5
  shift = jax.lax.stop_gradient(radius * unit(gradient))
  return _bag_cross_entropy(logits, batch) + strength * divergence(shift)


def llp_fc_loss(network: Classifier, batch: Batch, key: jax.Array, strength) -> jax.Array:
  """LLP-FC (Zhang et al., 2022): which of two bags an instance is in is a noisy label.

  Bags are paired at random in every batch. In a pair with shares g_1, g_2 of positives and sizes
  m_1, m_2, Bayes gives  P(bag c | x) = sum_y P(c | y) q_y(x), where P(c | 1) ~ m_c g_c,
  P(c | 0) ~ m_c (1 - g_c) and q is the network's p moved from the prior of all bags to the pair's.
  The loss is the cross-entropy of the bag an instance came from. `strength` is not used.
  """
  del strength
  exists = batch.size > 0
  # Existing bags first, in random order; neighbours in it are partners.
  order = jnp.argsort(jnp.where(exists, jax.random.uniform(key, exists.shape), 2.0))
  rank = jnp.argsort(order)
  partner = order[jnp.minimum(rank ^ 1, len(order) - 1)]
  positives = jnp.maximum(batch.count, 1e-6)
  negatives = jnp.maximum(batch.size - batch.count, 1e-6)
  prior = jnp.clip(batch.prior, 1e-6, 1 - 1e-6)
  all_positives, all_negatives = positives + positives[partner], negatives + negatives[partner]
  log_shift = jnp.log(all_positives / all_negatives) - jnp.log(prior / (1 - prior))
  logits = network(batch.x) + log_shift[batch.bag_of]
  q = jax.nn.sigmoid(logits)
  likelihood = (
    q * (positives / all_positives)[batch.bag_of]
    + (1 - q) * (negatives / all_negatives)[batch.bag_of]
  )
  paired = (exists[partner] & (partner != jnp.arange(len(order))))[batch.bag_of]
  return _mean(-jnp.log(jnp.maximum(likelihood, 1e-12)), batch.weight * paired)


def _share(batch: Batch) -> jax.Array:
  return batch.count / jnp.maximum(batch.size, 1)


def _mean(values: jax.Array, weight: jax.Array) -> jax.Array:
  return jnp.sum(values * weight) / jnp.maximum(jnp.sum(weight), 1)


def _bag_cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
  p = jax.nn.sigmoid(logits) * batch.weight
  mean = jax.ops.segment_sum(p, batch.bag_of, len(batch.size)) / jnp.maximum(batch.size, 1)
  mean, share = jnp.clip(mean, 1e-6, 1 - 1e-6), _share(batch)
  entropy = -share * jnp.log(mean) - (1 - share) * jnp.log(1 - mean)
  return _mean(entropy, batch.size > 0)
