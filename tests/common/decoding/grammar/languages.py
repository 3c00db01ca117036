"""Languages by brute force: all short texts of a grammar, by what its rules say."""

import itertools

from common.decoding.grammar.grammar import Grammar


def short_texts(grammar: Grammar, longest: int) -> set[bytes]:
  """Texts of at most `longest` bytes: the least solution of the rules as equations of sets."""
  languages = [set() for _ in grammar.rules]
  while True:
    grown = [
      set().union(*(_concatenations(seq, languages, longest) for seq in rule)) if rule else set()
      for rule in grammar.rules
    ]
    if grown == languages:
      return languages[0]
    languages = grown


def _concatenations(sequence, languages, longest: int) -> set[bytes]:
  texts = {b""}
  for symbol in sequence:
    parts = languages[symbol] if isinstance(symbol, int) else {bytes([b]) for b in symbol}
    texts = {a + b for a, b in itertools.product(texts, parts) if len(a) + len(b) <= longest}
  return texts
