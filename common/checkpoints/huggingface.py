"""Hugging Face checkpoint directories as models: config.json and the tensors, read in parts.

`Checkpoint` reads one block at a time, so a checkpoint larger than memory can be streamed. The
files themselves are the business of `shards`.
"""

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.checkpoints.families import FAMILIES
from common.checkpoints.family import Family
from common.checkpoints.shards import CheckpointWriter, open_file, some, tensor_files
from common.checkpoints.tensors import bare_names, canonical_names, from_hf, tensor_name, to_hf
from common.errors import UserError
from common.models.decoder import Block, Decoder, DecoderConfig
from common.models.sharding import cut_over_mesh


class Checkpoint:
  """A Hugging Face directory of a supported model, opened for reading.

  Attributes:
    path: the directory.
    hf_config: config.json as a dict.
    family: how its config and tensors are spelled.
    config: our model's config.
    quantization: config.json's `quantization_config`, None for a checkpoint in full precision.
    files: tensor name -> the safetensors file that holds it. A name is the one of `tensor_name`,
      whatever older spelling the file has.

  Raises:
    UserError: the directory, its config or its weights are missing, damaged or of an unsupported
      kind, quantized in another layout than `autoawq` and `packed_layout` read, for example; tensors are missing or
      unexpected (they are named).
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path).expanduser()
    self.hf_config = read_config(self.path)
    self.family = find_family(self.hf_config, self.path)
    self.quantization = self.hf_config.get("quantization_config")
    self._check_quantization()
    files = tensor_files(self.path)
    self._stored = canonical_names(self.family, files)
    self.files = {name: files[stored] for name, stored in self._stored.items()}
    config = model_config(self.family, self.hf_config, self.files, self.path)
    self.config = self._resolve_ties(config)
    self._check_names()

  def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Reads tensors by name; the files are open (and mapped) only during the call."""
    by_file = collections.defaultdict(list)
    for name in names:
      by_file[self.files[name]].append(name)
    tensors = {}
    for file, wanted in by_file.items():
      with open_file(file) as f:
        for name in wanted:
          tensors[name] = f.get_tensor(self._stored[name])
    for name, value in tensors.items():
      # Bit patterns and integers of quantized tensors are finite by construction.
      if jnp.issubdtype(value.dtype, jnp.floating) and not np.isfinite(value).all():
        raise UserError(f"{self.path}: tensor {name!r} holds NaN or infinite values")
    return tensors

  def load_model(self, dtype=jnp.float32) -> nnx.Module:
    """The whole model, its parameters cast to `dtype` (None keeps the file's)."""
    if self.family.model is not Decoder:
      return self._load(lambda rngs: self.family.model(self.config, rngs=rngs), (), dtype)
    model = self.load_outer(dtype)
    model.config = self.config
    model.blocks = nnx.List([self.load_block(i, dtype) for i in range(self.config.num_layers)])
    return model

  def load_outer(self, dtype=jnp.float32) -> Decoder:
    """A decoder without its blocks: embeddings, final norm and head.

    Raises:
      UserError: the checkpoint is of another kind of model.
    """
    self.require_decoder()
    return self._load(lambda rngs: _outer(self.config, rngs), (), dtype)

  def load_block(self, index: int, dtype=jnp.float32) -> Block:
    """A decoder's block `index`; its quantized linears, if any, as `QuantizedLinear` or alike."""
    self.require_decoder()
    full = index in self.config.full_attention_layers
    if self._packed_blocks is not None:
      from common.quantization import packed_layout  # Imported here, as in `_load`.

      block = nnx.eval_shape(lambda: Block(self.config, nnx.Rngs(0), full))
      prefix = packed_layout.tensor_prefix(index)
      tensors = self.read([name for name in self.files if name.startswith(prefix)])
      tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
      try:
        block = packed_layout.from_tensors(block, tensors, self._packed_blocks[index], dtype)
      except UserError as e:
        raise UserError(f"{self.path}: block {index}: {e}") from None
      return cut_over_mesh(block)
    return self._load(lambda rngs: Block(self.config, rngs, full), ("blocks", index), dtype)

  def _load(self, make, prefix: tuple, dtype):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    flat = dict(state.flat_state())
    quantized, names = {}, {}
    for path in flat:
      name = tensor_name(self.family, prefix + path)
      stem = name.removesuffix(".weight")
      if name not in self.files and f"{stem}.qweight" in self.files:
        quantized[path[:-1]] = stem
      else:
        names[path] = name
    tensors = self.read(set(names.values()))
    for path, variable in flat.items():
      if path not in names:
        # Stands in for a kernel that is replaced by packed weights below.
        flat[path] = variable.replace(jnp.zeros((), dtype))
        continue
      stored = tensors[names[path]]
      try:
        value = from_hf(self.family, path, stored, self.config)
      except ValueError:
        raise UserError(
          f"{self.path}: tensor {names[path]!r} of shape {stored.shape} cannot be split into q, k "
          f"and v of {self.config.num_heads} heads"
        ) from None
      if value.shape != variable.shape:
        raise UserError(
          f"{self.path}: tensor {names[path]!r} gives shape {value.shape}, "
          f"config.json asks for {variable.shape}"
        )
      value = np.ascontiguousarray(value).astype(dtype or value.dtype)
      # `jnp.asarray` would compile a program for each shape.
      flat[path] = variable.replace(jax.device_put(value))
    module = nnx.merge(graphdef, nnx.State.from_flat_path(flat))
    if quantized:
      # Imported here: quantization is built on checkpoints, not the other way round.
      from common.quantization import autoawq

      autoawq.attach(module, self, {".".join(map(str, p)): s for p, s in quantized.items()})
    return cut_over_mesh(module)

  def require_decoder(self) -> None:
    """Raises a UserError if this is another kind of model."""
    if self.family.model is not Decoder:
      raise UserError(
        f"{self.path} is of the kind {self.family.model.__name__}; expected a decoder"
      )

  def _resolve_ties(self, config):
    """Believes the tensors where config.json is wrong about tied embeddings."""
    if not getattr(config, "tie_word_embeddings", False):
      return config
    tied = self.family.tied
    for copy, original in tied.items():
      if original not in self.files and copy in self.files:
        self._alias(original, copy)
    modules = self.family.names.values()
    heads = {c: o for c, o in tied.items() if c.rpartition(".")[0] in modules}
    copies = [copy for copy in heads if copy in self.files]
    tensors = self.read([*copies, *(heads[copy] for copy in copies)])
    if all(np.array_equal(tensors[copy], tensors[heads[copy]]) for copy in copies):
      return config
    for copy, original in heads.items():
      if copy not in self.files and original in self.files:
        self._alias(copy, original)
    return dataclasses.replace(config, tie_word_embeddings=False)

  def _alias(self, name: str, other: str) -> None:
    self.files[name], self._stored[name] = self.files[other], self._stored[other]

  def _check_quantization(self) -> None:
    """Before any file of tensors is opened."""
    self._packed_blocks = None
    if not self.quantization:
      return
    from common.quantization import autoawq, packed_layout  # Imported here, as in `_load`.

    try:
      self._packed_blocks = packed_layout.read_config(self.quantization)
      if self._packed_blocks is None:
        autoawq.read_format(self.quantization)
    except UserError as e:
      raise UserError(f"{self.path}: {e}") from None

  def _check_names(self) -> None:
    state = nnx.state(abstract_model(self.config))
    paths = [path for path, _ in state.flat_state()]
    blocks = set()
    if self._packed_blocks is not None:
      # What a block's layers have is checked when it is read.
      from common.quantization import packed_layout  # Imported here, as in `_load`.

      if len(self._packed_blocks) != self.config.num_layers:
        raise UserError(
          f"{self.path}: quantization_config describes {len(self._packed_blocks)} blocks, the model "
          f"has {self.config.num_layers}"
        )
      prefixes = tuple(map(packed_layout.tensor_prefix, range(self.config.num_layers)))
      blocks = {name for name in self.files if name.startswith(prefixes)}
      paths = [path for path in paths if path[0] != "blocks"]
    expected = {tensor_name(self.family, path) for path in paths} | blocks
    packed = ("qweight", "qzeros", "scales")
    if self.quantization:
      expected = {
        new
        for name in expected
        for new in (
          [f"{name.removesuffix('.weight')}.{p}" for p in packed]
          if f"{name.removesuffix('.weight')}.qweight" in self.files
          else [name]
        )
      }
    missing = sorted(expected - self.files.keys())
    prefix, tied = self.family.prefix, self.family.tied
    extra = self.files.keys() - expected - tied.keys() - set(tied.values())
    extra = sorted(name for name in extra if not name.endswith(self.family.buffers))
    bare = not any(name.startswith(prefix) for name in self._stored.values())
    if missing and bare and not any(name.startswith(prefix) for name in missing):
      raise UserError(
        f"{self.path}: missing tensors: {some(missing)}; the others lack the prefix {prefix!r}: "
        "this is the model without its head; save it from the class " + self.family.architecture
      )
    if missing:
      raise UserError(f"{self.path}: missing tensors: {some(missing)}")
    if extra:
      raise UserError(f"{self.path}: unexpected tensors: {some(extra)}")


def load_decoder(path: str | os.PathLike, dtype=jnp.float32) -> Decoder:
  """Loads a decoder with all its weights. See `Checkpoint` for the errors."""
  checkpoint = Checkpoint(path)
  checkpoint.require_decoder()
  return checkpoint.load_model(dtype)


def save_model(model: nnx.Module, path: str | os.PathLike, **writer_options) -> None:
  """Writes a model as a Hugging Face directory (`CheckpointWriter`'s options apply).

  Raises:
    ValueError: the family's layout cannot hold the model: it has packed or added layers, or options
      that config.json of the family has no keys for.
  """
  family = FAMILIES[model.config.family]
  tensors = to_hf(model, model.config)
  config = hf_config(model.config, str(next(iter(tensors.values())).dtype))
  state = nnx.state(abstract_model(model.config))
  missing = {tensor_name(family, leaf) for leaf, _ in state.flat_state()} - tensors.keys()
  if missing:
    raise ValueError(f"the model has no plain tensors {some(sorted(missing))}: it was changed")
  if family.inspect(family.read(dict(config)), tensors) != model.config:
    raise ValueError(f"config.json of {family.architecture} cannot describe {model.config}")
  with CheckpointWriter(path, config, **writer_options) as writer:
    writer.add(bare_names(family, config, tensors))


def hf_config(config: Any, dtype: str = "float32") -> dict[str, Any]:
  """config.json's content for a model whose tensors are of `dtype`."""
  family = FAMILIES[config.family]
  return {
    "architectures": [family.architecture],
    "model_type": config.family,
    "dtype": dtype,
    "torch_dtype": dtype,
  } | family.write(config)


def read_config(path: pathlib.Path) -> dict[str, Any]:
  """config.json of a checkpoint directory.

  Raises:
    UserError: no such directory or file, or not JSON.
  """
  if not path.is_dir():
    raise UserError(f"checkpoint directory {path} does not exist")
  file = path / "config.json"
  if not file.is_file():
    raise UserError(f"{path} has no config.json: expected a Hugging Face checkpoint directory")
  try:
    config = json.loads(file.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise UserError(f"{file} is not JSON: {e}") from None
  if not isinstance(config, dict):
    raise UserError(f"{file} is not a JSON object")
  return config


def _outer(config: DecoderConfig, rngs: nnx.Rngs) -> Decoder:
  model = Decoder(config, rngs=rngs)
  model.blocks = nnx.List([])
  return model


def find_family(hf_config: Mapping[str, Any], path: pathlib.Path) -> Family:
  """The family of a config.json, which is in `path`.

  Raises:
    UserError: the model_type or the class is not supported.
  """
  kind = hf_config.get("model_type")
  architectures = hf_config.get("architectures") or []
  if kind not in FAMILIES or any(a not in FAMILIES[kind].architectures for a in architectures):
    name = (architectures or [kind])[0]
    supported = ", ".join(sorted(a for f in FAMILIES.values() for a in f.architectures))
    raise UserError(f"{path}: architecture {name!r} is not supported; supported: {supported}")
  return FAMILIES[kind]


def model_config(
  family: Family, hf_config: Mapping[str, Any], names: Collection[str], path: pathlib.Path
) -> Any:
  """Our config of a checkpoint.

  Args:
    family: of `find_family`.
    hf_config: config.json's content.
    names: of the checkpoint's tensors, as `tensor_name` spells them.
    path: where it is, for messages.

  Raises:
    UserError: a key is missing, or has a value that is not supported.
  """
  try:
    config = family.inspect(family.read(dict(hf_config)), names)
  except KeyError as e:
    raise UserError(f"{path}/config.json lacks the key {e}") from None
  except UserError as e:
    raise UserError(f"{path}: {e}") from None
  except (TypeError, ValueError, ZeroDivisionError, AttributeError) as e:
    raise UserError(f"{path}/config.json has a value that does not fit: {e}") from None
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    smallest = 1 if field.name.startswith("num_") or field.name.endswith(("_size", "_dim")) else 0
    if field.type is int and (type(value) is not int or value < smallest):
      raise UserError(f"{path}/config.json gives {field.name}={value!r}, which is no size")
  return config


def abstract_model(config: Any) -> nnx.Module:
  """A model of `jax.ShapeDtypeStruct` leaves: shapes without memory."""
  return nnx.eval_shape(lambda: FAMILIES[config.family].model(config, rngs=nnx.Rngs(0)))


def parameter_count(config: Any) -> int:
  """Number of parameters of a model."""
  leaves = jax.tree.leaves(nnx.state(abstract_model(config), nnx.Param))
  return sum(int(np.prod(leaf.shape)) for leaf in leaves)
