"""Text sources by name: every one is a random-access sequence of {"name": str, "text": str}.

  embedded:NAME              code, prose or science (common/data/corpora.py), always there
  data:wikitext2             Wikipedia articles, from FLAXWORKS_DATA
  tfds:NAME[/CONFIG][#KEY]   a set of the TFDS catalogue; KEY is its text feature (default: text)
  file:PATH                  .txt, .txt.gz, .jsonl, .jsonl.gz, or a folder of .txt and .txt.gz

Several sources separated by commas are one source that holds the documents of all of them.
"""

import gzip
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

import tensorflow_datasets as tfds

from common.data import corpora
from common.errors import UserError
from common.paths import data_dir

SPLITS = corpora.SPLITS

# An article begins with its title, ` = Robert Boulter = `, between two blank lines. A line in a
# formula may look like a title, but not between blank lines.
_ARTICLE = re.compile(r"(?:(?<=\n)|\A) *\n(?= = [^=\n]+ = *\n *\n)")


def load_documents(source: str, split: str) -> Sequence[dict[str, str]]:
  """Returns the documents of one split of a source (or of several, separated by commas).

  Args:
    source: `SCHEME:NAME`, see above.
    split: train, validation or test.

  Returns:
    A sequence, at least one long, of {"name": str, "text": str}; its order never changes.

  Raises:
    UserError: no such scheme, source or split; a file that cannot be read; no text in it.
  """
  if split not in SPLITS:
    raise UserError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
  # A comma inside a path does not begin a new source.
  documents = [_load(part, split) for part in re.split(r",(?=\s*[a-z]+:)", source)]
  return documents[0] if len(documents) == 1 else list(itertools.chain.from_iterable(documents))


def _load(source: str, split: str) -> Sequence[dict[str, str]]:
  scheme, _, name = source.strip().partition(":")
  if scheme == "embedded":
    documents = _load_embedded(name, split)
  elif scheme == "data":
    documents = _load_data(name, split)
  elif scheme == "tfds":
    documents = _load_tfds(name, split)
  elif scheme == "file":
    documents = _load_file(pathlib.Path(name).expanduser(), split)
  else:
    raise UserError(
      f"unknown source {source!r}; a source is embedded:NAME, data:NAME, tfds:NAME[/CONFIG][#KEY] "
      "or file:PATH"
    )
  if not len(documents):
    raise UserError(f"{source!r} has no text in its {split} split")
  return documents


class _DataSource(Sequence):
  """A TFDS data source with UTF-8 bytes, read as documents of str."""

  def __init__(self, data_source: Sequence[dict], name: Callable[[int, dict], str], text_key: str):
    self._data_source = data_source
    self._name = name
    self._text_key = text_key

  def __len__(self) -> int:
    return len(self._data_source)

  def __getitem__(self, index: int) -> dict[str, str]:
    if not -len(self) <= index < len(self):
      raise IndexError(index)
    record = self._data_source[index % len(self)]
    return {"name": self._name(index, record), "text": record[self._text_key].decode("utf-8")}


def _load_embedded(name: str, split: str) -> Sequence[dict[str, str]]:
  if name not in corpora.DOMAINS:
    raise UserError(f"unknown source 'embedded:{name}'; there are {', '.join(corpora.DOMAINS)}")
  data_source = corpora.load_corpus(name, split)
  return _DataSource(data_source, lambda index, record: record["name"].decode("utf-8"), "text")


def _load_tfds(name: str, split: str) -> Sequence[dict[str, str]]:
  name, _, key = name.partition("#")
  key = key or "text"
  try:
    builder = tfds.builder(name, file_format="array_record")
    builder.download_and_prepare()
    data_sources = builder.as_data_source()
  except tfds.core.DatasetNotFoundError:
    raise UserError(f"TFDS has no data set {name!r}; see tensorflow.org/datasets/catalog") from None
  except ImportError as e:
    raise UserError(
      f"tfds:{name} needs a package that is not installed: {_first_line(e)}; "
      "`pip install tensorflow` serves most of the catalogue"
    ) from None
  except Exception as e:  # Whatever its download and preparation code may raise.
    raise UserError(f"tfds:{name} cannot be prepared: {_first_line(e)}") from None
  texts = [k for k, v in builder.info.features.items() if isinstance(v, tfds.features.Text)]
  if key not in texts:
    raise UserError(
      f"tfds:{name} has no text feature {key!r}; append #KEY, KEY one of: {', '.join(texts)}"
    )
  if split not in data_sources:
    raise UserError(f"tfds:{name} has no split {split!r}; it has {', '.join(sorted(data_sources))}")
  return _DataSource(data_sources[split], lambda index, record: f"{name}/{split}/{index}", key)


def _first_line(error: Exception) -> str:
  return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _load_data(name: str, split: str) -> Sequence[dict[str, str]]:
  if name != "wikitext2":
    raise UserError(f"unknown source 'data:{name}'; there is wikitext2")
  folder = data_dir(name)
  # The training file is not part of this data set: its test file stands in for it.
  test = _articles(_read_text(folder / "test.txt.gz"))
  valid = _in_hash_order(_articles(_read_text(folder / "valid.txt.gz")))
  held_out = len(valid) // 10
  return {
    "train": test + valid[2 * held_out :],
    "validation": valid[:held_out],
    "test": valid[held_out : 2 * held_out],
  }[split]


def _articles(text: str) -> list[dict[str, str]]:
  """Splits a WikiText file at its level-one headings; a name is a title."""
  texts = [part.strip("\n ") for part in _ARTICLE.split(text)]
  return [{"name": t.partition("\n")[0].strip(" ="), "text": t + "\n"} for t in texts if t]


def _load_file(path: pathlib.Path, split: str) -> list[dict[str, str]]:
  if path.is_dir():
    paths = sorted(p for p in path.rglob("*") if p.name.endswith((".txt", ".txt.gz")))
    documents = [
      {"name": str(p.relative_to(path)), "text": _read_text(p)} for p in paths if p.is_file()
    ]
  elif path.name.endswith((".jsonl", ".jsonl.gz")):
    documents = _read_jsonl(path)
  elif path.name.endswith((".txt", ".txt.gz")):
    text = _read_text(path)
    documents = _articles(text) if _ARTICLE.search(text) else _paragraphs(text)
  elif path.exists():
    raise UserError(f"cannot read {path}: it is not .txt, .txt.gz, .jsonl, .jsonl.gz or a folder")
  else:
    raise UserError(f"no such file: {path}")
  documents = [d for d in documents if d["text"].strip()]
  if not documents:
    raise UserError(f"{path} has no text")
  return _split(documents, split)


def _paragraphs(text: str) -> list[dict[str, str]]:
  parts = (part.strip("\n") for part in re.split(r"\n\s*\n", text))
  return [{"name": f"{i}", "text": part + "\n"} for i, part in enumerate(parts) if part.strip()]


def _read_text(path: pathlib.Path) -> str:
  try:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
  except FileNotFoundError:
    raise UserError(f"no such file: {path}") from None
  except (OSError, EOFError, UnicodeDecodeError) as e:
    raise UserError(f"cannot read {path} as UTF-8 text: {_first_line(e)}") from None


def _read_jsonl(path: pathlib.Path) -> list[dict[str, str]]:
  documents = []
  for number, line in enumerate(_read_text(path).split("\n"), 1):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except json.JSONDecodeError as e:
      raise UserError(f"{path}, line {number}: not JSON: {e.msg}") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
      raise UserError(f'{path}, line {number}: expected an object with a string "text"')
    documents.append({"name": str(record.get("name", number)), "text": record["text"]})
  return documents


def _split(documents: Sequence[dict[str, str]], split: str) -> list[dict[str, str]]:
  """Holds out a twentieth of the different texts for each of validation and test.

  By rank among the hashes of the texts, so that three different texts suffice for three splits.
  """
  ordered = _in_hash_order({d["text"]: d for d in documents}.values())
  held_out = max(1, round(len(ordered) / 20)) if len(ordered) >= 3 else 0
  return {
    "train": ordered[2 * held_out :],
    "validation": ordered[:held_out],
    "test": ordered[held_out : 2 * held_out],
  }[split]


def _in_hash_order(documents: Iterable[dict[str, str]]) -> list[dict[str, str]]:
  return sorted(documents, key=lambda d: hashlib.sha256(d["text"].encode("utf-8")).digest())
