"""Evaluates SyGuS programs (string and bit-vector theories): whether a sample solves its task.

Programs are S-expressions of total functions, so that they can be evaluated while they are read, from
the innermost parentheses outwards.
"""

import functools
import operator
import re
from collections.abc import Callable, Mapping

Value = str | int | bool

_TOKEN = re.compile(r'\s*(?:([()])|("(?:[^"]|"")*")|([^\s()"]+))')
_DEFINITION = re.compile(
  r"\s*\(\s*define-fun\s+\S+\s+\((?:\s*\([^()]*(?:\([^()]*\))?\s*\))*\s*\)"
  r"\s*(?:\([^()]*\)|\w+)\s*(.*)\)\s*",
  re.DOTALL,
)


def evaluate(program: str, arguments: Mapping[str, Value], width: int = 4) -> Value:
  """The value of a program, or of the body of its `define-fun`.

  Args:
    program: an S-expression.
    arguments: values of its variables; bit-vectors are their unsigned numbers.
    width: bits of bit-vectors.

  Raises:
    ValueError: not a program of these theories, or an unknown name.
  """
  definition = _DEFINITION.fullmatch(program)
  text = (definition[1] if definition else program).strip()
  functions = _FUNCTIONS | _bit_vector_functions(width)
  frames, at = [[]], 0
  while at < len(text):
    match = _TOKEN.match(text, at)
    if match is None:
      raise ValueError(f"no S-expression: {text[at:]!r}")
    at = match.end()
    bracket, string, atom = match.groups()
    if bracket == "(":
      frames.append([])
    elif bracket == ")":
      if len(frames) == 1 or not frames[-1] or not callable(frames[-1][0]):
        raise ValueError(f"a function is missing: {text[:at]!r}")
      function, *values = frames.pop()
      if any(callable(value) for value in values):
        raise ValueError("a function is no value")
      try:
        frames[-1].append(function(*values))
      except (TypeError, AttributeError) as e:
        raise ValueError(f"wrong arguments: {e}") from None
    elif string is not None:
      frames[-1].append(string[1:-1].replace('""', '"'))
    else:
      frames[-1].append(_atom(atom, arguments, functions))
  if len(frames) != 1 or len(frames[0]) != 1 or callable(frames[0][0]):
    raise ValueError(f"not one expression: {text!r}")
  return frames[0][0]


def _atom(text: str, arguments: Mapping[str, Value], functions: Mapping[str, Callable]):
  if text in arguments:
    return arguments[text]
  if text in functions:
    return functions[text]
  if text in ("true", "false"):
    return text == "true"
  if match := re.fullmatch(r"#b([01]+)|#x([0-9A-Fa-f]+)|(-?\d+)", text):
    return int(match[match.lastindex], {1: 2, 2: 16, 3: 10}[match.lastindex])
  raise ValueError(f"unknown name {text!r}")


def _substring(text: str, start: int, length: int) -> str:
  return text[start : start + length] if 0 <= start < len(text) and length > 0 else ""


def _index_of(text: str, part: str, start: int) -> int:
  return text.find(part, start) if 0 <= start <= len(text) else -1


def _to_int(text: str) -> int:
  return int(text) if re.fullmatch("[0-9]+", text) else -1


def _from_int(number: int) -> str:
  return str(number) if number >= 0 else ""


def _minus(first: int, *others: int) -> int:
  return first - sum(others) if others else -first


_FUNCTIONS = {
  "str.++": lambda *parts: "".join(parts),
  "str.replace": lambda text, old, new: text.replace(old, new, 1),
  "str.at": lambda text, index: _substring(text, index, 1),
  "str.substr": _substring,
  "str.indexof": _index_of,
  "str.len": len,
  "str.prefixof": lambda prefix, text: text.startswith(prefix),
  "str.suffixof": lambda suffix, text: text.endswith(suffix),
  "str.contains": lambda text, part: part in text,
  "str.to.int": _to_int,
  "str.to_int": _to_int,
  "int.to.str": _from_int,
  "str.from_int": _from_int,
  "+": lambda *terms: sum(terms),
  "-": _minus,
  "*": lambda *factors: functools.reduce(operator.mul, factors, 1),
  "=": operator.eq,
  "<": operator.lt,
  "<=": operator.le,
  ">": operator.gt,
  ">=": operator.ge,
  "and": lambda *terms: all(terms),
  "or": lambda *terms: any(terms),
  "not": operator.not_,
  "=>": lambda a, b: not a or b,
  "ite": lambda condition, yes, no: yes if condition else no,
}


def _bit_vector_functions(width: int) -> dict[str, Callable]:
  ones = (1 << width) - 1
  signed = lambda a: a - (ones + 1) if a >> (width - 1) else a
  wrapped = lambda f: lambda *values: f(*values) & ones
  compare = {"lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}
  reduced = lambda f: lambda *values: functools.reduce(f, values) & ones
  return {
    "bvadd": reduced(operator.add),
    "bvsub": wrapped(operator.sub),
    "bvmul": reduced(operator.mul),
    "bvand": reduced(operator.and_),
    "bvor": reduced(operator.or_),
    "bvxor": reduced(operator.xor),
    "bvnot": wrapped(operator.invert),
    "bvneg": wrapped(operator.neg),
    "bvshl": wrapped(lambda a, b: a << min(b, width)),
    "bvlshr": lambda a, b: a >> b,
    "bvashr": wrapped(lambda a, b: signed(a) >> b),
    # Division by zero is defined in SMT-LIB.
    "bvudiv": lambda a, b: a // b if b else ones,
    "bvurem": lambda a, b: a % b if b else a,
    **{f"bvu{name}": f for name, f in compare.items()},
    **{f"bvs{name}": lambda a, b, f=f: f(signed(a), signed(b)) for name, f in compare.items()},
  }
