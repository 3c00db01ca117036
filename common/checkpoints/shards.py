"""The files of a checkpoint directory: safetensors in one or several shards, read and written.

Nothing is unpickled: a directory with only PyTorch `.bin` files is refused. `CheckpointWriter`
writes shards as they come and makes the directory appear only when it is complete.
"""

import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from common.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "tokenizer.model",
  "spiece.model",
  "vocab.json",
  "vocab.txt",
  "merges.txt",
  "added_tokens.json",
  "special_tokens_map.json",
  "chat_template.jinja",
  "preprocessor_config.json",
  "generation_config.json",
)

# The types of safetensors that NumPy (BF16: with ml_dtypes) has too, as its reader hands them over.
_DTYPES = frozenset(
  ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
)


def tensor_files(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """The tensors of a checkpoint directory: name -> the safetensors file that holds it.

  Raises:
    UserError: there is no such file, one is damaged or lacks tensors, or a tensor is of a type that
      is not read.
  """
  index, single = path / INDEX_NAME, path / "model.safetensors"
  if index.is_file():
    try:
      weight_map = json.loads(index.read_text())["weight_map"]
      names = {name: path / pathlib.PurePath(file).name for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
      raise UserError(f"{index} is damaged: {e!r}") from None
    for file in sorted(set(names.values())):
      wanted = {name for name, where in names.items() if where == file}
      with open_file(file) as f:
        held = set(f.keys())
        _check_dtypes(f, file, wanted & held)
      if wanted - held:
        raise UserError(f"{file} lacks tensors that the index names: {some(sorted(wanted - held))}")
    return names
  if single.is_file():
    with open_file(single) as f:
      _check_dtypes(f, single, f.keys())
      return dict.fromkeys(f.keys(), single)
  pickled = sorted(p.name for p in path.glob("*.bin")) + sorted(p.name for p in path.glob("*.pt"))
  if pickled:
    raise UserError(
      f"{path} has only pickled weights ({pickled[0]}), which are never loaded because unpickling "
      "runs code; convert them to safetensors"
    )
  raise UserError(f"{path} has no model.safetensors and no {INDEX_NAME}")


def open_file(file: pathlib.Path):
  """Opens a safetensors file for reading, its tensors as NumPy arrays.

  Raises:
    UserError: it is missing or damaged.
  """
  try:
    return safetensors.safe_open(file, framework="np")
  except FileNotFoundError:
    raise UserError(f"{file} is missing") from None
  except OSError as e:
    raise UserError(f"{file} cannot be read: {e}") from None
  except safetensors.SafetensorError as e:
    raise UserError(f"{file} is truncated or not a safetensors file: {e}") from None


def _check_dtypes(f, file: pathlib.Path, names: Iterable[str]) -> None:
  for name in sorted(names):
    dtype = f.get_slice(name).get_dtype()
    if dtype not in _DTYPES:
      raise UserError(
        f"{file}: tensor {name!r} is of type {dtype}, which is not supported; use a checkpoint in "
        "BF16, F16 or F32"
      )


class CheckpointWriter:
  """Writes a checkpoint directory shard by shard; it appears at `path` only when complete.

  Use as a context manager: `add` tensors in any order; leaving the block by an exception removes
  what was written.

  Args:
    path: directory to create.
    hf_config: config.json's content.
    tokenizer_from: directory whose tokenizer files are copied, if any.
    max_shard_bytes: a shard is closed when it would grow beyond this.
    overwrite: replace `path` if it exists.

  Raises:
    UserError: `path` exists (without `overwrite`, or without a config.json) or cannot be written.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    hf_config: Mapping[str, Any],
    *,
    tokenizer_from: str | os.PathLike | None = None,
    max_shard_bytes: int = 4 << 30,
    overwrite: bool = False,
  ):
    self.path = pathlib.Path(path).expanduser()
    self.hf_config = hf_config
    self.tokenizer_from = tokenizer_from
    self.max_shard_bytes = max_shard_bytes
    self.overwrite = overwrite
    # A random name: in containers a process that was killed often had the same id.
    self._partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.partial")
    self._pending: dict[str, np.ndarray] = {}
    self._shards: list[list[str]] = []
    self._total_bytes = 0

  def __enter__(self):
    check_target(self.path, self.overwrite)
    try:
      self._partial.mkdir(parents=True)
    except OSError as e:
      raise UserError(f"cannot write to {self.path.parent}: {e.strerror}") from None
    return self

  def __exit__(self, error_type, *_):
    try:
      if error_type is None:
        self._flush()
        self._finish()
    finally:
      shutil.rmtree(self._partial, ignore_errors=True)

  def add(self, tensors: Mapping[str, np.ndarray]) -> None:
    """Adds tensors; writes a shard when enough have come."""
    for name, value in tensors.items():
      pending = sum(v.nbytes for v in self._pending.values())
      if self._pending and pending + value.nbytes > self.max_shard_bytes:
        self._flush()
      self._pending[name] = np.asarray(value, order="C")  # Keeps scalars scalar.

  def flush(self) -> None:
    """Writes what was added so far as a shard, to free its memory."""
    self._flush()

  def _flush(self) -> None:
    if not self._pending:
      return
    file = self._partial / f"shard-{len(self._shards)}.safetensors"
    save_tensors(file, self._pending, {"format": "pt"})
    self._shards.append(list(self._pending))
    self._total_bytes += sum(v.nbytes for v in self._pending.values())
    self._pending = {}

  def _finish(self) -> None:
    count = len(self._shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
      names = ["model.safetensors"]
    for i, name in enumerate(names):
      os.rename(self._partial / f"shard-{i}.safetensors", self._partial / name)
    if count > 1:
      weight_map = {t: name for name, shard in zip(names, self._shards) for t in shard}
      index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
      (self._partial / INDEX_NAME).write_text(json.dumps(index, indent=2))
    (self._partial / "config.json").write_text(json.dumps(dict(self.hf_config), indent=2) + "\n")
    if self.tokenizer_from is not None:
      for name in TOKENIZER_FILES:
        if (source := pathlib.Path(self.tokenizer_from) / name).is_file():
          shutil.copyfile(source, self._partial / name)
    if self.overwrite and self.path.exists():
      # The old one goes only when the new one is there.
      old = self._partial.with_suffix(".old")
      os.rename(self.path, old)
      os.rename(self._partial, self.path)
      shutil.rmtree(old)
    else:
      os.rename(self._partial, self.path)


def check_target(path: pathlib.Path, overwrite: bool) -> None:
  """Checks that a checkpoint may be written to `path`.

  Raises:
    UserError: it exists (without `overwrite`, or without a config.json).
  """
  if path.exists() and not overwrite:
    raise UserError(f"{path} exists; choose another directory or ask to overwrite it")
  if path.exists() and not (path / "config.json").is_file():
    raise UserError(f"{path} is not a checkpoint directory and is not overwritten")


def save_tensors(
  path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]
) -> None:
  """Writes one safetensors file, which appears only when complete, with the usual permissions."""
  partial = path.with_name(f".{path.name}.{os.getpid()}.part")
  try:
    safetensors.numpy.save_file(dict(tensors), partial, metadata=metadata)
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o666 & ~umask)  # The library makes files that only their owner can read.
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def some(names: list[str], limit: int = 4) -> str:
  """The first names of a list, and how many are left, for messages."""
  rest = len(names) - limit
  return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
