"""Log-likelihood of continuations: what multiple choice and the evaluation harness ask for."""

import collections
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.decoding.generation import bucket
from common.errors import UserError

_SHORTEST_BUCKET = 32


def log_likelihoods(
  model: nnx.Module,
  pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
  *,
  batch_size: int = 32,
  max_length: int | None = None,
) -> list[tuple[float, bool]]:
  """Scores continuations of contexts, without generating any.

  Rows of like length share a batch, and with it a compilation.

  Args:
    model: a decoder; called as model(tokens, segment_ids=...) -> (logits, cache).
    pairs: (context, continuation) as token ids, at least one token each.
    batch_size: rows per forward pass.
    max_length: tokens that the model reads at most; a longer row loses the beginning of its
      context. None reads all.

  Returns:
    (log p(continuation | context) in nats, whether each of its tokens is the most likely one).

  Raises:
    ValueError: a context or a continuation is empty.
    UserError: a continuation is longer than `max_length`.
  """
  if not all(len(context) and len(continuation) for context, continuation in pairs):
    raise ValueError("log_likelihoods needs non-empty contexts and continuations")
  longest = max((len(continuation) for _, continuation in pairs), default=0)
  if max_length is not None and longest > max_length:
    raise UserError(
      f"a continuation has {longest} tokens and the model takes {max_length}: expected a shorter "
      "one; use another task or a longer max_length"
    )
  buckets = collections.defaultdict(list)
  for i, (context, continuation) in enumerate(pairs):
    # The last token is only predicted, never read.
    row = [*context, *continuation]
    row = row if max_length is None else row[-max_length - 1 :]
    buckets[bucket_length(len(row) - 1, max_length)].append((i, row, len(continuation)))
  graphdef, state = nnx.split(model)
  scored = [
    (batch, _score(graphdef, state, *_score_arrays([row[1:] for row in batch], length)))
    for length, rows in sorted(buckets.items(), reverse=True)
    for batch in whole_batches(rows, batch_size)
  ]
  # Read back last: until then the device is never waited for.
  results = [None] * len(pairs)
  for batch, (sums, greedy) in scored:
    for (i, *_), total, is_greedy in zip(batch, sums.tolist(), greedy.tolist()):
      results[i] = total, is_greedy
  return results


def whole_batches(rows: list, batch_size: int) -> Iterator[list]:
  """Batches of one size, for one compilation: the last is filled with copies of its last row."""
  for start in range(0, len(rows), batch_size):
    batch = rows[start : start + batch_size]
    yield batch + batch[-1:] * (batch_size - len(batch))


def bucket_length(length: int, max_length: int | None = None) -> int:
  """The least of 32, 48, 64, 96, 128, ... (at most `max_length`) that `length` fits into."""
  size = bucket(max(length, _SHORTEST_BUCKET))
  return size if max_length is None else min(size, max_length)


def _score_arrays(rows: Sequence[tuple[Sequence[int], int]], length: int) -> Sequence[np.ndarray]:
  """tokens, segment_ids, targets and which targets count, int32 [rows, length]."""
  tokens, segment_ids, targets, scored = np.zeros((4, len(rows), length), np.int32)
  for i, (row, count) in enumerate(rows):
    end = len(row) - 1
    tokens[i, :end], targets[i, :end] = row[:-1], row[1:]
    segment_ids[i, :end] = 1
    scored[i, end - count : end] = 1
  return tokens, segment_ids, targets, scored


@functools.partial(jax.jit, static_argnums=0)
def _score(graphdef, state, tokens, segment_ids, targets, scored):
  """Sum of log p of the targets that count, float32 [rows], and whether all are the argmax."""
  logits, _ = nnx.merge(graphdef, state)(tokens, segment_ids=segment_ids)
  logits = logits.astype(jnp.float32)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  log_probs = picked - jax.nn.logsumexp(logits, axis=-1)
  greedy = jnp.all((jnp.argmax(logits, axis=-1) == targets) | (scored == 0), axis=1)
  return jnp.sum(log_probs * scored, axis=1), greedy
