import os

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers

from common.data.sources import load_documents
from common.data.tokenizer import bos_id, encode_documents, eos_id, load_tokenizer
from common.errors import UserError


def encode(tokenizer, *texts, **kwargs):
  return encode_documents(tokenizer, [{"text": text} for text in texts], **kwargs)


def test_vocabulary(tokenizer):
  assert tokenizer.get_vocab_size() == 512
  assert [tokenizer.id_to_token(i) for i in range(3)] == ["<pad>", "<s>", "</s>"]
  assert (bos_id(tokenizer), eos_id(tokenizer)) == (1, 2)


def test_the_default_compresses(tokenizer):
  default = load_tokenizer("embedded")
  assert default.get_vocab_size() == 4096
  documents = load_documents("embedded:code,embedded:prose,embedded:science", "validation")
  sizes = [len(encode_documents(t, documents).tokens) for t in (tokenizer, default)]
  num_bytes = sum(len(d["text"].encode()) for d in documents)
  assert num_bytes / sizes[1] > 3  # 3.3 bytes per token
  assert sizes[1] < 0.8 * sizes[0]


@hypothesis.given(st.text())
@hypothesis.example("</s> <s><pad> is text")
@hypothesis.example(" leading,\ttabs\r\n\n  trailing \x00")
@hypothesis.example("é ∑ 漢字 🤗 \u200d e\u0301")
@hypothesis.settings(deadline=None, derandomize=True)
def test_any_text_round_trips(tokenizer, text):
  ids = encode(tokenizer, text).tokens.tolist()
  assert tokenizer.decode(ids) == text
  assert not set(ids) & {0, 1, 2}


@hypothesis.given(st.lists(st.text(), max_size=5), st.booleans(), st.booleans())
@hypothesis.settings(deadline=None, derandomize=True)
def test_documents_keep_their_order_and_bytes(tokenizer, texts, add_bos, add_eos):
  tokens, num_bytes, offsets = encode(tokenizer, *texts, add_bos=add_bos, add_eos=add_eos)
  assert tokens.dtype == num_bytes.dtype == np.int32
  assert len(offsets) == len(texts) + 1 and offsets[0] == 0 and offsets[-1] == len(tokens)
  assert num_bytes.shape == tokens.shape and (num_bytes >= 0).all()
  for text, start, end in zip(texts, offsets[:-1], offsets[1:]):
    document = tokens[start:end].tolist()
    assert num_bytes[start:end].sum() == len(text.encode())
    assert not add_bos or document.pop(0) == 1
    assert not add_eos or document.pop() == 2
    assert tokenizer.decode(document) == text


def test_bytes_of_each_token(tokenizer):
  text = "def f(x):\n  return 'plain'\n"
  tokens, num_bytes, _ = encode(tokenizer, text)
  assert num_bytes.tolist() == [len(tokenizer.decode([t])) for t in tokens.tolist()]


def test_many_documents_are_encoded_in_order(tokenizer):
  texts = [f"document {i}" for i in range(600)]
  tokens, _, offsets = encode(tokenizer, *texts)
  assert [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(offsets, offsets[1:])] == texts


def test_a_tokenizer_of_hugging_face(tmp_path):
  words = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "hello": 3, "world": 4}
  saved = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
  saved.normalizer = tokenizers.normalizers.BertNormalizer()
  saved.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  saved.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
  saved.enable_truncation(4)
  saved.enable_padding(length=8)
  saved.save(str(tmp_path / "tokenizer.json"))
  for path in (tmp_path, tmp_path / "tokenizer.json"):
    tokenizer = load_tokenizer(str(path))
    # Neither the file's truncation nor its padding nor its template; dropped space is counted.
    text = " Héllo  world world world\n"
    tokens, num_bytes, _ = encode(tokenizer, text, add_bos=True, add_eos=True)
    assert tokens.tolist() == [1, 3, 4, 4, 4, 2]
    assert num_bytes.tolist() == [0, 7, 7, 6, 7, 0]
    assert num_bytes.sum() == len(text.encode())


def test_minilm():
  if not os.environ.get("FLAXWORKS_MODELS"):
    pytest.skip("FLAXWORKS_MODELS is not set")
  tokenizer = load_tokenizer(os.path.join(os.environ["FLAXWORKS_MODELS"], "all-minilm-l6-v2"))
  assert (bos_id(tokenizer), eos_id(tokenizer)) == (101, 102)
  assert encode(tokenizer, "hello world", add_bos=True).tokens.tolist() == [101, 7592, 2088]


@pytest.mark.parametrize(
  "name, message",
  [
    ("gpt2", "no tokenizer 'gpt2': expected embedded, embedded-SIZE, a tokenizer.json or a folder"),
    ("embedded-x", "no tokenizer 'embedded-x'"),
    ("/no/such/folder", "no tokenizer '/no/such/folder'"),
    ("embedded-100", "embedded-100: bytes and special tokens alone are 259 tokens"),
  ],
)
def test_unknown_tokenizers(name, message):
  with pytest.raises(UserError, match=message):
    load_tokenizer(name)


def test_broken_tokenizers(tmp_path):
  with pytest.raises(UserError, match="no tokenizer"):
    load_tokenizer(str(tmp_path))
  (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
  with pytest.raises(UserError, match="cannot read the tokenizer"):
    load_tokenizer(str(tmp_path))
