import gc
import itertools

import lark
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.decoding.grammar.ebnf import parse_ebnf
from common.decoding.grammar.grammar import Grammar, derivable
from common.decoding.grammar.recognizer import Recognizer
from common.errors import UserError
from tests.common.decoding.grammar.languages import short_texts

A, B = frozenset(b"a"), frozenset(b"ab")
_symbols = st.one_of(st.sampled_from([A, B, frozenset(b"b")]), st.integers(0, 3))
_grammars = st.tuples(*[st.lists(st.lists(_symbols, max_size=3).map(tuple), max_size=3)] * 4).map(
  lambda rules: Grammar(("root", "p", "q", "r"), tuple(map(tuple, rules)))
)
TEXTS = [bytes(t) for n in range(5) for t in itertools.product(b"ab", repeat=n)]


@settings(max_examples=200, derandomize=True)
@given(_grammars)
def test_random_grammars_against_brute_force(grammar):
  """Left, right and hidden recursion, cycles, ambiguity, empty and unproductive rules."""
  language = short_texts(grammar, 4)
  if not derivable(grammar, terminals=True)[0]:
    assert not language
    with pytest.raises(UserError, match="matches no text at all"):
      Recognizer(grammar)
    return
  recognizer = Recognizer(grammar)
  for text in TEXTS:
    state = recognizer.read(recognizer.start, text)
    assert (state is not None and recognizer.accepts(state)) == (text in language), text
    # What is alive can be completed; longer completions are not listed here.
    if any(other.startswith(text) for other in language):
      assert state is not None


@pytest.mark.parametrize(
  "ebnf, translated, alphabet",
  [
    (
      'root ::= root "+" term | term\nterm ::= term "*" factor | factor\n'
      'factor ::= "(" root ")" | [0-9]',
      'start: start "+" term | term\nterm: term "*" factor | factor\n'
      'factor: "(" start ")" | /[0-9]/',
      "1+*()",
    ),
    (
      'root ::= "a" root "b" | root root | "c"',
      'start: "a" start "b" | start start | "c"',
      "abc",
    ),
  ],
)
def test_agrees_with_larks_earley_parser(ebnf, translated, alphabet):
  recognizer = Recognizer(parse_ebnf(ebnf))
  parser = lark.Lark(translated, parser="earley", lexer="dynamic")
  rng = np.random.default_rng(0)
  accepted = 0
  for _ in range(400):
    text = "".join(rng.choice(list(alphabet), rng.integers(1, 8)))
    state = recognizer.read(recognizer.start, text.encode())
    try:
      parser.parse(text)
      expected = True
    except lark.exceptions.UnexpectedInput:
      expected = False
    assert (state is not None and recognizer.accepts(state)) == expected, text
    accepted += expected
  assert accepted > 10


def test_states_repeat():
  """Repetition, right and left recursion come back to the same state, so that caches work."""
  for ebnf in (
    "root ::= [0-9]+",
    "root ::= [0-9] root | [0-9]",
    "root ::= root [0-9] | [0-9]",
    'root ::= digits ("," digits)*\ndigits ::= [0-9] more\nmore ::= [0-9] more | ""',
  ):
    recognizer = Recognizer(parse_ebnf(ebnf))
    states, state = [], recognizer.start
    for byte in b"1234567":
      state = recognizer.advance(state, byte)
      states.append(state)
    assert len(set(states[1:])) == 1, ebnf
  nested = Recognizer(parse_ebnf('root ::= "[" root* "]"'))
  assert nested.read(nested.start, b"[[][]") is nested.read(nested.start, b"[[]")
  assert nested.read(nested.start, b"[[") is not nested.read(nested.start, b"[")


def test_a_state_stays_as_it_is():
  recognizer = Recognizer(parse_ebnf('root ::= "a" ("b" | "c" root)'))
  state = recognizer.read(recognizer.start, b"a")
  threads = state.threads
  assert recognizer.advance(state, ord("x")) is None
  assert recognizer.advance(None, ord("a")) is None
  assert recognizer.read(state, b"cab") is not None
  assert recognizer.accepts(recognizer.advance(state, ord("b")))
  assert state.threads == threads and not recognizer.accepts(state)


def test_deep_texts_and_memory():
  recognizer = Recognizer(parse_ebnf('root ::= "[" root "]" | "x" root | "y"'))
  depth = 5000
  state = recognizer.read(recognizer.start, b"[" * depth + b"xy" + b"]" * depth)
  assert recognizer.accepts(state)
  # Of what nobody holds, only the cached states are left.
  assert recognizer.successors.cache_info().currsize <= 8192
  del state
  recognizer.successors.cache_clear()
  gc.collect()
  assert len(recognizer._shared) < 10


def test_ambiguous_texts_are_read_in_polynomial_time():
  recognizer = Recognizer(parse_ebnf('root ::= root root | root root root | "a" | ""'))
  state = recognizer.start
  for i in range(100):
    state = recognizer.advance(state, ord("a"))
    assert len(state.threads) < 3 * i + 10
  assert recognizer.accepts(state)
