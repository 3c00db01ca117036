"""An independent check of texts: lark's Earley parser of the same grammar."""

import re
from collections.abc import Callable

import lark

_PIECE = re.compile(
  r'\s*(?:\#[^\n]*|(?P<head>[\w-]+)\s*::=|(?P<name>[\w-]+)|(?P<literal>"(?:[^"\\]|\\.)*")'
  r"|(?P<klass>\[(?:[^\]\\]|\\.)*\])|(?P<repeat>\{[^}]*\})|(?P<other>[|()*+?]))\s*"
)


def independent_parser(ebnf: str) -> Callable[[str], bool] | None:
  """Whether a text is of a grammar that `common.decoding.grammar.ebnf` can read.

  None for a grammar with {m,}, which lark does not have.
  """
  names: dict[str, str] = {}
  rule_name = lambda name: names.setdefault(name, f"rule_{len(names)}")
  rules = [f"start: {rule_name('root')}"]
  for match in _PIECE.finditer(ebnf):
    kind, text = match.lastgroup, match[match.lastgroup] if match.lastgroup else ""
    if kind == "head":
      rules.append(f"{rule_name(text)}: ")
    elif kind == "name":
      rules[-1] += f" {rule_name(text)}"
    elif kind == "literal":
      # Lark has no empty literal; nothing at all stands for it.
      rules[-1] += f" {text}" if text != '""' else " "
    elif kind == "klass":
      rules[-1] += " /" + text.replace("/", r"\/") + "/s"
    elif kind == "repeat":
      low, comma, high = (part.strip() for part in text[1:-1].partition(","))
      if comma and not high:
        return None
      rules[-1] += f"~{low}..{high or low}"
    elif kind == "other":
      rules[-1] += text
  parser = lark.Lark("\n".join(rules), parser="earley", lexer="dynamic_complete")

  def accepts(text: str) -> bool:
    try:
      parser.parse(text)
    except lark.exceptions.UnexpectedInput:
      return False
    return True

  return accepts
