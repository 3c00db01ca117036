"""What sampling is measured against where it can be computed: c and Q of tabular models."""

from typing import NamedTuple

import numpy as np

from common.decoding.grammar.recognizer import State
from common.decoding.grammar.token_mask import TokenMasks
from projects.gad.trie import Trie


class TabularModel(NamedTuple):
  """A language model with finitely many states: a tree of prefixes, or a Markov chain.

  Attributes:
    log_p: float [states, vocab], of the next token.
    after: int [states, vocab], the state behind it. State 0 is the first.
  """

  log_p: np.ndarray
  after: np.ndarray


class TextProbability(NamedTuple):
  """log-probabilities of one text of the grammar.

  Attributes:
    model: under the model, with the end of sequence.
    sampler: under GCD or ASAp.
  """

  model: float
  sampler: float


def future_grammaticality(
  model: TabularModel, masks: TokenMasks, max_tokens: int
) -> list[dict[tuple[State, int], float]]:
  """Expected future grammaticality c by dynamic programming over (parser state, model state).

  c(u) is the probability that the model's own text, behind the prefix u, is one of the grammar and
  ends within `max_tokens` tokens (the end of sequence included).

  Returns:
    For each number of tokens read, from 0 to max_tokens, c of all pairs that can be reached.
  """
  eos = masks.vocabulary.eos
  levels = [{(masks.start, 0): None}]
  edges = []
  for _ in range(max_tokens):
    edges.append({})
    for state, at in levels[-1]:
      tokens = [t for t in np.flatnonzero(masks.mask(state)).tolist() if t != eos]
      edges[-1][state, at] = [
        (t, (masks.advance(state, t), int(model.after[at, t]))) for t in tokens
      ]
    levels.append(dict.fromkeys(pair for out in edges[-1].values() for _, pair in out))
  found = [dict.fromkeys(levels[-1], 0.0)]  # Cut off: no text.
  for level in reversed(edges):
    found.append({})
    for (state, at), out in level.items():
      p = np.exp(model.log_p[at])
      ends = p[eos] if masks.accepts(state) else 0.0
      found[-1][state, at] = float(ends + sum(p[t] * found[-2][pair] for t, pair in out))
  return found[::-1]


def text_probabilities(
  model: TabularModel, masks: TokenMasks, max_tokens: int, trie: Trie | None = None
) -> dict[tuple[int, ...], TextProbability]:
  """All texts of a grammar (token sequences without the end) that fit, with their probabilities.

  Args:
    model, masks, max_tokens: as of `future_grammaticality`.
    trie: what ASAp's sampler knows; None is GCD.
  """
  eos = masks.vocabulary.eos
  found = {}
  pending = [((), masks.start, 0, None if trie is None else trie.root, 0.0, 0.0)]
  while pending:
    tokens, state, at, node, log_p, log_q = pending.pop()
    scores = np.where(masks.mask(state), model.log_p[at], -np.inf)
    children = {} if node is None else node.children
    for token, child in children.items():
      scores[token] += child.log_success
    scores -= np.logaddexp.reduce(scores)
    for token in np.flatnonzero(masks.mask(state)).tolist():
      total, sampled = float(log_p + model.log_p[at, token]), float(log_q + scores[token])
      if token == eos:
        found[tokens] = TextProbability(total, sampled)
      elif len(tokens) + 2 <= max_tokens:  # There is room for the end.
        behind = masks.advance(state, token), int(model.after[at, token]), children.get(token)
        pending.append(((*tokens, token), *behind, total, sampled))
  return found


def conditional(log_p: np.ndarray) -> np.ndarray:
  """Probabilities that add up to 1. log_p: float [texts]."""
  return np.exp(log_p - np.logaddexp.reduce(log_p))
