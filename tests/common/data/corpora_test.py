import ast
import collections

import pytest

from common.data import corpora


def documents(domain):
  return {
    split: {
      record["name"].decode(): record["text"].decode()
      for record in map(dict, corpora.load_corpus(domain, split))
    }
    for split in corpora.SPLITS
  }


@pytest.fixture(scope="module")
def corpus():
  return {domain: documents(domain) for domain in corpora.DOMAINS}


def without_docstrings(tree):
  for node in ast.walk(tree):
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Module)):
      if node.body and isinstance(node.body[0], ast.Expr):
        if isinstance(getattr(node.body[0].value, "value", None), str):
          node.body = node.body[1:] or [ast.Pass()]
  return tree


@pytest.mark.parametrize(
  "source",
  [
    '"""Module."""\nx = 1\n',
    'def f():\n  """Doc."""\n',
    'def f():\n  """Doc.\n\n  More: é ∑.\n  """\n  return "kept"\n',
    'class A:\n  "doc"\n  x = "é"; y = 2\n  async def g(self): "one line"\n',
    'if x:\n  def f():\n    r"""Raw \\d."""  # why\n    try:\n      pass\n    except E:\n'
    '      def h():\n        "inner"\n        return 1\n',
    'x = "é"; \ndef f(a="∑"): "doc"\n',
    "def f():\n  'a' 'b'\n  return 'c'\n",
    'def f():\n  """Doc."""  # why\n  return 1\n',
  ],
)
def test_code_is_the_source_without_its_docstrings(source):
  code = corpora._code(source.encode(), ast.parse(source))
  trees = ast.parse(code), without_docstrings(ast.parse(source))
  # A comment behind a docstring, or a module of nothing else, leaves a `pass`.
  dumps = [ast.dump(tree).replace("Pass(), ", "") for tree in trees]
  assert dumps[0] == dumps[1]
  assert [line for line in code.split("\n") if "kept" in line or "# why" in line] == [
    line.replace('r"""Raw \\d."""', "pass").replace('"""Doc."""', "pass")
    for line in source.split("\n")
    if "kept" in line or "# why" in line
  ]


def test_docstrings_of_definitions_and_of_add_newdoc():
  source = '''
"""Module."""
def f():
  """
    First.

      Indented.
  """
  def g():
    "Inner."
add_newdoc("numpy", "array", """
    array(x)

    Makes.
    """)
numpy.lib.add_newdoc('numpy', 'nd', [('T', "Transposed\\n  view."), ("shape", """Its\\nshape.""")])
print("not a\\ndocstring")
'''
  assert corpora._docstrings(ast.parse(source)) == [
    "Module.",
    "First.\n\n  Indented.",
    "Inner.",
    "array(x)\n\nMakes.",
    "Its\nshape.",
    "Transposed\nview.",
  ]


def test_docstrings_are_joined_once_each_up_to_the_limit():
  modules = [("a", ["One.", "Two  words."]), ("b", ["Two\nwords.", "x" * 30]), ("c", [" "])]
  assert list(corpora._join_docstrings(modules)) == [
    ("a", "One.\n\nTwo  words.\n"),
    ("b", "x" * 30 + "\n"),
    ("c", "\n"),
  ]
  limited = dict(corpora._join_docstrings([*modules, ("d", ["12345678", "9" * 9, "ab"])], 10))
  assert limited["a"] == "One.\n"
  assert limited["b"] == "x" * 10 + "\n"  # A single docstring is cut.
  assert limited["d"] == "12345678\n\nab\n"[:10] + "\n"


def test_split_of_is_a_hash_of_the_name():
  counts = collections.Counter(corpora.split_of(f"module{i}") for i in range(10_000))
  assert abs(counts["train"] - 9000) < 150
  assert abs(counts["validation"] - 500) < 100
  assert abs(counts["test"] - 500) < 100
  names = ["textwrap", "asyncio.coroutines", "smtplib", "unittest.suite", "gettext"]
  splits = ["test", "test", "validation", "validation", "train"]
  assert [corpora.split_of(name) for name in names] == splits  # For ever.


def test_splits_share_no_name_and_no_text(corpus):
  for domain, splits in corpus.items():
    names = [name for split in splits.values() for name in split]
    texts = [" ".join(t.split()) for split in splits.values() for t in split.values()]
    assert len(set(names)) == len(names) > 300, domain
    assert len(set(texts)) == len(texts), domain
    assert all(texts), domain
  for split in corpora.SPLITS:
    assert len(corpus["code"][split]) > 10
    for other in set(corpora.SPLITS) - {split}:
      assert not set(corpus["code"][split]) & set(corpus["prose"][other])


def test_sizes(corpus):
  sizes = {
    domain: {split: sum(len(t.encode()) for t in texts.values()) for split, texts in splits.items()}
    for domain, splits in corpus.items()
  }
  for domain, size in sizes.items():
    assert 1.5e6 < sum(size.values()) < 8.5e6, (domain, size)
    assert size["train"] > 0.8 * sum(size.values())
    assert min(size.values()) > 60_000, (domain, size)
  assert max(len(t) for s in corpus["science"].values() for t in s.values()) <= 20_001


def test_code_is_python_without_docstrings_and_without_noise(corpus):
  code = corpus["code"]["train"] | corpus["code"]["validation"]
  for name in list(corpus["code"]["validation"]) + list(corpus["code"]["test"]):
    tree = ast.parse((code | corpus["code"]["test"])[name])
    assert not any(corpora._docstring_statement(node) for node in ast.walk(tree)), name
  assert {"unittest.case", "asyncio.tasks", "json.decoder"} <= set(code | corpus["code"]["test"])
  roots = {name.split(".")[0] for name in code}
  assert not roots & {"test", "idlelib", "turtledemo", "ensurepip", "pydoc_data", "site-packages"}
  assert not {"encodings.cp1252", "encodings.koi8_r"} & set(code)
  assert not any(name.startswith("_sysconfigdata") for name in code)


def test_prose_and_code_of_a_module_share_no_sentences(corpus):
  lines = shared = 0
  for split in ("validation", "test"):
    for name, prose in corpus["prose"][split].items():
      code = set(corpus["code"][split].get(name, "").split("\n"))
      stripped = {line.strip() for line in code}
      long = [line.strip() for line in prose.split("\n") if len(line) > 50]
      lines += len(long)
      shared += sum(line in stripped for line in long)
  assert lines > 1000
  assert shared < lines / 200


def test_science_has_every_package_and_the_docs_of_functions_in_c(corpus):
  science = {name: text for split in corpus["science"].values() for name, text in split.items()}
  packages = {name.split(".")[0] for name in science}
  assert packages == {"numpy", "scipy", "sklearn", "jax"}
  assert "Parameters\n----------" in science["numpy._core._add_newdocs"]
  assert ">>> " in science["scipy.special._add_newdocs"]
  assert not any(".tests" in name for name in science)


def test_an_interrupted_preparation_leaves_nothing(monkeypatch, tmp_path):
  monkeypatch.setenv("FLAXWORKS_CACHE", str(tmp_path))

  def interrupted(domain):
    yield "module0", "text"
    raise KeyboardInterrupt

  examples = corpora.EmbeddedText._generate_examples

  def interrupted_writing(self, documents, split):
    yield from examples(self, documents, split)
    if split == "validation":  # The train split is on disk by now.
      raise KeyboardInterrupt

  def complete(domain):
    return [(f"module{i}", f"text {i}") for i in range(200)]

  with monkeypatch.context() as patch:
    patch.setattr(corpora, "extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
      corpora.load_corpus("code", "train")
  monkeypatch.setattr(corpora, "extract", complete)
  with monkeypatch.context() as patch:
    patch.setattr(corpora.EmbeddedText, "_generate_examples", interrupted_writing)
    with pytest.raises(KeyboardInterrupt):
      corpora.load_corpus("code", "train")
  assert not list(tmp_path.rglob("*.array_record*"))
  sizes = [len(corpora.load_corpus("code", split)) for split in corpora.SPLITS]
  assert sum(sizes) == 200 and min(sizes) > 0
  # Prepared once: nothing is extracted again.
  monkeypatch.setattr(corpora, "extract", interrupted)
  assert len(corpora.load_corpus("code", "train")) == sizes[0]


def test_another_version_of_a_package_is_another_corpus(monkeypatch):
  before = corpora.fingerprint()
  version = corpora.importlib.metadata.version
  monkeypatch.setattr(
    corpora.importlib.metadata, "version", lambda name: "9.9" if name == "scipy" else version(name)
  )
  assert "scipy9.9" in corpora.fingerprint()
  assert corpora.fingerprint() != before
