"""Problems, programs, pass@k and runs of HumanEval."""

import gzip
import itertools
import json
import math
import os
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.data.tokenizer import load_tokenizer
from common.decoding.generation import Sampling
from common.errors import UserError
from common.evaluation import humaneval
from common.evaluation.humaneval import STOPS, Problem, pass_at_k
from common.evaluation.sandbox import isolation_problem, run_program
from common.evaluation.text_model import TextModel, cut
from common.models.decoder import DecoderConfig
from tests.common.models.small_decoders import random_decoder

ADD = Problem(
  "Tiny/0",
  'def add(a, b):\n  """The sum."""\n',
  "  return a + b\n",
  "def check(candidate):\n  assert candidate(2, 3) == 5\n",
  "add",
)
LAST = Problem(
  "Tiny/1",
  'from typing import List\n\ndef last(x: List[int]) -> int:\n  """The last, or 0."""\n',
  "  if not x:\n    return 0\n  return x[-1]\n",
  "def check(candidate):\n  assert candidate([1, 2]) == 2\n  assert candidate([]) == 0\n",
  "last",
)


@pytest.fixture
def allowed():
  """How to run programs here."""
  options = {"allow_execution": True, "isolate": isolation_problem() is None}
  if not options["isolate"]:
    try:
      run_program("", isolate=False)
    except UserError as e:
      pytest.skip(str(e))
  return options


@given(st.data())
def test_pass_at_k_is_the_share_of_subsets(data):
  n = data.draw(st.integers(1, 9))
  c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
  subsets = list(itertools.combinations([i < c for i in range(n)], k))
  expected = sum(map(any, subsets)) / len(subsets)
  assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


@given(st.integers(1, 300), st.data())
def test_pass_at_k_of_many_samples(n, data):
  c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
  exact = 1 - math.comb(n - c, k) / math.comb(n, k)
  assert pass_at_k(n, c, k) == pytest.approx(exact, abs=1e-12)
  assert 0 <= pass_at_k(n, c, k) <= 1


def test_pass_at_k_known():
  assert [pass_at_k(5, 2, k) for k in (1, 2, 3, 4)] == pytest.approx([0.4, 0.7, 0.9, 1.0])
  assert pass_at_k(200, 0, 100) == 0 and pass_at_k(200, 200, 1) == 1
  assert pass_at_k(10_000, 9_000, 1) == pytest.approx(0.9)
  for n, c, k in [(2, 1, 3), (2, 3, 1), (2, -1, 1), (2, 1, 0), (0, 0, 1)]:
    with pytest.raises(UserError, match="expected 1 <= k <= n"):
      pass_at_k(n, c, k)


def test_program():
  text = humaneval.program(ADD, "  return a + b")
  assert text.startswith(ADD.prompt + "  return a + b\ndef check(")
  assert text.endswith("\ncheck(add)\n")
  goes_on = ADD.canonical_solution + "\ndef other():\n  pass\n"
  for stop in STOPS:
    assert cut(ADD.canonical_solution + stop + " more", STOPS) == ADD.canonical_solution
  assert cut(goes_on, STOPS) == ADD.canonical_solution


def test_scores(allowed):
  right, wrong = ADD.canonical_solution, "  return a - b\n"
  exits = "  import sys\n  sys.exit(0)\n"
  completions = [
    [right, wrong, exits, right],
    ["  return x[-1]\n", "", "  return x[\n", LAST.canonical_solution],
  ]
  result = humaneval.score([ADD, LAST], completions, ks=(1, 2, 4), workers=2, **allowed)
  reasons = [[outcome.reason for outcome in row] for row in result.outcomes]
  # Without a body, the docstring is one: None is not the last.
  assert reasons == [["", "wrong", "exited early", ""], ["error", "wrong", "error", ""]]
  assert result.pass_at == pytest.approx({1: 3 / 8, 2: (5 / 6 + 1 / 2) / 2, 4: 1.0})
  assert result.errors == pytest.approx({1: 1 / 8, 2: 1 / 6, 4: 0.0})
  assert result.completions == completions
  alone = humaneval.score([ADD], [[right]], **allowed)
  assert alone.pass_at == {1: 1.0} and math.isnan(alone.errors[1])


def test_canonical_solutions(allowed):
  folder = os.environ.get("FLAXWORKS_DATA")
  if not folder:
    pytest.skip("FLAXWORKS_DATA is not set")
  problems = humaneval.load_problems(pathlib.Path(folder) / "humaneval" / "HumanEval.jsonl.gz")
  assert len(problems) == 164 and len({p.task_id for p in problems}) == 164
  some = problems[::18]
  completions = [[cut(p.canonical_solution, STOPS), "    return None\n"] for p in some]
  result = humaneval.score(some, completions, ks=(1, 2), workers=2, **allowed)
  assert [[o.passed for o in row] for row in result.outcomes] == [[True, False]] * len(some)
  assert result.pass_at == {1: 0.5, 2: 1.0}


@pytest.fixture(scope="module")
def decoder():
  tokenizer = load_tokenizer("embedded-512")
  return random_decoder(DecoderConfig(512, 32, 64, 1, 4, 4, 8, 256)), tokenizer


def test_a_model_writes(decoder, allowed):
  options = dict(max_new_tokens=8, samples=3, ks=(1, 3), sampling=Sampling(0.8, top_p=0.95))
  result = humaneval.humaneval(*decoder, [ADD, LAST], **options, **allowed)
  assert result.pass_at == {1: 0.0, 3: 0.0} and result.errors == {1: 0.0, 3: 0.0}
  assert [len(texts) for texts in result.completions] == [3, 3]
  assert not any(stop in text for row in result.completions for text in row for stop in STOPS)


def test_a_model_that_knows(decoder, allowed, monkeypatch):
  asked = []

  def scripted(self, requests):
    asked.extend(requests)
    known = {p.prompt: p.canonical_solution for p in (ADD, LAST)}
    return [cut(known[text] + "\nprint(1)", wanted.until) for text, wanted in requests]

  monkeypatch.setattr(TextModel, "generate_until", scripted)
  options = dict(samples=2, ks=(1, 2), sampling=Sampling(0.2), max_new_tokens=77)
  result = humaneval.humaneval(*decoder, [ADD, LAST], **options, **allowed)
  assert result.pass_at == {1: 1.0, 2: 1.0} and result.errors == {1: 0.0, 2: 0.0}
  assert [text for text, _ in asked] == [ADD.prompt] * 2 + [LAST.prompt] * 2
  assert all(wanted == (STOPS, 77, Sampling(0.2)) for _, wanted in asked)


def test_nothing_happens_unasked(decoder, monkeypatch):
  never = lambda *args, **kwargs: pytest.fail("it ran")
  monkeypatch.setattr(TextModel, "generate_until", never)
  monkeypatch.setattr(humaneval, "run_program", never)
  with pytest.raises(UserError, match=r"runs 2 Python programs .*allow_execution=True"):
    humaneval.humaneval(*decoder, [ADD, LAST])
  with pytest.raises(UserError, match="allow_execution=True"):
    humaneval.score([ADD], [[""]])
  monkeypatch.setattr("common.evaluation.sandbox.isolation_problem", lambda: "no reason")
  allowed = {"allow_execution": True}
  with pytest.raises(UserError, match=r"\(no reason\).*isolate=False"):
    humaneval.humaneval(*decoder, [ADD], **allowed)
  for problems, options, words in [
    ([], {}, "at least one"),
    ([ADD], {"ks": (2,)}, r"ks=\(2,\) of 1 samples"),
    ([ADD], {"ks": ()}, "at least one k"),
    ([ADD], {"ks": (0, 1)}, "at least one k"),
    ([ADD], {"samples": 2}, "all the same"),
    ([ADD._replace(entry_point="a b")], {}, "Tiny/0: the entry point is 'a b'"),
  ]:
    with pytest.raises(UserError, match=words):
      humaneval.humaneval(*decoder, problems, isolate=False, **options, **allowed)
  for completions in [[], [[""], [""]], [[]]]:
    with pytest.raises(UserError, match="expected"):
      humaneval.score([ADD], completions, isolate=False, **allowed)
  with pytest.raises(UserError, match="all of the same length"):
    humaneval.score([ADD, LAST], [["a"], ["a", "b"]], isolate=False, **allowed)


def test_files(tmp_path):
  path = tmp_path / "problems.jsonl"
  good = json.dumps({**ADD._asdict(), "more": 1})
  path.write_text(good + "\n\n" + json.dumps(LAST._asdict()) + "\n")
  assert humaneval.load_problems(path) == [ADD, LAST]
  packed = tmp_path / "problems.jsonl.gz"
  packed.write_bytes(gzip.compress(path.read_bytes()))
  assert humaneval.load_problems(packed) == [ADD, LAST]
  for bad, words in [
    ({"entry_point": "f()"}, ":2: the entry point is 'f\\(\\)'"),
    ({"test": ""}, ":2: 'test'"),
  ]:
    path.write_text(good + "\n" + json.dumps({**ADD._asdict(), **bad}) + "\n")
    with pytest.raises(UserError, match=words):
      humaneval.load_problems(path)
