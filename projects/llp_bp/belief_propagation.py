"""The Gibbs distribution over instance labels and damped sum-product belief propagation on it.

  P(y) ~ exp(-lambda_s sum_{(i,j) in E} U_ij (y_i - y_j)^2 - sum_B lambda_B (sum_{i in B} y_i - s_B)^2)

As y^2 = y this is an Ising model,  log P = sum_i h_i y_i + sum_{i<j} J_ij y_i y_j + const,  with

  h_i = -lambda_B (1 - 2 s_B) - lambda_s sum_j U_ij,   J_ij = -2 lambda_B [bag mates] + 2 lambda_s U_ij.

lambda_B = lambda_bag / |B|: with a weight that does not shrink with the bag, messages between its
|B|^2 pairs overshoot and flip from all 0 to all 1.

Messages are log odds. Along an edge,  r_{i->j} = log (1 + exp(l + J_ij)) / (1 + exp(l))  of the
cavity l = h_i + sum_{k != j} r_{k->i}. `bag_factor` says what a bag is:

  "quadratic"     all pairs of bag mates are edges: the graph above, O(sum |B|^2) time and memory;
  "cardinality"   one factor of |B| labels, whose messages are exact: O(n log^2 |B|).

The distribution is the same. Belief propagation is not: over pairs it counts the many short loops of
a bag, which it takes for independent evidence; as one factor a bag has no loops inside.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from projects.llp_bp.cardinality import bag_messages
from projects.llp_bp.graph import Bags, Edges

BAG_FACTORS = ("quadratic", "cardinality")


class Ising(NamedTuple):
  """h and J in the layout of `Edges` and `Bags`; no bag couplings for the cardinality factor."""

  field: jax.Array  # [n], h.
  coupling: jax.Array  # [E], J of neighbour edges.
  bag_coupling: tuple[jax.Array, ...]  # [B_g, M_g, M_g], J of bag mates; zero diagonal and padding.


class Beliefs(NamedTuple):
  """Marginals and the convergence report."""

  log_odds: jax.Array  # [n], of y_i = 1.
  residual: jax.Array  # []: largest change of a message in the last iteration, undamped.
  iterations: jax.Array  # int32 []
  converged: jax.Array  # bool []: residual <= tolerance.

  @property
  def probability(self) -> jax.Array:
    """mu, [n]."""
    return jax.nn.sigmoid(self.log_odds)


def ising(
  edges: Edges, bags: Bags, lambda_s: jax.Array, lambda_bag: jax.Array, bag_factor: str
) -> Ising:
  """The Ising form of the Gibbs distribution; with "cardinality", of its neighbour edges only.

  With "quadratic" the edges must come from `merge_bag_mates`.
  """
  n = len(bags.place)
  degree = jax.ops.segment_sum(edges.weight, edges.target, n, indices_are_sorted=True)
  coupling = 2 * lambda_s * edges.weight
  if bag_factor == "cardinality":
    return Ising(-lambda_s * degree, coupling, ())
  field, bag_coupling = [], []
  for rows, size, count, weight in zip(bags.members, bags.size, bags.count, edges.bag_weight):
    lambda_b = (lambda_bag / size)[:, None]
    here = jnp.arange(rows.shape[1]) < size[:, None]
    field.append(-lambda_b * (1 - 2 * count[:, None]) - lambda_s * weight.sum(axis=2))
    pair = here[:, :, None] & here[:, None, :] & ~jnp.eye(rows.shape[1], dtype=bool)
    bag_coupling.append(jnp.where(pair, -2 * lambda_b[..., None] + 2 * lambda_s * weight, 0.0))
  return Ising(_take(field, bags) - lambda_s * degree, coupling, tuple(bag_coupling))


@functools.partial(jax.jit, static_argnames=("bag_factor",))
def infer(
  edges: Edges,
  bags: Bags,
  lambda_s: float,
  lambda_bag: float,
  *,
  bag_factor: str = "quadratic",
  damping: float = 0.5,
  max_iterations: int = 200,
  tolerance: float = 1e-3,
) -> Beliefs:
  """Marginals of the Gibbs distribution by loopy belief propagation.

  Args:
    edges: from `neighbour_edges`, and for "quadratic" `merge_bag_mates`.
    bags: from `group_bags`.
    lambda_s: weight of the neighbour edges; 0 leaves them out.
    lambda_bag: weight of a bag's count, times its size; 0 leaves the counts out.
    bag_factor: "quadratic" or "cardinality".
    damping: share of the old message that is kept.
    max_iterations, tolerance: stop when no message changes by more than the tolerance (in log
      odds, before damping), or after the iterations; the report says which.
  """
  return sum_product(
    ising(edges, bags, lambda_s, lambda_bag, bag_factor),
    edges,
    bags,
    lambda_bag,
    damping,
    max_iterations,
    tolerance,
  )


def sum_product(
  model: Ising, edges: Edges, bags: Bags, lambda_bag, damping, max_iterations, tolerance
) -> Beliefs:
  """Flooding schedule from messages of 0; see `infer`.

  `lambda_bag` is used by cardinality factors only: where the model has no bag couplings.
  """
  n = len(bags.place)
  pairwise = bool(model.bag_coupling)
  shapes = [j.shape for j in (model.bag_coupling if pairwise else bags.members)]
  # From a bag mate (quadratic, [.., to, from]) or from the bag ([.., to]).
  start = jnp.zeros_like(model.coupling), tuple(jnp.zeros(s, jnp.float32) for s in shapes)

  def log_odds(messages):
    by_edge, by_bag = messages
    belief = model.field + jax.ops.segment_sum(by_edge, edges.target, n, indices_are_sorted=True)
    return belief + _take([r.sum(axis=2) if pairwise else r for r in by_bag], bags)

  def send(messages):
    by_edge, by_bag = messages
    belief = log_odds(messages)
    to_edge = _along_edge(belief[edges.source] - by_edge[edges.reverse], model.coupling)
    # Padding has the log odds -inf: labels that are 0.
    padded = jnp.append(belief, -jnp.inf)
    to_bag = []
    for g, (rows, r) in enumerate(zip(bags.members, by_bag)):
      here = padded[rows]
      if pairwise:
        cavity = here[:, None, :] - r.swapaxes(1, 2)
        to_bag.append(_along_edge(cavity, model.bag_coupling[g]))
      else:
        sent = bag_messages(here - r, bags.count[g], lambda_bag / bags.size[g])
        to_bag.append(jnp.where(rows < n, sent, 0.0))
    return to_edge, tuple(to_bag)

  def step(state):
    messages, _, iterations = state
    new = send(messages)
    changes = jax.tree.map(lambda a, b: jnp.abs(a - b).max(initial=0.0), new, messages)
    residual = jnp.stack(jax.tree.leaves(changes)).max()
    damped = jax.tree.map(lambda old, new: damping * old + (1 - damping) * new, messages, new)
    return damped, residual, iterations + 1

  def unfinished(state):
    _, residual, iterations = state
    return (residual > tolerance) & (iterations < max_iterations)

  messages, residual, iterations = jax.lax.while_loop(
    unfinished, step, (start, jnp.float32(jnp.inf), jnp.int32(0))
  )
  return Beliefs(log_odds(messages), residual, iterations, residual <= tolerance)


def _along_edge(cavity: jax.Array, coupling: jax.Array) -> jax.Array:
  """log (1 + exp(l + J)) / (1 + exp(l)), from exp(-|l|), which does not overflow.

  Two calls of softplus say the same in more than twice the time. |J| is cut at 80, where float32's
  exponential ends.
  """
  small, factor = jnp.exp(-jnp.abs(cavity)), jnp.exp(jnp.clip(coupling, -80, 80))
  top = jnp.where(cavity >= 0, small + factor, 1 + small * factor)
  return jnp.log(top / (1 + small))


def _take(groups: list[jax.Array], bags: Bags) -> jax.Array:
  """Entries of the groups' members in the order of the instances: [B_g, M_g] each -> [n]."""
  return jnp.concatenate([group.reshape(-1) for group in groups])[bags.place]
