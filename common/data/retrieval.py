"""Test collections of ad-hoc retrieval: documents, queries, and which answer which."""

import gzip
import pathlib
import re
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from common.paths import data_dir

_DOCUMENT = re.compile(r"<DOC>\s*<DOCNO>\s*(\S+?)\s*</DOCNO>(.*?)</DOC>", re.DOTALL)
_QUERY = re.compile(r"<top>\s*<num>\s*(\S+?)\s*</num>\s*<title>(.*?)</title>", re.DOTALL)


class Collection(NamedTuple):
  """A test collection.

  Attributes:
    documents: texts.
    queries: texts.
    relevance: judged relevance of each document to each query, int [queries, documents]; 0 where
      nothing was judged.
  """

  documents: list[str]
  queries: list[str]
  relevance: np.ndarray


def load_collection(name: str = "vaswani_npl") -> Collection:
  """Reads a collection of FLAXWORKS_DATA in TREC files: doc-text.trec.gz, query-text.trec, qrels.

  Raises:
    UserError: it is not there, or is not such a collection.
  """
  folder = data_dir(name)
  documents = dict(_DOCUMENT.findall(_read(folder / "doc-text.trec.gz")))
  queries = dict(_QUERY.findall(_read(folder / "query-text.trec")))
  rows, columns = ({key: i for i, key in enumerate(found)} for found in (queries, documents))
  relevance = np.zeros((len(rows), len(columns)), np.int32)
  for line in _read(folder / "qrels").splitlines():
    try:
      query, _, document, grade = line.split()
      relevance[rows[query], columns[document]] = int(grade)
    except (ValueError, KeyError):
      raise UserError(
        f"{folder / 'qrels'} has {line!r}; expected a query, 0, a document and its relevance"
      ) from None
  clean = lambda texts: [" ".join(text.split()) for text in texts.values()]
  return Collection(clean(documents), clean(queries), relevance)


def sample_collection(collection: Collection, num_queries: int, num_documents: int) -> Collection:
  """The first queries, all documents that answer them, and the first others up to a number.

  Args:
    collection: the whole.
    num_queries: how many queries to keep.
    num_documents: how many documents to keep, or more where more are relevant.
  """
  relevance = collection.relevance[:num_queries]
  relevant = relevance.any(axis=0)
  others = np.flatnonzero(~relevant)[: max(0, num_documents - relevant.sum())]
  kept = np.sort(np.concatenate([np.flatnonzero(relevant), others]))
  documents = [collection.documents[i] for i in kept]
  return Collection(documents, collection.queries[:num_queries], relevance[:, kept])


def _read(path: pathlib.Path) -> str:
  try:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
  except (OSError, EOFError, UnicodeDecodeError) as e:
    raise UserError(f"cannot read {path}: {e}") from None
