"""Saving what was learned, and the folded matrices, of all blocks: one safetensors file each.

Tensor "blocks.{i}.{path}" is a variable of block i. `save_learned` keeps transforms, scales and
clipping factors, which fit on a fresh checkpoint; `save_folded` keeps reparametrised blocks.
"""

import os
import pathlib
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx

from common.checkpoints.shards import save_tensors
from common.errors import UserError
from common.models.decoder import Block
from common.quantization.reconstruction import Learned
from projects.flatquant.flat_block import FlatBlock


def save_learned(path: str | os.PathLike, blocks: Sequence[FlatBlock]) -> None:
  """Writes the learned variables of all blocks; the file appears only when complete."""
  _save(path, blocks, Learned)


def load_learned(path: str | os.PathLike, blocks: Sequence[FlatBlock]) -> list[FlatBlock]:
  """Copies of `blocks`, made with the same settings, with the variables that were saved.

  (A learned rotation also starts from a matrix that is not saved: `blocks` need its key as well.)

  Raises:
    UserError: the file is missing or damaged, or its blocks have other variables.
  """
  return _load(path, blocks, Learned)


def save_folded(path: str | os.PathLike, blocks: Iterable[Block]) -> None:
  """Writes reparametrised blocks: kernels, norms and online matrices; a device holds one at a time
  if they are made one at a time."""
  _save(path, blocks, nnx.Param)


def load_folded(path: str | os.PathLike, blocks: Sequence[Block]) -> list[Block]:
  """As `load_learned`, for what `save_folded` wrote; `blocks` were reparametrised alike."""
  return _load(path, blocks, nnx.Param)


def _variables(module: nnx.Module, kind: type[nnx.Variable]) -> dict[str, nnx.Variable]:
  flat = nnx.to_flat_state(nnx.state(module, kind))
  return {".".join(map(str, path)): variable for path, variable in flat}


def _save(path, blocks, kind) -> None:
  tensors, count = {}, 0
  for i, block in enumerate(blocks):
    count = i + 1
    for name, variable in _variables(block, kind).items():
      tensors[f"blocks.{i}.{name}"] = np.ascontiguousarray(variable[...])
  save_tensors(pathlib.Path(path), tensors, {"num_blocks": str(count)})


def _load(path_name, blocks, kind) -> list:
  try:
    with safetensors.safe_open(path_name, framework="np") as f:
      saved = {name: f.get_tensor(name) for name in f.keys()}
  except FileNotFoundError:
    raise UserError(f"{path_name} does not exist: expected a file of saved transforms") from None
  except (safetensors.SafetensorError, OSError) as e:
    raise UserError(f"{path_name} is not a file of saved transforms: {e!r}") from None
  loaded = []
  for i, block in enumerate(blocks):
    copy = nnx.clone(block)
    flat = dict(nnx.state(copy, kind).flat_state())
    for path, variable in flat.items():
      name = f"blocks.{i}." + ".".join(map(str, path))
      tensor = saved.pop(name, None)
      if tensor is None or tensor.shape != variable.shape:
        found = "nothing" if tensor is None else f"shape {tensor.shape}"
        raise UserError(
          f"{path_name} has {found} for {name}, expected shape {variable.shape}: it belongs to "
          "another model or to other settings"
        )
      flat[path] = variable.replace(jnp.asarray(tensor))
    nnx.update(copy, nnx.State.from_flat_path(flat))
    loaded.append(copy)
  if saved:
    raise UserError(f"{path_name} has {len(saved)} tensors too many: it belongs to another model")
  return loaded
