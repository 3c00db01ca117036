import json

import pytest

from common.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
  """The smallest useful embedded tokenizer (prepares the corpora on a bare machine)."""
  return load_tokenizer("embedded-512")


@pytest.fixture
def write_jsonl(tmp_path):
  """Returns a function that writes texts to a .jsonl file and returns the source's name."""

  def write(texts):
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return f"file:{path}"

  return write
