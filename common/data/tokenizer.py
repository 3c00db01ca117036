"""Tokenizers, and documents as token ids."""

import itertools
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

from common.data import corpora
from common.data.sources import load_documents
from common.errors import UserError
from common.paths import cache_dir

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
DEFAULT_VOCAB_SIZE = 4096

# What the bos and eos tokens are called in the tokenizers of the models that we read.
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "<|im_end|>", "[SEP]")
_BYTES_PER_DOMAIN = 1_500_000  # As much of each domain trains the tokenizer.
_BATCH = 256  # Documents encoded at once: bounds the memory that encodings take.


class EncodedDocuments(NamedTuple):
  """Token ids of documents, one after the other.

  Attributes:
    tokens: [num_tokens], int32.
    num_bytes: [num_tokens], int32. The bytes of UTF-8 text that each token adds to those before
      it; they add up to the size of the documents. 0 for bos and eos.
    offsets: [num_documents + 1], int64. Document i is tokens[offsets[i] : offsets[i + 1]].
  """

  tokens: np.ndarray
  num_bytes: np.ndarray
  offsets: np.ndarray


def load_tokenizer(name_or_path: str) -> tokenizers.Tokenizer:
  """Returns a tokenizer.

  Args:
    name_or_path: `embedded` or `embedded-SIZE`, a byte-level BPE of SIZE (default 4096) tokens,
      trained once on the train splits of the embedded corpora, with <pad> = 0, <s> = 1 and
      </s> = 2; or a tokenizer.json, or a Hugging Face folder with one.

  Raises:
    UserError: there is no such tokenizer, or its file cannot be read.
  """
  if match := re.fullmatch(r"embedded(?:-(\d+))?", name_or_path):
    path = _embedded(int(match[1] or DEFAULT_VOCAB_SIZE))
  else:
    path = pathlib.Path(name_or_path).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
      raise UserError(
        f"no tokenizer {name_or_path!r}: expected embedded, embedded-SIZE, a tokenizer.json or "
        "a folder with one"
      )
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
  except Exception as e:  # The library raises nothing more specific.
    raise UserError(f"cannot read the tokenizer {path}: {e}") from None
  # Files of Hugging Face models may ask for padding and truncation, which would lose text.
  tokenizer.no_padding()
  tokenizer.no_truncation()
  if match:
    tokenizer.encode_special_tokens = True  # A literal "</s>" is text like any other.
  return tokenizer


def bos_id(tokenizer: tokenizers.Tokenizer) -> int | None:
  """Returns the id of the token that begins a text, if there is one."""
  return _first_id(tokenizer, _BOS_NAMES)


def eos_id(tokenizer: tokenizers.Tokenizer) -> int | None:
  """Returns the id of the token that ends a text, if there is one."""
  return _first_id(tokenizer, _EOS_NAMES)


def _first_id(tokenizer: tokenizers.Tokenizer, names: Sequence[str]) -> int | None:
  ids = (tokenizer.token_to_id(name) for name in names)
  return next((i for i in ids if i is not None), None)


def encode_documents(
  tokenizer: tokenizers.Tokenizer,
  documents: Sequence[dict],
  *,
  add_bos: bool = False,
  add_eos: bool = False,
) -> EncodedDocuments:
  """Encodes documents, without the special tokens of the tokenizer's own template.

  Args:
    tokenizer: from `load_tokenizer`.
    documents: {"text": str, ...} each.
    add_bos: begin every document with the bos token, if the tokenizer has one.
    add_eos: end every document with the eos token, if the tokenizer has one.
  """
  prefix = [i for i in [bos_id(tokenizer)] if add_bos and i is not None]
  suffix = [i for i in [eos_id(tokenizer)] if add_eos and i is not None]
  tokens, num_bytes, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], [0]
  texts = (document["text"] for document in documents)
  while batch := list(itertools.islice(texts, _BATCH)):
    for text, encoding in zip(batch, tokenizer.encode_batch(batch, add_special_tokens=False)):
      tokens.append(np.array(prefix + encoding.ids + suffix, np.int32))
      sizes = _bytes_per_token(text, encoding)
      num_bytes.append(np.pad(sizes, (len(prefix), len(suffix))))
      lengths.append(len(tokens[-1]))
  return EncodedDocuments(np.concatenate(tokens), np.concatenate(num_bytes), np.cumsum(lengths))


def _bytes_per_token(text: str, encoding: tokenizers.Encoding) -> np.ndarray:
  """Returns the bytes of `text` that each token adds, [num_tokens], int32.

  Offsets of tokens count characters. Tokens that share a character (its bytes are apart in a
  byte-level vocabulary) all reach its end: the first counts it. What lies between two tokens
  (white space that the tokenizer drops) counts for the later one, the rest for the last.
  """
  if not encoding.ids:
    return np.zeros(0, np.int32)
  ends = np.maximum.accumulate(np.array(encoding.offsets)[:, 1])
  ends[-1] = len(text)
  codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
  sizes = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
  bytes_before = np.concatenate([[0], np.cumsum(sizes)])
  return np.diff(bytes_before[ends], prepend=0).astype(np.int32)


def _embedded(vocab_size: int) -> pathlib.Path:
  """Returns the file of the embedded tokenizer, training it on first use."""
  smallest = len(SPECIAL_TOKENS) + 256
  if vocab_size < smallest:
    raise UserError(f"embedded-{vocab_size}: bytes and special tokens alone are {smallest} tokens")
  path = cache_dir("tokenizers", corpora.fingerprint()) / f"embedded-{vocab_size}.json"
  if not path.exists():
    print(f"training the tokenizer embedded-{vocab_size} once: {path}", file=sys.stderr)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    _train(vocab_size).save(str(temporary))
    os.replace(temporary, path)
  return path


def _train(vocab_size: int) -> tokenizers.Tokenizer:
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIAL_TOKENS),
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(_training_texts(), trainer)
  return tokenizer


def _training_texts() -> Iterator[str]:
  for domain in corpora.DOMAINS:
    size = 0
    # The order of a TFDS split is a random one (and always the same): its head is a sample.
    for document in load_documents(f"embedded:{domain}", "train"):
      yield document["text"]
      size += len(document["text"].encode("utf-8"))
      if size >= _BYTES_PER_DOMAIN:
        break
