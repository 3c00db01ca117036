"""Saving what FPQ found and applying it to a fresh checkpoint.

One safetensors file: tensor "linears/{path}/{field}" for every field of a `LinearSearch`,
"attentions/{path}/{field}" of an `AttentionSearch`, "embedding/format" and "embedding/bias". The settings
are in the file's metadata, as JSON.
"""

import dataclasses
import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import safetensors

from common.checkpoints.shards import save_tensors
from common.errors import UserError
from projects.llm_fp4.llm_fp4 import FPQSettings, LinearSearch
from projects.llm_fp4.models import ModelSearch, TableSearch
from projects.llm_fp4.products import AttentionSearch


def save(path: str | os.PathLike, search: ModelSearch, settings: FPQSettings) -> None:
  """Writes a search result; the file appears only when complete."""
  tensors = {
    f"{kind}/{name}/{field}": np.asarray(value)
    for kind, found in (("linears", search.linears), ("attentions", search.attentions))
    for name, layer in found.items()
    for field, value in layer._asdict().items()
  }
  if search.embedding is not None:
    tensors |= {f"embedding/{k}": np.asarray(v) for k, v in search.embedding._asdict().items()}
  metadata = {"settings": json.dumps(dataclasses.asdict(settings))}
  save_tensors(pathlib.Path(path), tensors, metadata)


def load(path: str | os.PathLike) -> tuple[ModelSearch, FPQSettings]:
  """Reads what `save` wrote.

  Raises:
    UserError: the file is missing, damaged or not a search result.
  """
  try:
    with safetensors.safe_open(path, framework="np") as f:
      settings = FPQSettings(**json.loads((f.metadata() or {})["settings"]))
      layers, table = {"linears": {}, "attentions": {}}, {}
      for key in f.keys():
        kind, *name, field = key.split("/")
        place = layers[kind].setdefault(name[0], {}) if name else table
        place[field] = jnp.asarray(f.get_tensor(key))
    linears, attentions = (
      {name: make(**fields) for name, fields in sorted(layers[kind].items())}
      for kind, make in (("linears", LinearSearch), ("attentions", AttentionSearch))
    )
    embedding = TableSearch(**table) if table else None
    return ModelSearch(linears, attentions, embedding), settings
  except FileNotFoundError:
    raise UserError(f"FPQ search result {path} does not exist") from None
  except (safetensors.SafetensorError, OSError, LookupError, ValueError, TypeError) as e:
    raise UserError(f"{path} is not an FPQ search result: {e!r}") from None
