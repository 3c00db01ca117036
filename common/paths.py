"""Where Flaxworks keeps and looks for files outside its checkout.

FLAXWORKS_CACHE   everything that is built once and reused: prepared corpora, tokenizers, base
                  models, XLA's compilation cache (default: ~/.cache/flaxworks).
FLAXWORKS_DATA    small public data sets, one folder each (default: CACHE/data).
FLAXWORKS_MODELS  Hugging Face checkpoints, one folder each (default: CACHE/models).
"""

import os
import pathlib

from common.errors import UserError


def cache_dir(*parts: str) -> pathlib.Path:
  """Returns (and makes) a folder of the cache.

  Raises:
    UserError: the folder cannot be made.
  """
  root = pathlib.Path(os.environ.get("FLAXWORKS_CACHE") or "~/.cache/flaxworks").expanduser()
  path = root.joinpath(*parts)
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(
      f"cannot create the cache folder {path}: {e.strerror}; "
      "set FLAXWORKS_CACHE to a folder that you can write"
    ) from None
  return path


def data_dir(name: str) -> pathlib.Path:
  """Returns the folder of the public data set `name` (a folder with its files).

  Raises:
    UserError: there is no such folder.
  """
  return _find("FLAXWORKS_DATA", "data", name)


def models_dir(name: str) -> pathlib.Path:
  """Returns the folder of the Hugging Face checkpoint `name`.

  Raises:
    UserError: there is no such folder.
  """
  return _find("FLAXWORKS_MODELS", "models", name)


def _find(variable: str, kind: str, name: str) -> pathlib.Path:
  root = os.environ.get(variable)
  path = pathlib.Path(root).expanduser() / name if root else cache_dir(kind) / name
  if not path.is_dir():
    raise UserError(
      f"{kind} folder {name!r} is not at {path}; "
      f"run `python -m common.data.download {name}` or point {variable} to a folder that has it"
    )
  return path
