"""Log-probability of every token of texts, in padded batches."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from common.data.tokenizer import bos_id, eos_id
from common.errors import UserError
from common.evaluation.log_likelihood import bucket_length, whole_batches
from common.models.decoder import Decoder
from projects.min_k_prob.min_k_prob import TokenLogProbs

Array = jax.Array


def encode(
  tokenizer: tokenizers.Tokenizer, texts: Sequence[str], bos: bool | None = None
) -> tuple[list[list[int]], list[int]]:
  """Token ids of texts, and how many of them stand before the text (0 or 1) in each.

  No end-of-sequence token is kept: it would be an outlier that says nothing of the text.

  Args:
    tokenizer: the model's.
    texts: the texts.
    bos: whether a beginning-of-sequence token stands in front, so that the first token of the text
      is scored too. None does as the tokenizer's own template does (Llama's and OPT's have one,
      GPT-NeoX's has none).

  Raises:
    UserError: `bos` is asked of a tokenizer without such a token.
  """
  encodings = tokenizer.encode_batch(list(texts), add_special_tokens=True)
  first = bos_id(tokenizer)
  first = eos_id(tokenizer) if first is None else first
  if bos and first is None:
    raise UserError("the tokenizer has no bos and no eos token: use bos=no")
  rows, prefixes = [], []
  for encoding in encodings:
    special = np.array(encoding.special_tokens_mask, bool)
    ids = [i for i, is_special in zip(encoding.ids, special) if not is_special]
    template = [encoding.ids[0]] if len(special) and special[0] else []
    prefix = template if bos is None else (template or [first]) if bos else []
    rows.append(prefix + ids)
    prefixes.append(len(prefix))
  return rows, prefixes


def token_log_probs(
  model: Decoder,
  tokenizer: tokenizers.Tokenizer,
  texts: Sequence[str],
  *,
  bos: bool | None = None,
  batch_size: int = 32,
  pad_to: int | None = None,
) -> TokenLogProbs:
  """Scores texts with a decoder.

  Args:
    model: the decoder.
    tokenizer: its tokenizer.
    texts: at least one; each needs a token to predict.
    bos: see `encode`.
    batch_size: rows per forward pass.
    pad_to: tokens of a row; by default that of `bucket_length` that fits the longest text. Calls
      of one length share a compilation.

  Raises:
    UserError: a text has nothing to score or more tokens than the model's table of positions or
      `pad_to`, the tokenizer is another model's, or the log-probabilities are not finite.
  """
  if not texts:
    raise UserError("there are no texts to score: expected at least one")
  rows, _ = encode(tokenizer, texts, bos)
  counts = np.array([len(row) - 1 for row in rows], np.int32)
  for i in np.flatnonzero(counts < 1)[:1]:
    raise UserError(
      f"text {i} ({texts[i][:40]!r}) has {len(rows[i])} token: expected at least two (or one behind "
      "a bos token); drop it"
    )
  length = bucket_length(int(counts.max())) if pad_to is None else pad_to
  if model.config.position == "learned":
    length = min(length, model.config.max_position_embeddings)
  for i in np.flatnonzero(counts > length)[:1]:
    raise UserError(
      f"text {i} ({texts[i][:40]!r}) has {counts[i] + 1} tokens, expected at most {length + 1}: "
      "shorten the texts"
    )
  largest = max(map(max, rows))
  if largest >= model.config.vocab_size:
    raise UserError(
      f"the texts have token {largest}, the model {model.config.vocab_size} tokens: is the tokenizer "
      "another model's?"
    )
  tokens, targets, segment_ids = np.zeros((3, len(rows), length), np.int32)
  for i, row in enumerate(rows):
    tokens[i, : len(row) - 1], targets[i, : len(row) - 1] = row[:-1], row[1:]
    segment_ids[i, : len(row) - 1] = 1
  graphdef, state = nnx.split(model)
  size = min(batch_size, len(rows))
  scored = [
    _log_probs(graphdef, state, tokens[batch], segment_ids[batch], targets[batch])
    for batch in whole_batches(list(range(len(rows))), size)
  ]
  # Read back last: until then the device is never waited for.
  values = np.concatenate(jax.device_get(scored))[: len(rows)]
  for i in np.flatnonzero(~np.isfinite(values).all(axis=1))[:1]:
    raise UserError(
      f"the log-probabilities of text {i} ({texts[i][:40]!r}) are NaN or infinite: expected finite "
      "ones; is the checkpoint damaged?"
    )
  return TokenLogProbs(values, counts, targets)


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(graphdef, state, tokens: Array, segment_ids: Array, targets: Array) -> Array:
  """log p(target), 0 at padding, float32 [batch, length]; all arguments int32 of that shape."""
  logits, _ = nnx.merge(graphdef, state)(tokens, segment_ids=segment_ids)
  logits = logits.astype(jnp.float32)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jnp.where(segment_ids != 0, picked - jax.nn.logsumexp(logits, axis=-1), 0.0)
