"""Scores and texts against one row at a time."""

import jax
import numpy as np
import pytest
import tokenizers

from common.data.tokenizer import load_tokenizer
from common.decoding.generation import Sampling
from common.errors import UserError
from common.evaluation.text_model import Generation, TextModel, cut
from common.models.decoder import DecoderConfig
from tests.common.models.small_decoders import logits, random_decoder

LENGTH = 40
PAIRS = [("def f", "(x):"), ("a b ", "c"), ("", "import os"), ("x " * 60, "y"), ("return", " self")]


@pytest.fixture(scope="module")
def tokenizer():
  return load_tokenizer("embedded-512")


@pytest.fixture(scope="module")
def model():
  return random_decoder(DecoderConfig(512, 32, 64, 2, 4, 4, 8, LENGTH))


@pytest.fixture(scope="module")
def text_model(model, tokenizer):
  return TextModel(model, tokenizer, batch_size=4)


def one_by_one(model, context, continuation):
  row = [*context, *continuation][-LENGTH - 1 :]
  values = np.asarray(jax.nn.log_softmax(logits(model, np.array([row[:-1]]))[0]))
  at = range(len(row) - 1 - len(continuation), len(row) - 1)
  total = sum(values[i, row[i + 1]] for i in at)
  return total, all(values[i].argmax() == row[i + 1] for i in at)


def test_log_likelihoods_one_by_one(model, text_model):
  results = text_model.log_likelihoods(PAIRS)
  for pair, (total, greedy) in zip(PAIRS, results):
    expected, expected_greedy = one_by_one(model, *text_model.encode_pair(*pair))
    assert total == pytest.approx(expected, rel=1e-4) and greedy == expected_greedy


def test_the_boundary(text_model, tokenizer):
  before, after = text_model.encode_pair("a b ", "c")
  assert (tokenizer.decode(before), tokenizer.decode(after)) == ("a b", " c")
  assert text_model.encode_pair("", "c")[0] == [text_model.prefix_token]
  assert text_model.encode_pair("  ", "c")[0] == [text_model.prefix_token]
  for pair in (("a", ""), ("", "")):
    with pytest.raises(UserError, match="no token of its own"):
      text_model.encode_pair(*pair)
  with pytest.raises(UserError, match="the model takes 40"):
    text_model.log_likelihoods([("a", "b c" * 60)])


def test_greedy_text_is_greedy(model, text_model):
  prompt = text_model.encode("def f")
  row = list(prompt)
  for _ in range(3):
    row.append(int(np.argmax(logits(model, np.array([row]))[0, -1])))
  new = row[len(prompt) :]
  other = [*new[:-1], (new[-1] + 1) % 512]
  results = text_model.token_log_likelihoods([(prompt, new), (prompt, other)])
  assert [greedy for _, greedy in results] == [True, False]


def test_rolling_windows_score_every_token_once(model, text_model):
  for text in ("", "short", "a longer text, of many words and more tokens than fit " * 4):
    tokens = text_model.encode(text)
    expected = 0.0
    for start in range(0, len(tokens), LENGTH):
      end = min(start + LENGTH, len(tokens))
      whole = [text_model.prefix_token, *tokens][: end + 1]
      expected += one_by_one(model, whole[: start + 1], tokens[start:end])[0]
    assert text_model.rolling_log_likelihoods([text])[0] == pytest.approx(expected, rel=1e-4)


def test_generate_until(text_model):
  wanted = Generation((), 6, Sampling())
  texts = ["def f", "x " * 60, "", "return", "a"]
  free = text_model.generate_until([(text, wanted) for text in texts])
  assert free == [text_model.generate_until([(text, wanted)])[0] for text in texts]
  stop = free[0][1:3]
  (short,) = text_model.generate_until([("def f", wanted._replace(until=(stop,)))])
  assert short == free[0][: free[0].index(stop)]
  sampled = Generation((), 6, Sampling(temperature=1.0))
  # The key moves on: repeats are other texts.
  assert len({text_model.generate_until([("a", sampled)])[0] for _ in range(4)}) > 1
  with pytest.raises(UserError, match="no room"):
    text_model.generate_until([("a", wanted._replace(max_new_tokens=LENGTH))])


def test_new_text_keeps_its_first_spaces(model, monkeypatch):
  vocab = {"<s>": 0, "a": 1, "\u2581b": 2, "\u2581": 3, "\u2581\u2581\u2581": 4}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<s>"))
  tokenizer.add_special_tokens(["<s>"])
  # As of Llama's tokenizer: a text loses the space that stands for its beginning.
  tokenizer.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.Replace("\u2581", " "),
      tokenizers.decoders.Fuse(),
      tokenizers.decoders.Strip(" ", 1, 0),
    ]
  )
  new = [4, 2, 1]
  assert tokenizer.decode(new) == "   ba"  # Of four.
  monkeypatch.setattr("common.evaluation.text_model.generate", lambda *args, **kwargs: [new])
  text_model = TextModel(model, tokenizer, prefix_token=0)
  wanted = Generation((), 3, Sampling())
  assert text_model.generate_until([("a", wanted)]) == ["    ba"]


def test_cut():
  assert cut("a\nb#c", ["#", "\n", ""]) == "a" and cut("abc", []) == "abc"


def test_bad_options(model, tokenizer):
  with pytest.raises(UserError, match="batch_size"):
    TextModel(model, tokenizer, batch_size=0)
  with pytest.raises(UserError, match="max_length"):
    TextModel(model, tokenizer, max_length=0)
