import jax
import numpy as np
import pytest

from common.evaluation.multiple_choice import Question, choice_accuracy, continuation_questions
from tests.common.models.small_decoders import (
  ARCHITECTURES,
  logits,
  random_decoder,
  random_tokens,
)


@pytest.fixture(scope="module")
def model():
  return random_decoder(ARCHITECTURES["llama"])


def log_likelihood(model, context, choice):
  tokens = np.zeros((1, 16), np.int32)  # One shape: what follows the end is not seen.
  end = len(context) + len(choice)
  tokens[0, :end] = [*context, *choice]
  log_probs = np.asarray(jax.nn.log_softmax(logits(model, tokens)[0]))
  at = range(len(context) - 1, end - 1)
  return sum(log_probs[i, tokens[0, i + 1]] for i in at)


def test_against_scoring_one_by_one(model):
  rng = np.random.default_rng(0)
  questions = []
  for _ in range(9):
    context = rng.integers(0, 64, rng.integers(1, 9)).tolist()
    choices = [rng.integers(0, 64, rng.integers(1, 6)).tolist() for _ in range(3)]
    questions.append(Question(context, choices, int(rng.integers(3))))
  sums = [[log_likelihood(model, q.context, c) for c in q.choices] for q in questions]
  means = [[s / len(c) for s, c in zip(row, q.choices)] for row, q in zip(sums, questions)]
  expect = lambda rows: np.mean([np.argmax(r) == q.answer for r, q in zip(rows, questions)])
  # 27 rows in batches of 8: the last one is padded.
  result = choice_accuracy(model, questions, batch_size=8)
  assert result == (pytest.approx(expect(sums)), pytest.approx(expect(means)), 9)
  # The test can tell the two scores apart.
  assert [np.argmax(r) for r in sums] != [np.argmax(r) for r in means]


def test_characters_decide_the_normalized_accuracy(model):
  context, choices = [1, 2, 3], [[4, 5], [6, 7, 8]]
  sums = [log_likelihood(model, context, c) for c in choices]
  for num_chars in ([1, 1000], [1000, 1]):
    answer = int(np.argmax(np.array(sums) / num_chars))
    result = choice_accuracy(model, [Question(context, choices, answer, num_chars)], batch_size=2)
    assert result.accuracy_norm == 1 and answer == num_chars.index(1000)
  for num_chars in ([1], [1, 0]):
    with pytest.raises(ValueError, match="2 positive numbers"):
      choice_accuracy(model, [Question(context, choices, 0, num_chars)])


def test_continuation_questions():
  windows = random_tokens(ARCHITECTURES["llama"], 6, 12)
  questions = continuation_questions(windows, choice_length=4, num_choices=3, seed=0)
  assert len(questions) == 6 and len({q.answer for q in questions}) > 1
  for window, question in zip(windows.tolist(), questions):
    assert question.context == window[:8]
    assert question.choices[question.answer] == window[8:]
    assert len({tuple(c) for c in question.choices}) == 3


def test_empty_input_is_refused(model):
  for questions in ([], [Question([], [[1]], 0)], [Question([1], [[]], 0)]):
    with pytest.raises(ValueError):
      choice_accuracy(model, questions)
