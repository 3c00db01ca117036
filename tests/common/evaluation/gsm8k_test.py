"""Answers, prompts and files of GSM8K."""

import decimal
import gzip
import json
import math

import pytest

from common.data.tokenizer import load_tokenizer
from common.errors import UserError
from common.evaluation import gsm8k
from common.evaluation.gsm8k import Problem
from common.models.decoder import DecoderConfig
from tests.common.models.small_decoders import random_decoder

SHOT = Problem("What is 3 times 14?", "It is 3 * 14 = <<3*14=42>>42.\n#### 42")


@pytest.mark.parametrize(
  "text, strict, flexible",
  [
    ("so <<1+1=2>>2.\n#### 2", 2, 2),
    ("#### 1,234.", 1234, 1234),
    ("#### $12.50", "12.5", "12.5"),
    ("#### -7", -7, -7),
    ("#### -$7", -7, -7),
    ("#### 42.00", 42, 42),
    ("the answer is $1,000,000.", None, 1000000),
    ("it falls to -3 degrees.", None, -3),
    ("20 of 12-5", None, 5),
    ("#### 5\n\nand then 6", 5, 6),
    ("#### many", None, None),
    ("", None, None),
  ],
)
def test_answers(text, strict, flexible):
  number = lambda x: None if x is None else decimal.Decimal(x)
  assert gsm8k.strict_answer(text) == number(strict)
  assert gsm8k.flexible_answer(text) == number(flexible)


def test_prompt():
  text = gsm8k.prompt([SHOT], "And 2 + 2?")
  assert text == (
    "Question: What is 3 times 14?\nAnswer: It is 3 * 14 = <<3*14=42>>42.\n#### 42\n\n"
    "Question: And 2 + 2?\nAnswer:"
  )
  assert "= 42.\n" in gsm8k.prompt([SHOT], "?", calculator_marks=False)


def test_scores():
  result = gsm8k.score([SHOT] * 4, ["#### 42", "it is 42.", "#### 41", "none"])
  assert (result.strict, result.flexible) == (0.25, 0.5)
  assert result.strict_error == pytest.approx(math.sqrt(0.25 * 0.75 / 4))
  assert result.flexible_error == pytest.approx(0.25)


def test_a_model_answers():
  tokenizer = load_tokenizer("embedded-512")
  model = random_decoder(DecoderConfig(512, 32, 64, 1, 4, 4, 8, 256))
  result = gsm8k.gsm8k_accuracy(model, tokenizer, [SHOT] * 3, [SHOT], max_new_tokens=8)
  assert len(result.completions) == 3 and 0 <= result.strict <= result.flexible <= 1
  with pytest.raises(UserError, match="at least one"):
    gsm8k.gsm8k_accuracy(model, tokenizer, [], [SHOT])


def test_files(tmp_path):
  path = tmp_path / "test.jsonl"
  good = json.dumps(SHOT._asdict())
  path.write_text(good + "\n\n" + good + "\n")
  assert gsm8k.load_problems(path) == [SHOT, SHOT]
  packed = tmp_path / "test.jsonl.gz"
  packed.write_bytes(gzip.compress(path.read_bytes()))
  assert gsm8k.load_problems(packed) == [SHOT, SHOT]
  packed.write_bytes(packed.read_bytes()[:-12])
  with pytest.raises(UserError, match="cannot read"):
    gsm8k.load_problems(packed)
  for bad, words in [
    ("{", ":3: not JSON"),
    ("[]", ":3: expected an object"),
    ('{"question": "a"}', ":3: 'answer'"),
    ('{"question": "a", "answer": "42"}', ":3: the answer ends in '42'"),
  ]:
    path.write_text(f"{good}\n\n{bad}\n")
    with pytest.raises(UserError, match=words):
      gsm8k.load_problems(path)
  path.write_text("\n")
  with pytest.raises(UserError, match="no items"):
    gsm8k.load_problems(path)
  with pytest.raises(UserError, match="cannot read"):
    gsm8k.load_problems(tmp_path / "absent.jsonl")
