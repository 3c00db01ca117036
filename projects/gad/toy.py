"""The paper's toy languages under random tabular models, where everything can be computed."""

from collections.abc import Callable

import numpy as np

from common.decoding.constrained import Constraint
from common.decoding.grammar.ebnf import parse_ebnf
from common.decoding.grammar.token_mask import TokenMasks, Vocabulary
from projects.gad.exact import TabularModel

# Skewed: behind the first 0 there is one text, behind the first 1 there are many.
LANGUAGES = {
  "3 bits": 'root ::= "000" | "1" bit bit\nbit ::= [01]',
  "5 bits": 'root ::= "00000" | "1" bit bit bit bit\nbit ::= [01]',
}
EOS = 3
# The third token is of no text.
TOKENS = [b"0", b"1", b"x", b""]


def toy_masks(language: str) -> TokenMasks:
  return TokenMasks(parse_ebnf(LANGUAGES[language]), Vocabulary(TOKENS, EOS))


def random_model(max_tokens: int, rng: np.random.Generator) -> TabularModel:
  """Next-token logits of every prefix, normally distributed with variance 1."""
  branching = len(TOKENS) - 1
  states = sum(branching**depth for depth in range(max_tokens))
  logits = rng.normal(size=(states, len(TOKENS)))
  log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
  # The children of a prefix are neighbours, as in a heap. Behind the last level nothing is asked.
  after = branching * np.arange(states)[:, None] + 1 + np.arange(branching)
  after = np.where(after < states, after, 0)
  return TabularModel(log_p, np.pad(after, ((0, 0), (0, 1))))


def sample_text(
  model: TabularModel, constraint: Constraint, max_tokens: int, rng: np.random.Generator
) -> list[int] | None:
  """One text as `common.decoding.constrained.decode` samples them; None if it does not end."""
  tokens, at = [], 0
  vocab = model.log_p.shape[1]
  for _ in range(max_tokens):
    allowed = np.unpackbits(constraint.packed_mask(), count=vocab).view(bool)
    scores = np.where(allowed, model.log_p[at], -np.inf)
    weighted, weights = constraint.log_weights()
    scores[list(weighted)] += weights
    token = int(np.argmax(scores + rng.gumbel(size=vocab)))
    if constraint.advance(token, lambda at=at: model.log_p[at]):
      return tokens
    tokens.append(token)
    at = model.after[at, token]
  return None


def drawer(
  model: TabularModel, max_tokens: int, rows: int, rng: np.random.Generator
) -> Callable[[int], list[list[int] | None]]:
  """Draws the model's own texts, `rows` at a time, for `rejection_sample`."""
  below = np.cumsum(np.exp(model.log_p), axis=1)[:, :-1]

  def draw(_: int) -> list[list[int] | None]:
    at = np.zeros(rows, int)
    tokens = np.zeros((rows, max_tokens), int)
    for i in range(max_tokens):
      tokens[:, i] = np.sum(rng.random((rows, 1)) > below[at], axis=1)
      at = model.after[at, tokens[:, i]]
    ends = np.argmax(tokens == EOS, axis=1)
    ended = (tokens == EOS).any(axis=1)
    return [row[:end] if ok else None for row, end, ok in zip(tokens.tolist(), ends, ended)]

  return draw
