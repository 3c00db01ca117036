"""Saving a search result and applying it to a fresh checkpoint.

One safetensors file: tensor "blocks.{i}.scale.{previous}" is the scale [in] that the operation at
path `previous` absorbs, "blocks.{i}.clip.{linear}" the largest |w| [groups, out]. The settings are
in the file's metadata, as JSON.
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
from common.quantization.awq import AWQSettings, BlockSearch
from common.quantization.quantized_array import IntegerFormat


def save(path: str | os.PathLike, searches: list[BlockSearch], settings: AWQSettings) -> None:
  """Writes the search results of all blocks; the file appears only when complete."""
  tensors = {}
  for i, search in enumerate(searches):
    for kind, found in (("scale", search.scales), ("clip", search.clips)):
      tensors |= {f"blocks.{i}.{kind}.{name}": np.asarray(v) for name, v in found.items()}
  described = dataclasses.asdict(settings)
  described["format"]["scale_dtype"] = jnp.dtype(settings.format.scale_dtype).name
  metadata = {"settings": json.dumps(described), "num_blocks": str(len(searches))}
  save_tensors(pathlib.Path(path), tensors, metadata)


def load(path: str | os.PathLike) -> tuple[list[BlockSearch], AWQSettings]:
  """Reads what `save` wrote.

  Raises:
    UserError: the file is missing, damaged or not a search result.
  """
  try:
    with safetensors.safe_open(path, framework="np") as f:
      metadata = f.metadata() or {}
      settings = json.loads(metadata["settings"])
      searches = {str(i): BlockSearch({}, {}) for i in range(int(metadata["num_blocks"]))}
      for key in f.keys():
        _, index, kind, name = key.split(".", 3)
        search = searches[index]
        {"scale": search.scales, "clip": search.clips}[kind][name] = jnp.asarray(f.get_tensor(key))
    settings["format"] = IntegerFormat(**settings["format"])
    return list(searches.values()), AWQSettings(**settings)
  except FileNotFoundError:
    raise UserError(f"AWQ search result {path} does not exist") from None
  except (safetensors.SafetensorError, OSError, LookupError, ValueError, TypeError) as e:
    raise UserError(f"{path} is not an AWQ search result: {e!r}") from None
