"""The measurements of a run, kept in its folder until it ends: after a kill the same command goes on.

    measurements = Measurements(workdir, config, types=(WindowLosses,))
    for seed in config.seeds:
      losses = measurements.get(f"RTN, seed {seed}", lambda: window_losses(rtn(model), windows))

A measurement is what the tables need of a model, not the model (but for small ones, whose training is
what takes long). What only the missing measurements need is best computed within them.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
import sys
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import serialization

from common.errors import UserError
from common.reporting.report import environment, plain_json, write_bytes

T = TypeVar("T")
_FOLDER = "unfinished"


class Measurements:
  """Measurements by name, of one run.

  Those of an earlier run in the same folder are taken over if that run did not end and had the same
  config, code, versions and kind of device. With several processes nothing is kept.
  """

  def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], types: Sequence[type] = ()):
    """Looks for what an earlier run left, and says what it found.

    Args:
      workdir: of the run.
      config: of the run; whatever changes its results.
      types: the named tuples and dataclasses of which measurements consist, beside arrays, numbers,
        strings, None, lists, tuples and dicts.
    """
    self._types = {kind.__name__: kind for kind in types}
    self._names: set[str] = set()
    self._folder = None
    if jax.process_count() == 1:
      self._folder = workdir / _FOLDER / _fingerprint(config)
      found = len(list(self._folder.glob("*.msgpack")))
      if found:
        print(f"going on with {found} measurements in {self._folder}", file=sys.stderr)

  def get(self, name: str, measure: Callable[[], T]) -> T:
    """Returns the measurement `name`: as an earlier run left it, or measured now, and kept.

    Arrays are NumPy's in both cases.

    Raises:
      TypeError: the measurement holds something of another type.
      UserError: the name was used before, or the file of the measurement is damaged.
    """
    if name in self._names:
      raise UserError(f"two measurements are named {name!r}; does the config list something twice?")
    self._names.add(name)
    if self._folder is None:
      return self._from_plain(serialization.msgpack_restore(self._to_bytes(measure())))
    path = self._folder / f"{_file_name(name)}.msgpack"
    if not path.exists():
      data = self._to_bytes(measure())
      self._folder.mkdir(parents=True, exist_ok=True)
      write_bytes(path, data)
    # What is read back goes on, so that a run that was interrupted sees the same.
    try:
      return self._from_plain(serialization.msgpack_restore(path.read_bytes()))
    except (ValueError, KeyError, TypeError) as e:
      raise UserError(f"{path} is damaged ({e}); delete it to measure again") from None

  def _to_bytes(self, value: Any) -> bytes:
    return serialization.msgpack_serialize(self._to_plain(value))

  def _to_plain(self, value: Any) -> Any:
    """Lists, dicts with their type's name, and leaves that msgpack takes."""
    kind = type(value)
    if value is None or isinstance(value, bool | int | float | str | np.ndarray | np.generic):
      return value
    if isinstance(value, jax.Array):
      return np.asarray(value)
    if kind is list:
      return [self._to_plain(v) for v in value]
    if kind is tuple:
      return {"type": "tuple", "value": [self._to_plain(v) for v in value]}
    if isinstance(value, dict):
      items = [[self._to_plain(k), self._to_plain(v)] for k, v in value.items()]
      return {"type": "dict", "value": items}
    if self._types.get(kind.__name__) is not kind:
      raise TypeError(f"a measurement holds a {kind.__name__}, which `types` lacks")
    if dataclasses.is_dataclass(value):
      fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    else:
      fields = value._asdict()
    plain = {name: self._to_plain(v) for name, v in fields.items()}
    return {"type": kind.__name__, "value": plain}

  def _from_plain(self, plain: Any) -> Any:
    if isinstance(plain, list):
      return [self._from_plain(v) for v in plain]
    if not isinstance(plain, dict):
      return plain
    kind, value = plain["type"], plain["value"]
    if kind == "tuple":
      return tuple(self._from_plain(v) for v in value)
    if kind == "dict":
      return {self._from_plain(k): self._from_plain(v) for k, v in value}
    return self._types[kind](**{name: self._from_plain(v) for name, v in value.items()})


def discard_measurements(workdir: pathlib.Path) -> None:
  """Removes what unfinished runs left in the folder, as one has ended there."""
  shutil.rmtree(workdir / _FOLDER, ignore_errors=True)


def _file_name(name: str) -> str:
  """The name as a file system takes it; of a long one, such as of a path, the end and a digest."""
  quoted = urllib.parse.quote(name, safe=" ,+=")
  if len(quoted) <= 200:
    return quoted
  return f"{hashlib.sha256(name.encode()).hexdigest()[:16]} {quoted[-180:]}"


def _fingerprint(config: Mapping[str, Any]) -> str:
  """Of all that a measurement depends on: the config, the code, the versions, the kind of device."""
  stamp = environment()
  known = {name: stamp[name] for name in ("jax", "jaxlib", "flax", "device")}
  known |= {"config": plain_json(dict(config)), "code": _code_digest()}
  return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _code_digest() -> str:
  """Of every source file of the checkout that a run can import."""
  root = pathlib.Path(__file__).parents[2]
  digest = hashlib.sha256()
  for folder in ("common", "kernels", "projects"):
    for path in sorted((root / folder).rglob("*.py")):
      digest.update(str(path.relative_to(root)).encode())
      digest.update(path.read_bytes())
  return digest.hexdigest()
