r"""EBNF text to a grammar over bytes.

    root   ::= "[" (value ("," value)*)? "]"     # a comment
    value  ::= [0-9]+ | "\"" [^"\\]{1,8} "\"" | root

A rule is `name ::= alternatives`; there is one named `root`. Terminals are literals in double quotes
and character classes; `* + ? {n} {m,n} {m,}` and groups as usual. Escapes: \n \r \t \xHH \uHHHH
\UHHHHHHHH, and a backslash before any punctuation. White space, line ends included, only
separates. Rules may be recursive in any way. Characters become their UTF-8 bytes.
"""

import functools
import re

import lark

from common.decoding.grammar.grammar import Grammar, Sequence, derivable
from common.errors import UserError

ROOT = "root"
MAX_REPEAT = 4096
_SURROGATES = (0xD800, 0xDFFF)
_LAST = 0x10FFFF

_SYNTAX = r"""
  start: rule+
  rule: HEAD alternatives
  alternatives: sequence ("|" sequence)*
  sequence: item*
  item: atom [REPEAT]
  ?atom: NAME -> reference
    | LITERAL -> literal
    | CLASS -> character_class
    | "(" alternatives ")" -> group

  HEAD.2: /[A-Za-z_][\w-]*\s*::=/
  NAME: /[A-Za-z_][\w-]*/
  LITERAL: /"(?:[^"\\\n]|\\.)*"/
  CLASS: /\[(?:[^\]\\\n]|\\.)*\]/
  REPEAT: /[*+?]|\{\s*\d+\s*(?:,\s*\d*\s*)?\}/
  %ignore /(?:\s|\#[^\n]*)+/
"""
_CHARACTER = re.compile(
  r"\\x[0-9A-Fa-f]{2}|\\u[0-9A-Fa-f]{4}|\\U[0-9A-Fa-f]{8}|\\.|[^\\]", re.DOTALL
)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}


def parse_ebnf(text: str) -> Grammar:
  """Reads a grammar.

  Raises:
    UserError: a syntax error; no rule `root`; a rule that is missing, defined twice, or matches no
      text at all because every alternative goes on for ever.
  """
  builder = _Builder()
  # The callbacks run while the parser, which is no recursion, reads: nesting may be deep.
  parser = lark.Lark(_SYNTAX, parser="lalr", transformer=builder, maybe_placeholders=True)
  try:
    parser.parse(text)
  except lark.exceptions.UnexpectedInput as e:
    near = e.get_context(text, 20).splitlines()[0].strip() if e.pos_in_stream is not None else ""
    raise UserError(
      f"grammar, line {e.line}, column {e.column}: not EBNF near {near!r}; expected rules "
      "`name ::= alternatives` of literals, classes, names, groups and * + ? {m,n}"
    ) from None
  return builder.grammar()


class _Builder(lark.Transformer):
  """Collects rules as the parser finishes them. Until the end, rules are known by their names."""

  def __init__(self):
    super().__init__()
    self.rules: dict[str, list[tuple]] = {}
    self.helpers: dict[str, list[tuple]] = {}
    self.classes: dict[str, tuple] = {}

  def rule(self, children):
    head, alternatives = children
    name = head[: -len("::=")].strip()
    if name in self.rules:
      raise UserError(f"the rule {name!r} is defined twice: expected one definition, with `|`")
    self.rules[name] = alternatives

  def alternatives(self, children):
    return children

  def sequence(self, children):
    return tuple(symbol for item in children for symbol in item)

  def reference(self, children):
    return (str(children[0]),)

  def literal(self, children):
    codes = _characters(children[0][1:-1])
    return tuple(frozenset([byte]) for code in codes for byte in chr(code).encode())

  def character_class(self, children):
    text = str(children[0])
    if text not in self.classes:
      sequences = _class_sequences(text)
      self.classes[text] = sequences[0] if len(sequences) == 1 else self._helper(sequences)
    return self.classes[text]

  def group(self, children):
    (alternatives,) = children
    return alternatives[0] if len(alternatives) == 1 else self._helper(alternatives)

  def item(self, children):
    atom, repeat = children
    if repeat is None:
      return atom
    low, high = _repeats(str(repeat))
    if len(atom) != 1:  # Else copies of a copy would grow exponentially.
      atom = self._helper([atom])
    if high is None:
      return atom * low + self._star(atom)
    # x{m,n} is m times x, then (x (x ...)?)?.
    optional = ()
    for _ in range(high - low):
      optional = self._helper([atom + optional, ()])
    return atom * low + optional

  def _star(self, atom):
    name = self._helper([])
    self.helpers[name[0]] += [atom + name, ()]
    return name

  def _helper(self, alternatives) -> tuple[str]:
    """The symbol of a rule without a name of the user's."""
    name = f"({len(self.helpers)})"
    self.helpers[name] = list(alternatives)
    return (name,)

  def grammar(self) -> Grammar:
    if ROOT not in self.rules:
      raise UserError(f"the grammar has no rule {ROOT!r}: expected one, where a text begins")
    rules = {ROOT: self.rules[ROOT]} | self.rules | self.helpers
    index = {name: i for i, name in enumerate(rules)}
    for name, alternatives in rules.items():
      for symbol in (s for sequence in alternatives for s in sequence):
        if isinstance(symbol, str) and symbol not in index:
          where = f"{name!r} uses" if name in self.rules else "a group uses"
          raise UserError(f"{where} the rule {symbol!r}, which is not defined: define it")
    resolve = lambda s: index[s] if isinstance(s, str) else s
    compiled = [tuple(tuple(map(resolve, seq)) for seq in rule) for rule in rules.values()]
    grammar = Grammar(tuple(rules), tuple(compiled))
    dead = [name for name, ok in zip(rules, derivable(grammar, True)) if not ok]
    if dead:
      named = ", ".join(name for name in dead if name in self.rules)
      raise UserError(
        f"rules that match no text at all, because every alternative goes on for ever: {named}; "
        "expected an alternative that ends"
      )
    return grammar


def _repeats(quantifier: str) -> tuple[int, int | None]:
  """Least and most repetitions (None: no limit)."""
  if quantifier in "*+?":
    return {"*": (0, None), "+": (1, None), "?": (0, 1)}[quantifier]
  low, comma, high = (part.strip() for part in quantifier[1:-1].partition(","))
  low = int(low)
  high = low if not comma else int(high) if high else None
  if max(low, high or 0) > MAX_REPEAT or (high is not None and high < low):
    raise UserError(f"repetition {quantifier}: expected m <= n <= {MAX_REPEAT}")
  return low, high


def _characters(text: str) -> list[int]:
  """Code points of text with escapes."""
  return [_code_point(match[0]) for match in _CHARACTER.finditer(text)]


def _code_point(character: str) -> int:
  if len(character) == 1:
    code = ord(character)
  elif len(character) > 2:
    code = int(character[2:], 16)
  elif character[1] in _ESCAPES:
    code = ord(_ESCAPES[character[1]])
  elif character[1].isalnum():
    raise UserError(
      f"unknown escape {character} in the grammar: expected \\n, \\r, \\t, \\xHH, \\uHHHH, "
      "\\UHHHHHHHH or a backslash before punctuation"
    )
  else:
    code = ord(character[1])
  if code > _LAST or _SURROGATES[0] <= code <= _SURROGATES[1]:
    raise UserError(f"{character} in the grammar is no character: expected one that UTF-8 has")
  return code


def _class_sequences(text: str) -> list[Sequence]:
  """The UTF-8 encodings of a character class such as [^a-z], as sequences of byte sets."""
  body = text[1:-1]
  negated = body.startswith("^")
  pieces = [match[0] for match in _CHARACTER.finditer(body[negated:])]
  ranges, i = [], 0
  while i < len(pieces):
    low = high = _code_point(pieces[i])
    if i + 2 < len(pieces) and pieces[i + 1] == "-":
      high, i = _code_point(pieces[i + 2]), i + 2
    if high < low:
      raise UserError(f"the class {text} has a range that runs backwards")
    ranges.append((low, high))
    i += 1
  ranges = _complement(ranges) if negated else sorted(ranges)
  single, longer = set(), {}
  for low, high in ranges:
    for sequence in utf8_ranges(low, high):
      if len(sequence) == 1:
        single |= sequence[0]
      else:
        longer[sequence] = None  # In order, without repetition.
  sequences = [(frozenset(single),)] * bool(single) + list(longer)
  if not sequences:
    raise UserError(f"the class {text} has no character: expected at least one")
  return sequences


def _complement(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
  rest, begin = [], 0
  for low, high in sorted(ranges):
    if begin < low:
      rest.append((begin, low - 1))
    begin = max(begin, high + 1)
  return rest + [(begin, _LAST)] * (begin <= _LAST)


def utf8_ranges(low: int, high: int) -> list[Sequence]:
  """The UTF-8 encodings of the code points low to high, as sequences of byte sets.

  A range is cut until its encodings are the product of one range for each byte.
  """
  pending, found = [(low, high)], []
  while pending:
    low, high = pending.pop()
    cut = _utf8_cut(low, high)
    if cut is not None:
      pending += [(cut + 1, high), (low, cut)]
    elif not _SURROGATES[0] <= low <= _SURROGATES[1]:
      pairs = zip(chr(low).encode(), chr(high).encode())
      found.append(tuple(_byte_range(*pair) for pair in pairs))
  return found


def _utf8_cut(low: int, high: int) -> int | None:
  """The last code point of the part of a range to be cut off; None for a product of ranges."""
  # Where the length changes, and around surrogates, which UTF-8 lacks.
  for last in (0x7F, 0x7FF, _SURROGATES[0] - 1, _SURROGATES[1], 0xFFFF):
    if low <= last < high:
      return last
  # Where a trailing byte does not run from its least to its greatest value.
  for bits in (6, 12, 18):
    below = (1 << bits) - 1
    if low >> bits != high >> bits:
      if low & below:
        return low | below
      if high & below != below:
        return (high & ~below) - 1
  return None


@functools.cache
def _byte_range(low: int, high: int) -> frozenset[int]:
  return frozenset(range(low, high + 1))
