"""SpecDec++: a trained head on the draft model decides, token by token, when to stop drafting.

A drafted token Y_i is accepted with probability min(1, p(Y_i) / q(Y_i)) while all before it are, p
the target's distribution and q the draft's. The head predicts that probability from the draft's last
hidden state e_i at Y_i (the state whose input is Y_i):

    a_i = softmax(W_out ResBlock_D(... ResBlock_1(e_i)))[1],   ResBlock(x) = x + SiLU(W x + b)

and a round of drafts ends when a rejection is likely enough,

    1 - prod_i a_i > h        (section 3.2; that a threshold is optimal is theorem 3.1)

Verification, rejection and the caches are `common.decoding.speculative`: text keeps the target's
distribution whatever the head says.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from common.decoding.speculative import Draft, Policy

Array = jax.Array

# Label of a position that is not trained on.
IGNORED = -100.0


class AcceptanceHead(NamedTuple):
  """Parameters of the acceptance prediction head, float32; D residual blocks, class 1 = accept.

  Attributes:
    kernels: [D, width, width] (in, out).
    biases: [D, width].
    out_kernel: [width, 2].
    out_bias: [2].
  """

  kernels: Array
  biases: Array
  out_kernel: Array
  out_bias: Array


def init_head(key: Array, width: int, num_blocks: int) -> AcceptanceHead:
  """A head with kernels and biases uniform in +- 1 / sqrt(width)."""
  shapes = AcceptanceHead((num_blocks, width, width), (num_blocks, width), (width, 2), (2,))
  keys = AcceptanceHead(*jax.random.split(key, 4))
  reach = width**-0.5
  uniform = lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -reach, reach)
  return AcceptanceHead(*map(uniform, keys, shapes))


def tie_blocks(head: AcceptanceHead, num_blocks: int) -> AcceptanceHead:
  """Repeats the only block of a head: the official code's D blocks are one module.

  Args:
    head: with one block.
    num_blocks: D.
  """
  repeat = lambda x: jnp.broadcast_to(x, (num_blocks, *x.shape[1:]))
  return head._replace(kernels=repeat(head.kernels), biases=repeat(head.biases))


def acceptance_logits(head: AcceptanceHead, hidden: Array) -> Array:
  """Logits of rejection and acceptance.

  Args:
    head: its parameters.
    hidden: the draft's hidden state (behind the final norm) at each drafted token, [..., width].

  Returns:
    float32 [..., 2].
  """

  def block(x, parameters):
    kernel, bias = parameters
    return x + jax.nn.silu(x @ kernel + bias), None

  x, _ = jax.lax.scan(block, hidden.astype(jnp.float32), (head.kernels, head.biases))
  return x @ head.out_kernel + head.out_bias


def acceptance_probability(head: AcceptanceHead, hidden: Array) -> Array:
  """a, float32 [...]. hidden: [..., width]."""
  return jax.nn.softmax(acceptance_logits(head, hidden))[..., 1]


def soft_labels(log_p: Array, log_q: Array) -> Array:
  """A = min(1, p(Y) / q(Y)), from log-probabilities of the drafted tokens [...], float32.

  In log space: q may be too small for a quotient. A token that q could not draw (log_q = -inf) is
  as if it were accepted only where the target could.
  """
  ratio = jnp.where(jnp.isneginf(log_p), -jnp.inf, log_p - log_q)
  return jnp.exp(jnp.minimum(ratio, 0.0))


def mix_tokens(
  key: Array, text: Array, drafts: Array, labels: Array, mixing: float | Array
) -> tuple[Array, Array]:
  """Token mixing: what the head is trained on has the draft's tokens, and some of the target's.

  Args:
    key: of the choice.
    text: X, the target's continuations, int32 [..., seq].
    drafts: Y, int32 [..., seq], each drafted behind the X before it.
    labels: A of the drafts, float32 [..., seq].
    mixing: r, the probability that Z_i is X_i.

  Returns:
    Z int32 [..., seq], and the labels, `IGNORED` where Z_i is X_i.
  """
  from_text = jax.random.bernoulli(key, mixing, text.shape)
  return jnp.where(from_text, text, drafts), jnp.where(from_text, IGNORED, labels)


def weighted_cross_entropy(
  logits: Array, labels: Array, rejected_weight: float | Array
) -> tuple[Array, Array]:
  """Binary cross-entropy with soft labels, rejections weighted (section 3.2):

    sum_i w (1 - A_i) (-log(1 - a_i)) + A_i (-log a_i),   over   sum_i w (1 - A_i) + A_i

  Args:
    logits: of `acceptance_logits`, [..., 2].
    labels: A, [...]; `IGNORED` positions do not count.
    rejected_weight: w; 1 is plain cross-entropy.

  Returns:
    Both sums, float32 []; the loss is their quotient.
  """
  counted = labels != IGNORED
  accepted = jnp.where(counted, labels, 0.0)
  rejected = jnp.where(counted, rejected_weight * (1 - labels), 0.0)
  weights = jnp.stack([rejected, accepted], axis=-1)
  return jnp.sum(optax.softmax_cross_entropy(logits, weights)), jnp.sum(weights)


def bernoulli_kl(labels: Array, probabilities: Array) -> Array:
  """KL(Bernoulli(A) || Bernoulli(a)) in nats, [...], with 0 log 0 = 0.

  Args:
    labels: A in [0, 1], [...].
    probabilities: a in (0, 1), [...].
  """
  term = lambda p, q: jnp.where(p > 0, p * (jnp.log(jnp.where(p > 0, p, 1.0)) - jnp.log(q)), 0.0)
  return term(labels, probabilities) + term(1 - labels, 1 - probabilities)


class ThresholdState(NamedTuple):
  """State of `threshold_policy`.

  Attributes:
    head: the trained head.
    threshold: h, float32 [].
    shortest, longest: bounds of a round, inclusive, int32 [].
    stop_token: ends a round, int32 []; -1 for none.
    all_accepted: prod a_i of this round, float32 [batch].
  """

  head: AcceptanceHead
  threshold: Array
  shortest: Array
  longest: Array
  stop_token: Array
  all_accepted: Array


def threshold_policy(
  head: AcceptanceHead,
  threshold: float,
  *,
  batch: int,
  shortest: int = 2,
  longest: int = 20,
  stop_token: int = -1,
) -> Policy:
  """SpecDec++: stops when 1 - prod a_i > h, the chance that a drafted token is rejected.

  Thresholds, bounds and heads of one shape share a compilation.
  """
  state = ThresholdState(
    head,
    jnp.float32(threshold),
    jnp.int32(shortest),
    jnp.int32(longest),
    jnp.int32(stop_token),
    jnp.ones(batch, jnp.float32),
  )
  return Policy(_stop, state=state)


def _stop(state: ThresholdState, draft: Draft) -> tuple[ThresholdState, Array]:
  # The state that predicted a token is the state at the token before it: the newest token is sent
  # without a score, and at the first step the token before is a verified one.
  score = acceptance_probability(state.head, draft.hidden)
  first = draft.step == 1
  all_accepted = jnp.where(first, 1.0, state.all_accepted * score)
  stop = (draft.step >= state.shortest) & (1 - all_accepted > state.threshold)
  stop |= (draft.step >= state.longest) | (draft.token == state.stop_token)
  return state._replace(all_accepted=all_accepted), stop
