import gzip
import json
import os

import numpy as np
import pytest
import tensorflow_datasets as tfds

from common.data import sources
from common.data.sources import SPLITS, load_documents
from common.errors import UserError

WORDS = "attention gradient kernel matrix model norm prune quantize scale tensor".split()


def texts(n, seed=0):
  rng = np.random.default_rng(seed)
  return [f"{i} " + " ".join(rng.choice(WORDS, 10)) for i in range(n)]


def all_splits(source):
  return {split: [d["text"] for d in load_documents(source, split)] for split in SPLITS}


def test_embedded_is_random_access():
  documents = load_documents("embedded:code", "validation")
  assert len(documents) > 10
  assert documents[0] == documents[-len(documents)] == next(iter(documents))
  assert set(documents[0]) == {"name", "text"}
  assert isinstance(documents[-1]["text"], str)
  with pytest.raises(IndexError):
    documents[len(documents)]


def test_a_mix_has_the_documents_of_all(write_jsonl):
  one, two = "embedded:code", "embedded:prose"
  mixed = load_documents(f"{one},{two}, {write_jsonl(texts(40))}", "test")
  assert len(mixed) == len(load_documents(one, "test")) + len(load_documents(two, "test")) + 2
  assert len({d["text"] for d in mixed}) == len(mixed)


def test_a_comma_in_a_path_is_no_mix(tmp_path):
  path = tmp_path / "a,b.txt"
  path.write_text("one\n\ntwo\n\nthree\n")
  assert all_splits(f"file:{path}")["train"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_jsonl(tmp_path, suffix):
  path = tmp_path / f"corpus{suffix}"
  corpus = texts(60) + ["é∑ \u2028 line separator"]
  data = "\n".join(json.dumps({"text": t, "name": t[:3]}, ensure_ascii=False) for t in corpus)
  data = (data + "\n\n").encode()
  path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
  splits = all_splits(f"file:{path}")
  assert sorted(sum(splits.values(), [])) == sorted(corpus)
  assert [len(splits[s]) for s in SPLITS] == [55, 3, 3]


def test_the_split_of_a_text_depends_on_the_texts_only(write_jsonl):
  corpus = texts(60)
  before = all_splits(write_jsonl(corpus))
  after = all_splits(write_jsonl(corpus[::-1] + corpus[:20]))  # Twenty occur twice.
  assert after == before


def test_txt_is_split_at_blank_lines_or_articles(tmp_path):
  path = tmp_path / "plain.txt"
  path.write_text("\n\n".join(["one\nline two", "two", " \n three", ""]))
  assert sorted(sum(all_splits(f"file:{path}").values(), [])) == [
    " three\n",
    "one\nline two\n",
    "two\n",
  ]
  path = tmp_path / "wiki.txt.gz"
  articles = [
    f" = Title {i} = \n \n Text {i} \n where \n = k = \n \n = = Part = = \n \n More \n"
    for i in range(4)
  ]
  path.write_bytes(gzip.compress((" \n" + " \n".join(articles)).encode()))
  assert sum(len(t) for t in all_splits(f"file:{path}").values()) == 4
  names = {d["name"] for s in SPLITS for d in load_documents(f"file:{path}", s)}
  assert names == {f"Title {i}" for i in range(4)}


def test_a_folder_has_a_document_per_file(tmp_path):
  for i, text in enumerate(texts(30)):
    folder = tmp_path / f"{i % 3}"
    folder.mkdir(exist_ok=True)
    (folder / f"{i}.txt").write_text(text + "\n\nsecond paragraph")
  (tmp_path / "notes.md").write_text("not text of the corpus")
  documents = [d for s in SPLITS for d in load_documents(f"file:{tmp_path}", s)]
  assert sorted(d["name"] for d in documents) == sorted(f"{i % 3}/{i}.txt" for i in range(30))


def test_wikitext2():
  if not os.environ.get("FLAXWORKS_DATA"):
    pytest.skip("FLAXWORKS_DATA is not set")
  splits = {s: load_documents("data:wikitext2", s) for s in SPLITS}
  assert {s: len(d) for s, d in splits.items()} == {"train": 108, "validation": 6, "test": 6}
  documents = [d for s in SPLITS for d in splits[s]]
  assert len({d["text"] for d in documents}) == 120  # As many as WikiText-2 says; 2 look like more.
  assert sum(len(d["text"].encode()) for d in documents) > 2_370_000  # All but blank lines.
  assert "Du Fu" in [d["name"] for d in splits["train"]]


@pytest.mark.parametrize(
  "source, split, message",
  [
    ("embedded:code", "dev", "unknown split 'dev'; there are train, validation, test"),
    ("embedded:poems", "train", "'embedded:poems'; there are code, prose, science"),
    ("http://x", "train", "unknown source 'http://x'; a source is embedded:NAME, data:NAME"),
    ("code", "train", "unknown source 'code'"),
    ("", "train", "unknown source ''"),
    ("data:wikitext103", "train", "'data:wikitext103'; there is wikitext2"),
    ("file:/no/such/file.txt", "train", "no such file: /no/such/file.txt"),
    ("file:/no/such/file", "train", "no such file: /no/such/file"),
    ("tfds:no_such_set", "train", "TFDS has no data set 'no_such_set'"),
  ],
)
def test_unknown_names(source, split, message):
  with pytest.raises(UserError, match=message):
    load_documents(source, split)


def test_wikitext2_that_is_not_there(monkeypatch, tmp_path):
  monkeypatch.setenv("FLAXWORKS_DATA", str(tmp_path))
  with pytest.raises(UserError, match="python -m common.data.download wikitext2"):
    load_documents("data:wikitext2", "train")


@pytest.mark.parametrize(
  "name, data, message",
  [
    ("a.txt", b"", "a.txt has no text"),
    ("a.txt", b" \n\n\t\n", "a.txt has no text"),
    ("a.jsonl", b"", "a.jsonl has no text"),
    ("a.jsonl", b'{"text": " "}', "a.jsonl has no text"),
    ("a.txt", b"\xff\xfe", "cannot read .*a.txt as UTF-8 text"),
    ("a.txt.gz", b"not gzip", "cannot read .*a.txt.gz as UTF-8 text"),
    ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "cannot read .*a.txt.gz as UTF-8 text"),
    ("a.jsonl", b'{"text": "x"}\n\n{"text": ', "a.jsonl, line 3: not JSON"),
    ("a.jsonl", b'{"text": "x"}\n{"body": "x"}', 'line 2: expected an object with a string "text"'),
    ("a.jsonl", b'["x"]', "line 1: expected an object"),
    ("a.jsonl", b'{"text": 3}', "line 1: expected an object"),
    ("a.csv", b"x", "cannot read .*a.csv: it is not"),
  ],
)
def test_bad_files(tmp_path, name, data, message):
  path = tmp_path / name
  path.write_bytes(data)
  with pytest.raises(UserError, match=message):
    load_documents(f"file:{path}", "train")


def test_an_empty_folder_and_a_split_without_documents(tmp_path):
  with pytest.raises(UserError, match="has no text"):
    load_documents(f"file:{tmp_path}", "train")
  (tmp_path / "a.txt").write_text("only one")
  assert len(load_documents(f"file:{tmp_path}", "train")) == 1
  with pytest.raises(UserError, match="has no text in its test split"):
    load_documents(f"file:{tmp_path}", "test")


class TinyReviews(tfds.core.GeneratorBasedBuilder):
  """Stands for a catalogue set that needs no TensorFlow."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {"sentence": tfds.features.Text(), "label": np.int64}
    return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(5)}

  def _generate_examples(self, n):
    for i in range(n):
      yield i, {"sentence": f"réview {i}", "label": i}


class TinyImages(TinyReviews):
  """Stands for one that does."""

  def _split_generators(self, dl_manager):
    raise ModuleNotFoundError("No module named 'tensorflow'")


class TinyOffline(TinyReviews):
  """Stands for one whose site is out of reach."""

  def _split_generators(self, dl_manager):
    raise ConnectionError("Name or service not known\nat length")


@pytest.fixture
def tfds_dir(monkeypatch, tmp_path):
  monkeypatch.setattr(sources.tfds.core.utils.file_utils.constants, "DATA_DIR", str(tmp_path))
  return tmp_path


def test_tfds(tfds_dir):
  documents = load_documents("tfds:tiny_reviews#sentence", "train")
  assert sorted(d["text"] for d in documents) == [f"réview {i}" for i in range(5)]
  assert len({d["name"] for d in documents}) == 5
  assert (tfds_dir / "tiny_reviews").is_dir()


@pytest.mark.parametrize(
  "source, split, message",
  [
    ("tfds:tiny_reviews", "train", "no text feature 'text'; append #KEY, KEY one of: sentence"),
    ("tfds:tiny_reviews#label", "train", "no text feature 'label'"),
    ("tfds:tiny_reviews#sentence", "test", "has no split 'test'; it has train"),
    (
      "tfds:tiny_images#sentence",
      "train",
      "No module named 'tensorflow'; `pip install tensorflow`",
    ),
    ("tfds:tiny_offline#sentence", "train", "cannot be prepared: Name or service not known$"),
  ],
)
def test_tfds_errors(tfds_dir, source, split, message):
  with pytest.raises(UserError, match=message):
    load_documents(source, split)
