"""A decoder and its tokenizer, asked in text: how likely a text is, and how it goes on.

The rules of tokenization, truncation and windows are those of the `HFLM` of EleutherAI's harness.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import tokenizers

from common.data.tokenizer import bos_id, eos_id
from common.decoding.generation import Sampling, generate
from common.errors import UserError
from common.evaluation.log_likelihood import log_likelihoods, whole_batches
from common.models.decoder import Decoder


class Generation(NamedTuple):
  """What a request for text asks for.

  Attributes:
    until: strings that end the text; not part of it.
    max_new_tokens: at most so many.
    sampling: how tokens are chosen.
  """

  until: tuple[str, ...]
  max_new_tokens: int
  sampling: Sampling


class TextModel:
  """A decoder and its tokenizer, asked in text.

  Attributes:
    max_length: the most tokens that the model is given at once.
    prefix_token: what stands before a text without context.
  """

  def __init__(
    self,
    model: Decoder,
    tokenizer: tokenizers.Tokenizer,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    prefix_token: int | None = None,
    stop_token: int | None = None,
    key: jax.Array | None = None,
  ):
    """Wraps a model.

    Args:
      model: a decoder, quantized or not.
      tokenizer: its tokenizer; the special tokens of its template (a bos, say) are used.
      batch_size: rows per forward pass.
      max_length: tokens; by default the model's positions.
      prefix_token: by default the tokenizer's bos token, or else its eos token.
      stop_token: ends generated text; by default the tokenizer's eos token.
      key: for sampling; `jax.random.key(0)` by default.

    Raises:
      UserError: there is no prefix token, or `max_length` is not between 1 and the model's
        positions (where those are a learned table), or `batch_size` is not positive.
    """
    positions = model.config.max_position_embeddings
    self.max_length = positions if max_length is None else max_length
    if self.max_length < 1 or (self.max_length > positions and model.config.position == "learned"):
      raise UserError(f"max_length={max_length}: expected 1 to {positions}, the model's positions")
    if batch_size < 1:
      raise UserError(f"batch_size={batch_size} must be positive")
    self._stop_token = eos_id(tokenizer) if stop_token is None else stop_token
    found = [prefix_token, bos_id(tokenizer), self._stop_token]
    self.prefix_token = next((token for token in found if token is not None), None)
    if self.prefix_token is None:
      raise UserError("the tokenizer has no bos and no eos token: pass prefix_token=ID")
    self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size
    self._key = jax.random.key(0) if key is None else key

  def encode(self, text: str) -> list[int]:
    """Token ids, with the special tokens of the template unless the text begins with its own."""
    prefix = self._tokenizer.decode([self.prefix_token], skip_special_tokens=False)
    special = not (prefix and text.startswith(prefix))
    return self._tokenizer.encode(text, add_special_tokens=special).ids

  def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of its continuation, cut where the harness cuts.

    White space at the end of the context is moved to the continuation. The continuation is what the
    tokens of both together have beyond the number of the context's own tokens.

    Raises:
      UserError: no token is left for the continuation.
    """
    if context:
      end = len(context.rstrip())
      context, continuation = context[:end], context[end:] + continuation
    if context:
      before = self.encode(context)
      after = self.encode(context + continuation)[len(before) :]
    else:
      before = [self.prefix_token]
      after = self._tokenizer.encode(continuation, add_special_tokens=False).ids
      if after[:1] == before:
        after = after[1:]  # The text brought the prefix itself.
    if not after:
      raise UserError(
        f"the continuation {continuation!r} of the context {context[-40:]!r} has no token of its "
        "own: expected text that adds to the context; drop the item"
      )
    return before, after

  def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Scores continuations.

    Args:
      pairs: (context, continuation) each; an empty context is the prefix token.

    Returns:
      (log p(continuation | context) in nats, whether each of its tokens is the most likely one).

    Raises:
      UserError: a continuation has no token, or more than the model takes.
    """
    return self.token_log_likelihoods([self.encode_pair(*pair) for pair in pairs])

  def rolling_log_likelihoods(self, texts: Sequence[str]) -> list[float]:
    """log p(text) in nats of each text, in windows of the model's length, every token once."""
    windows = [list(self._windows(self.encode(text))) for text in texts]
    flat = iter(self.token_log_likelihoods([pair for pairs in windows for pair in pairs]))
    return [float(sum(next(flat)[0] for _ in pairs)) for pairs in windows]

  def _windows(self, tokens: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """(context, continuation) pairs: the first has the prefix, the last as much as fits."""
    for start in range(0, len(tokens), self.max_length):
      end = min(start + self.max_length, len(tokens))
      context = tokens[end - self.max_length - 1 : start] if start else [self.prefix_token]
      yield list(context), list(tokens[start:end])

  def token_log_likelihoods(
    self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
  ) -> list[tuple[float, bool]]:
    """`log_likelihoods` of token ids; what is too long loses the beginning of its context."""
    return log_likelihoods(
      self._model, pairs, batch_size=self._batch_size, max_length=self.max_length
    )

  def generate_until(self, requests: Sequence[tuple[str, Generation]]) -> list[str]:
    """Continues texts.

    Every row runs until the stop token or its `max_new_tokens`; the text is cut at the first
    string of `until` afterwards.

    Args:
      requests: (context, what is asked for) each. A context that leaves no room for
        `max_new_tokens` loses its beginning; an empty one is the prefix token.

    Returns:
      The new text of each.

    Raises:
      UserError: `max_new_tokens` leaves no room for a context.
    """
    groups = collections.defaultdict(list)
    for i, (context, wanted) in enumerate(requests):
      room = self.max_length - wanted.max_new_tokens
      if room < 1:
        raise UserError(
          f"{wanted.max_new_tokens} new tokens leave no room for a context in the model's "
          f"{self.max_length}: ask for fewer (max_gen_toks)"
        )
      prompt = (self.encode(context) or [self.prefix_token])[-room:]
      groups[wanted.max_new_tokens, wanted.sampling].append((i, prompt))
    results = [""] * len(requests)
    for (max_new_tokens, sampling), rows in groups.items():
      # Prompts of like length share a batch, and with it a padded length and a compilation.
      for batch in whole_batches(sorted(rows, key=lambda row: -len(row[1])), self._batch_size):
        self._key, key = jax.random.split(self._key)
        new = generate(
          self._model,
          [prompt for _, prompt in batch],
          max_new_tokens=max_new_tokens,
          key=key,
          sampling=sampling,
          stop_tokens=self._stop_token,
        )
        for (i, prompt), tokens in zip(batch, new):
          results[i] = cut(self._decode_after(prompt, tokens), requests[i][1].until)
    return results

  def _decode_after(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Text of tokens that follow a prompt.

    Decoded alone they would be a text's beginning, from which Llama's decoder drops a space: the
    first line of a program would lose its indentation.
    """
    before = self._tokenizer.decode(prompt[-1:])
    return self._tokenizer.decode([*prompt[-1:], *tokens])[len(before) :]


def cut(text: str, until: Sequence[str]) -> str:
  """The text before the first of the strings in `until` (empty ones are ignored)."""
  ends = [text.find(stop) for stop in until if stop]
  return text[: min((end for end in ends if end >= 0), default=len(text))]
