"""Generation under constraints that the host follows token by token, such as a grammar.

`constrained_generate` is grammar-constrained decoding (GCD): tokens that the grammar forbids are
masked, and the rest renormalised. `decode` takes any `Constraint`, a mask and weights for some tokens;
rows have constraints of their own. While the device computes the next logits, the host prepares the
next masks.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.decoding.generation import (
  Progress,
  Sampling,
  prepare,
  sample,
  sampling_and_key,
  start,
  step,
)
from common.decoding.grammar.token_mask import TokenMasks
from common.errors import UserError
from common.models.decoder import Decoder
from common.models.encoder_decoder import EncoderDecoder

Array = jax.Array

# Weighted tokens are padded to this times a power of four: few programs serve all numbers of them.
_FEWEST_WEIGHTS = 16


class Completion(NamedTuple):
  """What one row generated.

  Attributes:
    tokens: without the end-of-sequence token.
    complete: whether the text ended by itself, and not because there was no more room.
    log_p: of all tokens, and of the end if it is complete, under the model without constraints (at
      the sampling's temperature, without top-k and top-p).
  """

  tokens: list[int]
  complete: bool
  log_p: float


class Constraint(Protocol):
  """What steers one row, from its first to its last token."""

  def packed_mask(self) -> np.ndarray:
    """The tokens that may come next, as of `TokenMasks.packed`; at least one."""

  def log_weights(self) -> tuple[Sequence[int], Sequence[float]]:
    """Tokens, and what to add to the log-probability of each; others stay as they are."""

  def advance(self, token: int, log_p: Callable[[], np.ndarray]) -> bool:
    """Takes the chosen token; returns whether it is the last one.

    `log_p` gives the model's log-probabilities of this token and its alternatives, float32 [vocab];
    they are fetched from the device if it is called.
    """


class GrammarConstraint:
  """The tokens that a grammar allows, all at the model's own weight."""

  def __init__(self, masks: TokenMasks):
    self.masks = masks
    self.state = masks.start

  def packed_mask(self) -> np.ndarray:
    return self.masks.packed(self.state)

  def log_weights(self) -> tuple[Sequence[int], Sequence[float]]:
    return (), ()

  def advance(self, token: int, log_p: Callable[[], np.ndarray]) -> bool:
    if token in self.masks.vocabulary.stop_tokens:
      return True
    self.state = self.masks.advance(self.state, token)
    return False


class Prompts(NamedTuple):
  """Prompts that the model has read; any number of samples goes on from them.

  Attributes:
    logits: of the first new token, float32 [batch, vocab].
    progress: what the next step needs.
    max_new_tokens: for which there is room.
  """

  logits: Array
  progress: Progress
  max_new_tokens: int


def constrained_generate(
  model: Decoder | EncoderDecoder,
  prompts: Sequence[Sequence[int]],
  masks: TokenMasks | Sequence[TokenMasks],
  *,
  max_new_tokens: int,
  key: Array | None = None,
  sampling: Sampling | None = None,
) -> list[Completion]:
  """Continues every prompt with a text of a grammar.

  Args:
    model: a decoder or an encoder-decoder, quantized or not.
    prompts: token ids, of any lengths; the sources of an encoder-decoder.
    masks: of the grammar of all rows, or of each.
    max_new_tokens: tokens to add at most, the end-of-sequence token included. A text that has not
      ended by then is the beginning of one of the grammar.
    key: for sampling; not needed when greedy.
    sampling: greedy by default. Top-k and top-p choose among the tokens that are allowed.

  Raises:
    UserError: as `generate`; the masks are of another vocabulary than the model's, or not one for
      each row; the vocabulary cannot spell the grammar.
    ValueError: sampling without a key.
  """
  sampling, key = sampling_and_key(sampling, key)
  masks = [masks] * len(prompts) if isinstance(masks, TokenMasks) else masks
  constraints = [GrammarConstraint(m) for m in masks]
  check_vocabulary(model, masks)
  read = read_prompts(model, prompts, max_new_tokens)
  return decode(model, read, constraints, key=key, sampling=sampling)


def check_vocabulary(model: Decoder | EncoderDecoder, masks: Sequence[TokenMasks]) -> None:
  """Raises UserError for masks that do not have the model's size."""
  for size in {m.vocabulary.size for m in masks} - {model.config.vocab_size}:
    raise UserError(
      f"the masks are over {size} tokens, the model has {model.config.vocab_size}: give "
      "`Vocabulary` the model's size"
    )


def read_prompts(
  model: Decoder | EncoderDecoder, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> Prompts:
  """Reads prompts (the sources of an encoder-decoder), once for all samples.

  Raises:
    UserError: as `generate`.
  """
  tokens, segment_ids, _ = prepare(model, prompts, max_new_tokens, ())
  logits, progress = _start(*nnx.split(model), tokens, segment_ids, max_new_tokens)
  return Prompts(logits, progress, max_new_tokens)


def decode(
  model: Decoder | EncoderDecoder,
  prompts: Prompts,
  constraints: Sequence[Constraint],
  *,
  key: Array,
  sampling: Sampling,
) -> list[Completion]:
  """Samples one continuation of every prompt.

  Args:
    model: that read the prompts.
    prompts: stay as they are.
    constraints: one for each row, at its beginning.
    key, sampling: as of `generate`.

  Raises:
    UserError: not one constraint for each prompt, or the model's logits have NaN.
  """
  rows = len(prompts.logits)
  if len(constraints) != rows:
    raise UserError(f"{len(constraints)} constraints for {rows} prompts: expected one for each")
  graphdef, state = nnx.split(model)
  logits, progress = prompts.logits, jax.tree.map(jnp.copy, prompts.progress)
  tokens, log_p, ended = [[] for _ in range(rows)], np.zeros(rows), np.zeros(rows, bool)
  masks = np.stack([c.packed_mask() for c in constraints])
  for i in range(prompts.max_new_tokens):
    # Rows that have ended take no weights.
    weights = [((), ()) if end else c.log_weights() for c, end in zip(constraints, ended)]
    chosen = choose(logits, masks, *padded_weights(weights), key, i, sampling)
    if i + 1 < prompts.max_new_tokens:
      logits, progress = _step(graphdef, state, progress, chosen.token)
    fetch = functools.cache(functools.partial(np.asarray, chosen.log_p))
    new, new_log_p = np.asarray(chosen.token), np.asarray(chosen.token_log_p)
    if np.isnan(new_log_p).any():
      raise UserError("the model's logits have NaN: is its checkpoint damaged?")
    log_p += np.where(ended, 0.0, new_log_p)
    for row in np.flatnonzero(~ended):
      token, constraint = int(new[row]), constraints[row]
      ended[row] = constraint.advance(token, lambda row=row, fetch=fetch: fetch()[row])
      if not ended[row]:
        tokens[row].append(token)
        if i + 1 < prompts.max_new_tokens:
          masks[row] = constraint.packed_mask()
    if ended.all():
      break
  return [Completion(*row) for row in zip(tokens, ended.tolist(), log_p.tolist())]


def padded_weights(
  weights: Sequence[tuple[Sequence[int], Sequence[float]]],
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens int32 and weights float32 [rows, most] of `Constraint.log_weights`; weight 0 is padding."""
  width = _FEWEST_WEIGHTS
  while width < max(len(tokens) for tokens, _ in weights):
    width *= 4
  tokens = np.zeros((len(weights), width), np.int32)
  padded = np.zeros((len(weights), width), np.float32)
  for row, (some, theirs) in enumerate(weights):
    tokens[row, : len(some)] = some
    padded[row, : len(some)] = theirs
  return tokens, padded


@functools.partial(jax.jit, static_argnums=3)
def logit_bias(masks: Array, weighted: Array, weights: Array, vocab_size: int) -> Array:
  """What is added to the logits: -inf for tokens that are not allowed, weights for some others.

  The host sends bits and a few numbers, 1/32 of the array that they stand for.

  Args:
    masks: uint8 [rows, vocab / 8], as of `TokenMasks.packed`.
    weighted, weights: tokens int32 and what is added to each float32 [rows, n]; the weights of a
      token that is there several times add up.
    vocab_size: of the model.

  Returns:
    float32 [rows, vocab].
  """
  allowed = jnp.unpackbits(masks, axis=1, count=vocab_size).astype(bool)
  rows = jnp.arange(len(masks))[:, None]
  return jnp.where(allowed, 0.0, -jnp.inf).at[rows, weighted].add(weights)


class Chosen(NamedTuple):
  """One token of each row.

  Attributes:
    token: int32 [batch].
    token_log_p: float32 [batch], under the model without the constraint.
    log_p: float32 [batch, vocab], of all tokens.
  """

  token: Array
  token_log_p: Array
  log_p: Array


@functools.partial(jax.jit, static_argnums=6)
def choose(logits, masks, weighted, weights, key, i, sampling: Sampling) -> Chosen:
  """Samples from softmax(log P + weights) over the allowed tokens.

  Args:
    logits: float32 [batch, vocab].
    masks: uint8 [batch, vocab / 8].
    weighted, weights: tokens int32 and what is added to their log-probability float32 [batch, n].
    key, i: of the row's token number i.
  """
  log_p = jax.nn.log_softmax(logits / (sampling.temperature or 1.0))
  scores = log_p + logit_bias(masks, weighted, weights, logits.shape[1])
  # The temperature is in the scores already.
  at_one = Sampling(float(sampling.temperature > 0), sampling.top_k, sampling.top_p)
  token = sample(scores, jax.random.fold_in(key, i), at_one)
  return Chosen(token, jnp.take_along_axis(log_p, token[:, None], axis=1)[:, 0], log_p)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _start(graphdef, state, tokens, segment_ids, max_new_tokens):
  return start(nnx.merge(graphdef, state), tokens, segment_ids, max_new_tokens)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(graphdef, state, progress, token):
  return step(nnx.merge(graphdef, state), progress, token)
