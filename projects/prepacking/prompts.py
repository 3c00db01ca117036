"""Prompts: docstrings of the standard library or documents of a source, and windows of a text."""

import ast
import pathlib
import sysconfig

import numpy as np
import tokenizers

from common.data.pipelines import token_windows
from common.data.sources import load_documents
from common.data.tokenizer import bos_id
from common.errors import UserError


def load_texts(source: str, split: str) -> list[str]:
  """Texts of more than one word, each once, always in the same order.

  Args:
    source: "docstrings" of the modules of the standard library, or what `load_documents` takes.
    split: of the latter.
  """
  if source == "docstrings":
    texts = _docstrings()
  else:
    texts = [document["text"] for document in load_documents(source, split)]
  return [text for text in dict.fromkeys(texts) if len(text.split()) > 1]


def encode(texts: list[str], tokenizer: tokenizers.Tokenizer, clip: int) -> list[list[int]]:
  """Token ids behind the bos token, if there is one, cut to `clip` tokens."""
  bos = bos_id(tokenizer)
  prefix = [] if bos is None else [bos]
  encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
  return [[*prefix, *encoding.ids][:clip] for encoding in encodings]


def draw(prompts: list[list[int]], count: int, seed: int) -> list[list[int]]:
  """`count` different prompts in random order.

  Raises:
    UserError: there are fewer.
  """
  if len(prompts) < count:
    raise UserError(f"the source has {len(prompts)} prompts, expected {count}: ask for fewer")
  chosen = np.random.default_rng(seed).choice(len(prompts), count, replace=False)
  return [prompts[i] for i in chosen]


def equal_prompts(
  source: str, tokenizer: tokenizers.Tokenizer, split: str, length: int
) -> list[list[int]]:
  """Windows of `length` tokens each."""
  return token_windows(source, tokenizer, split=split, seq_len=length).tokens.tolist()


def _docstrings() -> list[str]:
  """The docstrings in the modules of the standard library that are in no package."""
  kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  paths = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))
  trees = [ast.parse(path.read_bytes()) for path in paths]
  nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]
  return [text for node in nodes if (text := ast.get_docstring(node))]
