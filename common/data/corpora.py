"""Three text corpora that are on every machine: the text of the running Python environment.

  code      source files of the standard library, docstrings removed
  prose     docstrings of the standard library, and the topics of `help()`
  science   docstrings of numpy, scipy, scikit-learn and jax

Nothing is downloaded or imported: the sources are parsed. A document is a module (or a topic).
Its split follows from a hash of its name, so that the code and the prose of one module are on the
same side; within a domain a text (or a docstring) that occurs twice is kept once.
"""

import ast
import contextlib
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import os
import pathlib
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence

import filelock
import tensorflow_datasets as tfds

from common.paths import cache_dir

DOMAINS = ("code", "prose", "science")
SPLITS = ("train", "validation", "test")

_SCIENCE_PACKAGES = ("numpy", "scipy", "sklearn", "jax")
_DISTRIBUTIONS = ("numpy", "scipy", "scikit-learn", "jax")
# Not text that a person wrote about a library: tests, bundled wheels, grammar tables, demos.
_SKIPPED_FOLDERS = re.compile(
  r"tests?|testing|test_.*|.*_tests?|.*_test_.*|site-packages|dist-packages|__pycache__|lib2to3"
  r"|idlelib|turtledemo|ensurepip|pydoc_data|config-.*|externals?"
)
_HEX_LINE = re.compile(r".*(\\x|0x|\\u)[0-9a-fA-F]{2}")
# Keeps the domain near 8 MB; without it three modules of scipy and jax would be 5 % of it.
_MAX_SCIENCE_CHARS = 20_000
_DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class EmbeddedText(tfds.core.GeneratorBasedBuilder):
  """Code, prose and science text of the running Python environment."""

  # Raise it whenever the extraction below changes what comes out.
  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=domain) for domain in DOMAINS]

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(
        {"name": tfds.features.Text(), "text": tfds.features.Text()}
      ),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing is downloaded.
    documents = list(extract(self.builder_config.name))
    return {split: self._generate_examples(documents, split) for split in SPLITS}

  def _generate_examples(self, documents, split):
    for name, text in documents:
      if split_of(name) == split:
        yield name, {"name": name, "text": text}


def fingerprint() -> str:
  """Returns what the corpora depend on: the extraction's version and the environment's versions."""
  versions = [f"{name}{importlib.metadata.version(name)}" for name in _DISTRIBUTIONS]
  python = ".".join(map(str, sys.version_info[:3]))
  return "-".join([str(EmbeddedText.VERSION), f"py{python}", *versions])


def load_corpus(domain: str, split: str) -> Sequence[dict]:
  """Returns a split of a domain as a random-access data source, preparing the domain on first use.

  Args:
    domain: one of DOMAINS.
    split: one of SPLITS.

  Returns:
    A sequence of {"name": bytes, "text": bytes}, UTF-8.
  """
  data_dir = cache_dir("tfds", fingerprint())
  builder = EmbeddedText(config=domain, data_dir=data_dir, file_format="array_record")
  if not builder.data_path.exists():
    # TFDS writes to a temporary folder and renames it; the lock keeps a second process from
    # doing the same work only to find its target taken.
    with filelock.FileLock(data_dir / f"{domain}.lock"):
      builder = EmbeddedText(config=domain, data_dir=data_dir, file_format="array_record")
      print(f"preparing the text corpus {domain!r} once: {builder.data_path}", file=sys.stderr)
      tfds.disable_progress_bar()
      with _without_gc(), contextlib.redirect_stdout(None):  # TFDS prints that it downloads.
        builder.download_and_prepare()
  return builder.as_data_source(split)


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
  """Halves the time: syntax trees are many objects, but have no cycles to collect."""
  enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if enabled:
      gc.enable()


def split_of(name: str) -> str:
  """Returns the split of the document `name`: about 90 % train, 5 % validation, 5 % test."""
  percentile = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
  return "train" if percentile < 90 else "validation" if percentile < 95 else "test"


def extract(domain: str) -> Iterator[tuple[str, str]]:
  """Yields (name, text) for every document of a domain, always in the same order.

  Args:
    domain: one of DOMAINS.
  """
  if domain == "code":
    documents = ((name, _code(source, tree)) for name, source, tree in _modules(_stdlib()))
  elif domain == "prose":
    modules = ((name, _docstrings(tree)) for name, _, tree in _modules(_stdlib()))
    documents = _join_docstrings(itertools.chain(modules, _topics()))
  else:
    modules = ((name, _docstrings(tree)) for name, _, tree in _modules(_science_files()))
    documents = _join_docstrings(modules, max_chars=_MAX_SCIENCE_CHARS)
  seen = set()
  for name, text in documents:
    if _is_new(text, seen):
      yield name, text


def _is_new(text: str, seen: set[bytes]) -> bool:
  """Whether `text` has words, and other ones than every text before it (added to `seen`)."""
  words = " ".join(text.split())
  digest = hashlib.sha256(words.encode("utf-8")).digest()
  if not words or digest in seen:
    return False
  seen.add(digest)
  return True


def _join_docstrings(
  modules: Iterable[tuple[str, list[str]]], max_chars: int | None = None
) -> Iterator[tuple[str, str]]:
  """Yields (name, text): the docstrings of each module that no module before it has.

  Args:
    modules: (name, docstrings) of each.
    max_chars: where a document ends, at the end of a docstring if possible.
  """
  seen = set()
  for name, docstrings in modules:
    kept, size = [], 0
    for doc in docstrings:
      if _is_new(doc, seen) and (max_chars is None or not kept or size + len(doc) <= max_chars):
        kept.append(doc)
        size += len(doc)
    yield name, "\n\n".join(kept)[:max_chars] + "\n"


# Where the sources are.


def _stdlib() -> Sequence[tuple[str, pathlib.Path]]:
  root = pathlib.Path(sysconfig.get_paths()["stdlib"])
  files = _python_files(root, prefix=())
  # Build settings of this one machine, not library code.
  return [(name, path) for name, path in files if not name.startswith("_sysconfigdata")]


def _science_files() -> Sequence[tuple[str, pathlib.Path]]:
  files = []
  for package in _SCIENCE_PACKAGES:
    (root,) = importlib.util.find_spec(package).submodule_search_locations
    files += _python_files(pathlib.Path(root), prefix=(package,))
  return files


def _python_files(root: pathlib.Path, prefix: tuple[str, ...]) -> list[tuple[str, pathlib.Path]]:
  """Returns (module name, file) for the .py files below `root`, in order of name."""
  files = []
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = [name for name in subfolders if not _SKIPPED_FOLDERS.fullmatch(name)]
    package = (*prefix, *pathlib.Path(folder).relative_to(root).parts)
    for name in names:
      if name.endswith(".py"):
        parts = package if name == "__init__.py" else (*package, name[:-3])
        files.append((".".join(parts), pathlib.Path(folder, name)))
  return sorted(files)


def _modules(
  files: Sequence[tuple[str, pathlib.Path]],
) -> Iterator[tuple[str, bytes, ast.Module]]:
  """Yields (name, UTF-8 source, syntax tree) of the files that are UTF-8 Python, tables left out."""
  for name, path in files:
    source = path.read_bytes().replace(b"\r\n", b"\n")
    try:
      lines = source.decode("utf-8").splitlines()
      if sum(_HEX_LINE.match(line) is not None for line in lines) > len(lines) / 2:
        continue  # A character map or the like: numbers, not code.
      yield name, source, ast.parse(source)
    except (UnicodeDecodeError, SyntaxError):
      continue


def _topics() -> Sequence[tuple[str, list[str]]]:
  """Returns (name, [text]) of every topic of `help()`."""
  path = pathlib.Path(sysconfig.get_paths()["stdlib"], "pydoc_data", "topics.py")
  if not path.exists():  # Some distributions ship it apart.
    return []
  for node in ast.parse(path.read_bytes()).body:
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
      topics = ast.literal_eval(node.value)
  return [
    (f"pydoc_data.topics.{name}", [inspect.cleandoc(text)]) for name, text in sorted(topics.items())
  ]


# What is in them.


def _statements(node: ast.AST) -> Iterator[ast.AST]:
  """Yields `node` and the statements below it; much faster than `ast.walk`, which visits names."""
  yield node
  for child in ast.iter_child_nodes(node):
    if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
      yield from _statements(child)


def _docstring_statement(node: ast.AST) -> ast.Expr | None:
  if isinstance(node, _DEFINITIONS) and node.body and isinstance(node.body[0], ast.Expr):
    value = node.body[0].value
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
      return node.body[0]
  return None


def _docstrings(tree: ast.Module) -> list[str]:
  """Returns the docstrings of a module, dedented, in the order of its lines.

  Besides those of its definitions, the strings given to numpy's `add_newdoc` (which documents
  functions that are written in C).
  """
  found = []
  for node in _statements(tree):
    if statement := _docstring_statement(node):
      found.append((statement.lineno, statement.value.value))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
      if "add_newdoc" in ast.unparse(node.value.func):
        # add_newdoc(place, name, doc), or (attribute, doc), or [(attribute, doc), ...] for doc.
        strings = [child for child in ast.walk(node) if isinstance(child, ast.Constant)]
        texts = [s for s in strings if isinstance(s.value, str) and "\n" in s.value]
        found += [(s.lineno, s.value) for s in texts]
  return [inspect.cleandoc(text) for _, text in sorted(found)]


def _code(source: bytes, tree: ast.Module) -> str:
  """Returns `source` without its docstrings; a body that was nothing else becomes `pass`."""
  lines = source.split(b"\n")
  starts = [0]
  for line in lines:
    starts.append(starts[-1] + len(line) + 1)
  cuts = []
  for node in _statements(tree):
    if statement := _docstring_statement(node):
      # Columns of the syntax tree count UTF-8 bytes.
      start = starts[statement.lineno - 1] + statement.col_offset
      end = starts[statement.end_lineno - 1] + statement.end_col_offset
      alone = not lines[statement.lineno - 1][: statement.col_offset].strip()
      if len(node.body) == 1 and not isinstance(node, ast.Module):
        cuts.append((start, end, b"pass"))
      elif alone and not lines[statement.end_lineno - 1][statement.end_col_offset :].strip():
        cuts.append((starts[statement.lineno - 1], starts[statement.end_lineno], b""))
      else:
        cuts.append((start, end, b"pass"))  # `"doc"; statement`, or a comment behind it.
  pieces, position = [], 0
  for start, end, replacement in sorted(cuts):
    pieces += [source[position:start], replacement]
    position = end
  pieces.append(source[position:])
  return b"".join(pieces).decode("utf-8").strip("\n") + "\n"
