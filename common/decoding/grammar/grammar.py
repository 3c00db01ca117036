"""Context-free grammars over bytes, and what can be said of them without reading anything."""

import collections
import dataclasses

from common.errors import UserError

# A rule by its index, or the bytes of which one is read.
Symbol = int | frozenset[int]
Sequence = tuple[Symbol, ...]


@dataclasses.dataclass(frozen=True)
class Grammar:
  """A context-free grammar in Backus-Naur form.

  Attributes:
    names: of the rules, for messages. Rule 0 is where a text begins.
    rules: the alternatives of each rule, sequences of symbols.
  """

  names: tuple[str, ...]
  rules: tuple[tuple[Sequence, ...], ...]


def derivable(grammar: Grammar, terminals: bool) -> list[bool]:
  """Which rules have an alternative of derivable symbols only.

  Args:
    grammar: any.
    terminals: whether a set of bytes counts as derivable. True tells which rules are productive
      (an empty set never is), False which are nullable, that is, match the empty text.
  """
  heads, missing = [], []
  uses = collections.defaultdict(list)
  for rule, alternatives in enumerate(grammar.rules):
    for sequence in alternatives:
      needed = [s for s in sequence if not isinstance(s, frozenset) or not (terminals and s)]
      for symbol in needed:
        uses[symbol].append(len(heads))
      heads.append(rule)
      missing.append(len(needed))
  found = [False] * len(grammar.rules)
  ready = [i for i, count in enumerate(missing) if not count]
  while ready:
    rule = heads[ready.pop()]
    if found[rule]:
      continue
    found[rule] = True
    for i in uses[rule]:
      missing[i] -= 1
      if not missing[i]:
        ready.append(i)
  return found


def productive_part(grammar: Grammar) -> Grammar:
  """The grammar without alternatives that derive no text; its language is the same.

  Raises:
    UserError: nothing is left.
  """
  productive = derivable(grammar, terminals=True)
  if not productive[0]:
    raise UserError(
      f"the rule {grammar.names[0]!r} matches no text at all: expected an alternative that ends"
    )
  keeps = lambda s: bool(s) if isinstance(s, frozenset) else productive[s]
  rules = [[seq for seq in rule if all(map(keeps, seq))] for rule in grammar.rules]
  return Grammar(grammar.names, tuple(map(tuple, rules)))


def restrict(grammar: Grammar, alphabet: frozenset[int]) -> Grammar:
  """The grammar of those texts that have no other bytes.

  Raises:
    UserError: there are none.
  """
  cut = lambda s: s & alphabet if isinstance(s, frozenset) else s
  rules = [[tuple(map(cut, seq)) for seq in rule] for rule in grammar.rules]
  try:
    return productive_part(Grammar(grammar.names, tuple(map(tuple, rules))))
  except UserError:
    used = frozenset().union(
      *(s for r in grammar.rules for q in r for s in q if isinstance(s, frozenset))
    )
    lacking = bytes(sorted(used - alphabet)).decode("latin-1")
    raise UserError(
      f"the vocabulary cannot spell a text of the grammar: no token has the bytes {lacking!r}; "
      "expected a tokenizer that has them, or a grammar without them"
    ) from None
