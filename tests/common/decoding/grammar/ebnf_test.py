import itertools
import re

import pytest

from common.decoding.grammar.ebnf import parse_ebnf, utf8_ranges
from common.decoding.grammar.recognizer import Recognizer
from common.errors import UserError
from tests.common.decoding.grammar.languages import short_texts


def reader(ebnf: str):
  """Whether a text is of a grammar."""
  recognizer = Recognizer(parse_ebnf(ebnf))

  def accepts(text: str | bytes) -> bool:
    state = recognizer.read(recognizer.start, text.encode() if isinstance(text, str) else text)
    return state is not None and recognizer.accepts(state)

  return accepts


def matches(ebnf: str, text: str | bytes) -> bool:
  return reader(ebnf)(text)


@pytest.mark.parametrize(
  "expression, pattern",
  [
    ("[ab]*", "[ab]*"),
    ("[ab]+", "[ab]+"),
    ('"a"? "b"', "a?b"),
    ("[ab]{2}", "[ab]{2}"),
    ("[ab]{1,3}", "[ab]{1,3}"),
    ('("a" "b"?){2,}', "(ab?){2,}"),
    ('("a" | "b" "a" |){0,2} "b"', "(a|ba|){0,2}b"),
    ("[^a]", "[^a]"),
    ('("a"*)*', "(a*)*"),
  ],
)
def test_operators_mean_what_they_mean_in_regular_expressions(expression, pattern):
  accepts = reader(f"root ::= {expression}")
  for length in range(5):
    for text in map("".join, itertools.product("abc", repeat=length)):
      assert accepts(text) == bool(re.fullmatch(pattern, text)), text


def test_layout_comments_and_escapes():
  ebnf = r"""
    # The head of a rule may be anywhere; so may its end.
    root ::= item
      | "[" ( root
        "," )* root "]"  # nested
    item ::= "\"\\\n\x41\u00e9\U0001F600" | [\]\-\^a-c-]
  """
  for text in ('"\\\nAé😀', "[b,-]", "]", "^", "[[a,b],c]", "-"):
    assert matches(ebnf, text), text
  for text in ("d", "[b,]", "\\", "[]"):
    assert not matches(ebnf, text), text


@pytest.mark.parametrize(
  "text, good, bad",
  [
    ("[à-ÿ]", "àéÿ", "aß`Ā"),
    ("[^a]", "b\x00é語😀\uffff\ue000", "a"),
    ("[ࠀ-\uffff]", "ࠀ語\ud7ff\ue000\uffff", "a߿😀"),
    (r"[\U00010000-\U0010FFFF]", "😀\U00010000\U0010ffff", "a\uffff"),
  ],
)
def test_classes_are_of_characters(text, good, bad):
  for character in good:
    assert matches(f"root ::= {text}", character), hex(ord(character))
  for character in bad:
    assert not matches(f"root ::= {text}", character), hex(ord(character))


@pytest.mark.parametrize("low, high", [(0, 0x10FFFF), (0x7A, 0x923), (0xD000, 0x10123)])
def test_utf8_ranges_are_exact(low, high):
  sequences = utf8_ranges(low, high)
  characters = [c for c in range(low, high + 1) if not 0xD800 <= c <= 0xDFFF]
  size = 0
  for sequence in sequences:
    product = 1
    for part in sequence:
      product *= len(part)
    size += product
  # As many encodings as characters, and the ends of each product are characters of the range.
  assert size == len(characters)
  for sequence in sequences:
    for end in (min, max):
      (character,) = bytes(map(end, sequence)).decode()
      assert low <= ord(character) <= high


def test_unpaired_bytes_are_no_text():
  assert not matches("root ::= [^a]+", b"\xc3")
  assert not matches("root ::= [^a]+", b"\xed\xa0\x80")  # A surrogate.


def test_deep_nesting_and_many_rules():
  depth = 3000
  assert matches("root ::= " + '("a" | ' * depth + '"b"' + ")" * depth, "b")
  chain = "\n".join(f'r{i} ::= "a" r{i + 1}' for i in range(depth))
  assert matches(f'root ::= r0\n{chain}\nr{depth} ::= "b"', "a" * depth + "b")
  assert matches('root ::= ((("a"{1000}){3}){2} "b"){0,2}', "a" * 6000 + "b")


def test_short_texts_of_a_small_grammar():
  grammar = parse_ebnf('root ::= "(" root ")" root | ""')
  assert short_texts(grammar, 4) == {b"", b"()", b"()()", b"(())"}


@pytest.mark.parametrize(
  "ebnf, message",
  [
    ('start ::= "a"', "no rule 'root'"),
    ("root ::= item", "'root' uses the rule 'item', which is not defined"),
    ('root ::= ("a" | item)', "a group uses the rule 'item'"),
    ('root ::= "a"\nroot ::= "b"', "'root' is defined twice"),
    ('root ::= "a" loop | "b"\nloop ::= "x" loop', "match no text at all.*: loop"),
    ("root ::= root", "match no text at all.*: root"),
    ('root ::= "a', "line 1, column 10: not EBNF"),
    ('root ::= "a"\n\n  "b" ) "c"', "line 3, column 7"),
    ("", "not EBNF"),
    ('root : "a"', "line 1, column 1: not EBNF"),
    ('root ::= "a"{3,2}', "expected m <= n"),
    ('root ::= "a"{5000}', "m <= n <= 4096"),
    ("root ::= [z-a]", "runs backwards"),
    ("root ::= []", "has no character"),
    (r"root ::= [^\x00-\U0010FFFF]", "has no character"),
    (r'root ::= "\q"', r"unknown escape \\q"),
    (r'root ::= "\uD800"', "is no character"),
    (r'root ::= "\UFFFFFFFF"', "is no character"),
  ],
)
def test_bad_grammars_are_user_errors(ebnf, message):
  with pytest.raises(UserError, match=message):
    parse_ebnf(ebnf)
