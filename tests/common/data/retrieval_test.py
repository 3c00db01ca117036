import gzip

import numpy as np
import pytest

from common.data.retrieval import Collection, load_collection, sample_collection
from common.errors import UserError
from common.paths import data_dir

DOCUMENTS = """<DOC>
<DOCNO>7</DOCNO>
a text
 of two lines
</DOC>
<DOC>
<DOCNO>9</DOCNO>
another
</DOC>
"""
QUERIES = "<top>\n<num>1</num><title>\nWHICH ONE\n</title>\n</top>\n"


@pytest.fixture
def collection(tmp_path, monkeypatch):
  folder = tmp_path / "small"
  folder.mkdir()
  monkeypatch.setenv("FLAXWORKS_DATA", str(tmp_path))
  (folder / "doc-text.trec.gz").write_bytes(gzip.compress(DOCUMENTS.encode()))
  (folder / "query-text.trec").write_text(QUERIES)
  (folder / "qrels").write_text("1 0 9 1\n")
  return folder


def test_texts_and_judgements_are_read(collection):
  read = load_collection("small")
  assert read.documents == ["a text of two lines", "another"] and read.queries == ["WHICH ONE"]
  np.testing.assert_array_equal(read.relevance, [[0, 1]])


@pytest.mark.parametrize("line", ("1 0 9", "2 0 9 1", "1 0 9 yes"))
def test_a_judgement_that_is_none_is_an_error(collection, line):
  (collection / "qrels").write_text(line + "\n")
  with pytest.raises(UserError, match=f"qrels has '{line}'; expected a query"):
    load_collection("small")


def test_a_file_that_is_missing_is_named(collection):
  (collection / "query-text.trec").unlink()
  with pytest.raises(UserError, match="cannot read .*query-text.trec"):
    load_collection("small")


def test_a_sample_keeps_every_relevant_document():
  relevance = np.zeros((3, 8), int)
  relevance[0, 5] = relevance[1, 2] = relevance[2, 7] = 1
  whole = Collection([f"d{i}" for i in range(8)], ["a", "b", "c"], relevance)
  sample = sample_collection(whole, 2, 4)
  assert sample.documents == ["d0", "d1", "d2", "d5"] and sample.queries == ["a", "b"]
  np.testing.assert_array_equal(sample.relevance, [[0, 0, 0, 1], [0, 0, 1, 0]])
  assert sample_collection(whole, 3, 1).documents == ["d2", "d5", "d7"]


def test_the_npl_collection_is_whole():
  try:
    data_dir("vaswani_npl")
  except UserError as e:
    pytest.skip(str(e))
  npl = load_collection()
  assert (len(npl.documents), len(npl.queries), npl.relevance.sum()) == (11429, 93, 2083)
  assert npl.queries[0].startswith("MEASUREMENT OF DIELECTRIC CONSTANT OF LIQUIDS")
