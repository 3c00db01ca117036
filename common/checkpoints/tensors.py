"""Tensors between Hugging Face's names and layout and ours."""

import collections
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from common.checkpoints.families import FAMILIES
from common.checkpoints.family import Family

_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "embedding": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}


def tensor_name(family: Family, path: tuple) -> str:
  """Hugging Face name of the parameter at `path`, such as ("blocks", 0, "mlp", ..., "kernel").

  Raises:
    ValueError: the family has no such parameter.
  """
  indices = [part for part in path if isinstance(part, int)]
  pattern = ["{}" if isinstance(part, int) else part for part in path]
  name = family.names.get(".".join(pattern))
  if name is None:
    module, leaf = ".".join(pattern[:-1]), pattern[-1]
    if module not in family.names or leaf not in _LEAVES:
      raise ValueError(f"{family.architecture} has no place for {'.'.join(map(str, path))}")
    name = f"{family.names[module]}.{_LEAVES[leaf]}"
  return name.format(*indices)


def canonical_names(family: Family, stored: Iterable[str]) -> dict[str, str]:
  """The names that `tensor_name` gives -> the names in a checkpoint's files.

  They differ in old checkpoints and in those of the bare model, which lack the family's prefix.
  """
  names = {}
  for name in stored:
    ours = name
    for old, new in family.legacy_endings.items():
      if name.endswith(old):
        ours = name.removesuffix(old) + new
    names[ours] = name
  if family.prefix and not any(name.startswith(family.prefix) for name in names):
    heads = tuple(name for name in family.names.values() if not name.startswith(family.prefix))
    names = {
      name if name.startswith(heads) else family.prefix + name: old for name, old in names.items()
    }
  return names


def bare_names(
  family: Family, hf_config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """The tensors as a checkpoint with this config.json names them: the bare class has no prefix."""
  if hf_config.get("architectures") != [family.bare]:
    return dict(tensors)
  return {name.removeprefix(family.prefix): value for name, value in tensors.items()}


def from_hf(family: Family, path: tuple, value: np.ndarray, config: Any) -> np.ndarray:
  """One tensor as our model stores it: splits fused q, k, v; kernels become [..., in, out]."""
  is_kernel = path[-1] == "kernel"
  if is_kernel and value.ndim == 4:
    return value.transpose(2, 3, 1, 0)  # A convolution, [out, in, height, width] there.
  if is_kernel and not family.transposed and path[-2] != "lm_head":
    value = value.T
  if family.fused_qkv and path[-2] in ("q_proj", "k_proj", "v_proj"):
    part = "qkv".index(path[-2][0])
    if family.fused_qkv == "interleaved":
      heads = value.reshape(config.num_heads, 3, config.head_dim, *value.shape[1:])
      value = heads[:, part].reshape(-1, *value.shape[1:])
    else:
      value = np.split(value, 3)[part]
  return value.T if is_kernel else value


def to_hf(module: nnx.Module, config: Any, prefix: tuple = ()) -> dict[str, np.ndarray]:
  """Tensors of a model, or of its part at `prefix`, under their Hugging Face names.

  Args:
    module: a model, or the part at `prefix`.
    config: the model's config.
    prefix: path of `module` in the model, such as ("blocks", 3).
  """
  family = FAMILIES[config.family]
  tensors, fused = {}, collections.defaultdict(dict)
  for path, variable in nnx.state(module, (nnx.Param, nnx.BatchStat)).flat_state():
    value = np.asarray(variable.get_value())
    if path[-1] == "kernel":
      value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    name = tensor_name(family, prefix + path)
    if family.fused_qkv and path[-2] in ("q_proj", "k_proj", "v_proj"):
      fused[name][path[-2][0]] = value
    else:
      transpose_back = path[-1] == "kernel" and not family.transposed and path[-2] != "lm_head"
      tensors[name] = value.T if transpose_back else value
    if path[-1] == "mean":
      # PyTorch counts the batches, for averages of another kind, and misses the count.
      tensors[name.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
  for name, parts in fused.items():
    stacked = [parts[p] for p in "qkv"]
    if family.fused_qkv == "interleaved":
      heads = [p.reshape(config.num_heads, config.head_dim, *p.shape[1:]) for p in stacked]
      value = np.stack(heads, axis=1).reshape(-1, *stacked[0].shape[1:])
    else:
      value = np.concatenate(stacked)
    tensors[name] = value.T if value.ndim == 2 and not family.transposed else value
  return tensors
