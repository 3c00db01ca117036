"""Hugging Face checkpoint directories: config.json and safetensors, read and written in parts.

Nothing is unpickled: a directory with only PyTorch `.bin` files is refused. `Checkpoint` reads one
block at a time, so a checkpoint larger than memory can be streamed; `CheckpointWriter` writes
shards as they come and makes the directory appear only when it is complete.
"""

import collections
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from common.checkpoints.families import FAMILIES, Family
from common.errors import UserError
from common.models.decoder import Block, Decoder, DecoderConfig

INDEX_NAME = "model.safetensors.index.json"
TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "generation_config.json",
)
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


class Checkpoint:
  """A Hugging Face directory of a supported decoder, opened for reading.

  Attributes:
    path: the directory.
    hf_config: config.json as a dict.
    config: the decoder's config.
    files: tensor name -> the safetensors file that holds it.

  Raises:
    UserError: the directory, its config or its weights are missing, damaged or of an unsupported
      kind; tensors are missing or unexpected (they are named).
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path).expanduser()
    self.hf_config = read_config(self.path)
    self.family = _family(self.hf_config, self.path)
    self.config = _decoder_config(self.family, self.hf_config, self.path)
    self.files = _tensor_files(self.path)
    self.quantization = self.hf_config.get("quantization_config")
    self._check_names()

  def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Reads tensors by name; the files are open (and mapped) only during the call."""
    by_file = collections.defaultdict(list)
    for name in names:
      by_file[self.files[name]].append(name)
    tensors = {}
    for file, wanted in by_file.items():
      with _open(file) as f:
        for name in wanted:
          tensors[name] = f.get_tensor(name)
    for name, value in tensors.items():
      # Bit patterns and integers of quantized tensors are finite by construction.
      if jnp.issubdtype(value.dtype, jnp.floating) and not np.isfinite(value).all():
        raise UserError(f"{self.path}: tensor {name!r} holds NaN or infinite values")
    return tensors

  def load_model(self, dtype=jnp.float32) -> Decoder:
    """The whole model, its parameters cast to `dtype` (None keeps the file's)."""
    model = self.load_outer(dtype)
    model.config = self.config
    model.blocks = nnx.List([self.load_block(i, dtype) for i in range(self.config.num_layers)])
    return model

  def load_outer(self, dtype=jnp.float32) -> Decoder:
    """The model without its blocks: embeddings, final norm and head."""
    return self._load(lambda rngs: _outer(self.config, rngs), (), dtype)

  def load_block(self, index: int, dtype=jnp.float32) -> Block:
    """Block `index`; its quantized linears, if any, as `QuantizedLinear`."""
    return self._load(lambda rngs: Block(self.config, rngs), ("blocks", index), dtype)

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
      value = _from_hf(self.family, path, tensors[names[path]], self.config)
      if value.shape != variable.shape:
        raise UserError(
          f"{self.path}: tensor {names[path]!r} gives shape {value.shape}, "
          f"config.json asks for {variable.shape}"
        )
      value = np.ascontiguousarray(value).astype(dtype or value.dtype)
      flat[path] = variable.replace(jnp.asarray(value))
    module = nnx.merge(graphdef, nnx.State.from_flat_path(flat))
    if quantized:
      # Imported here: quantization is built on checkpoints, not the other way round.
      from common.quantization import autoawq

      autoawq.attach(module, self, {".".join(map(str, p)): s for p, s in quantized.items()})
    return module

  def _check_names(self) -> None:
    abstract = nnx.eval_shape(lambda: Decoder(self.config, rngs=nnx.Rngs(0)))
    expected = {tensor_name(self.family, path) for path, _ in nnx.state(abstract).flat_state()}
    if any(name not in self.files for name in expected):
      # A checkpoint of the bare model, saved without its head's class, leaves the prefix out.
      prefix = self.family.prefix
      renamed = {f"{prefix}{name}": file for name, file in self.files.items()}
      if any(name in renamed for name in expected) and not any(
        name.startswith(prefix) for name in self.files
      ):
        raise UserError(
          f"{self.path}: the tensors lack the prefix {prefix!r}: this is the model without its "
          "language-model head; save it from the class " + self.family.architecture
        )
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
    tied = (
      {tensor_name(self.family, ("lm_head", "kernel"))}
      if self.config.tie_word_embeddings
      else set()
    )
    extra = sorted(
      name for name in self.files.keys() - expected - tied if not name.endswith(self.family.buffers)
    )
    if missing:
      raise UserError(f"{self.path}: missing tensors: {_some(missing)}")
    if extra:
      raise UserError(f"{self.path}: unexpected tensors: {_some(extra)}")


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
    UserError: `path` exists (without `overwrite`) or cannot be written.
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
    self._partial = self.path.with_name(f".{self.path.name}.incomplete-{os.getpid()}")
    self._pending: dict[str, np.ndarray] = {}
    self._shards: list[list[str]] = []
    self._total_bytes = 0

  def __enter__(self):
    if self.path.exists() and not self.overwrite:
      raise UserError(f"{self.path} exists; choose another directory or ask to overwrite it")
    try:
      self._partial.mkdir(parents=True)
    except OSError as e:
      raise UserError(f"cannot write to {self.path.parent}: {e.strerror}") from None
    return self

  def __exit__(self, error_type, *_):
    if error_type is not None:
      shutil.rmtree(self._partial, ignore_errors=True)
      return
    self._flush()
    self._finish()

  def add(self, tensors: Mapping[str, np.ndarray]) -> None:
    """Adds tensors; writes a shard when enough have come."""
    for name, value in tensors.items():
      pending = sum(v.nbytes for v in self._pending.values())
      if self._pending and pending + value.nbytes > self.max_shard_bytes:
        self._flush()
      self._pending[name] = np.ascontiguousarray(value)

  def flush(self) -> None:
    """Writes what was added so far as a shard, to free its memory."""
    self._flush()

  def _flush(self) -> None:
    if not self._pending:
      return
    file = self._partial / f"shard-{len(self._shards)}.safetensors"
    safetensors.numpy.save_file(self._pending, file, metadata={"format": "pt"})
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
      shutil.rmtree(self.path)
    os.rename(self._partial, self.path)


def load_decoder(path: str | os.PathLike, dtype=jnp.float32) -> Decoder:
  """Loads a decoder with all its weights. See `Checkpoint` for the errors."""
  return Checkpoint(path).load_model(dtype)


def save_decoder(model: Decoder, path: str | os.PathLike, **writer_options) -> None:
  """Writes a decoder as a Hugging Face directory (`CheckpointWriter`'s options apply)."""
  with CheckpointWriter(path, hf_config(model.config), **writer_options) as writer:
    writer.add(to_hf(model, model.config))


def hf_config(config: DecoderConfig) -> dict[str, Any]:
  """config.json's content for a decoder."""
  family = FAMILIES[config.family]
  return {
    "architectures": [family.architecture],
    "model_type": config.family,
    "vocab_size": config.vocab_size,
    "tie_word_embeddings": config.tie_word_embeddings,
    "dtype": "float32",
    "torch_dtype": "float32",
  } | family.write(config)


def to_hf(module: nnx.Module, config: DecoderConfig, prefix: tuple = ()) -> dict[str, np.ndarray]:
  """Tensors of a decoder, or of its part at `prefix`, under their Hugging Face names.

  Args:
    module: a `Decoder`, or the block at `prefix`.
    config: the decoder's config.
    prefix: path of `module` in the decoder, such as ("blocks", 3).
  """
  family = FAMILIES[config.family]
  tensors, fused = {}, collections.defaultdict(dict)
  for path, variable in nnx.state(module, nnx.Param).flat_state():
    value = np.asarray(variable.get_value())
    if path[-1] == "kernel":
      value = value.T
    name = tensor_name(family, prefix + path)
    if family.fused_qkv and path[-2] in ("q_proj", "k_proj", "v_proj"):
      fused[name][path[-2][0]] = value
    else:
      transpose_back = path[-1] == "kernel" and not family.transposed and path[-2] != "lm_head"
      tensors[name] = value.T if transpose_back else value
  for name, parts in fused.items():
    stacked = [parts[p] for p in "qkv"]
    if family.fused_qkv == "interleaved":
      heads = [p.reshape(config.num_heads, config.head_dim, *p.shape[1:]) for p in stacked]
      value = np.stack(heads, axis=1).reshape(-1, *stacked[0].shape[1:])
    else:
      value = np.concatenate(stacked)
    tensors[name] = value.T if value.ndim == 2 and not family.transposed else value
  return tensors


def tensor_name(family: Family, path: tuple) -> str:
  """Hugging Face name of the parameter at `path`, such as ("blocks", 0, "mlp", ..., "kernel")."""
  index = None
  if path[0] == "blocks":
    index, path = path[1], path[2:]
  module, leaf = ".".join(path[:-1]), path[-1]
  prefix = "" if module == "lm_head" else family.prefix
  return f"{prefix}{family.names[module].format(i=index)}.{_LEAVES[leaf]}"


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


def _family(config: dict[str, Any], path: pathlib.Path) -> Family:
  kind = config.get("model_type")
  architectures = config.get("architectures") or []
  supported = ", ".join(sorted(f.architecture for f in FAMILIES.values()))
  if kind not in FAMILIES or any(a != FAMILIES[kind].architecture for a in architectures):
    name = (architectures or [kind])[0]
    raise UserError(f"{path}: architecture {name!r} is not supported; supported: {supported}")
  return FAMILIES[kind]


def _decoder_config(family: Family, config: dict[str, Any], path: pathlib.Path) -> DecoderConfig:
  try:
    return family.read(config)
  except KeyError as e:
    raise UserError(f"{path}/config.json lacks the key {e}") from None
  except UserError as e:
    raise UserError(f"{path}: {e}") from None


def _tensor_files(path: pathlib.Path) -> dict[str, pathlib.Path]:
  index, single = path / INDEX_NAME, path / "model.safetensors"
  if index.is_file():
    try:
      weight_map = json.loads(index.read_text())["weight_map"]
      names = {name: path / pathlib.PurePath(file).name for name, file in weight_map.items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as e:
      raise UserError(f"{index} is damaged: {e!r}") from None
    for file in sorted(set(names.values())):
      with _open(file) as f:
        held = set(f.keys())
      wanted = {name for name, where in names.items() if where == file}
      if wanted - held:
        raise UserError(
          f"{file} lacks tensors that the index names: {_some(sorted(wanted - held))}"
        )
    return names
  if single.is_file():
    with _open(single) as f:
      return dict.fromkeys(f.keys(), single)
  pickled = sorted(p.name for p in path.glob("*.bin")) + sorted(p.name for p in path.glob("*.pt"))
  if pickled:
    raise UserError(
      f"{path} has only pickled weights ({pickled[0]}), which are never loaded because unpickling "
      "runs code; convert them to safetensors"
    )
  raise UserError(f"{path} has no model.safetensors and no {INDEX_NAME}")


def _open(file: pathlib.Path):
  try:
    return safetensors.safe_open(file, framework="np")
  except FileNotFoundError:
    raise UserError(f"{file} is missing") from None
  except safetensors.SafetensorError as e:
    raise UserError(f"{file} is truncated or not a safetensors file: {e}") from None


def _from_hf(family: Family, path: tuple, value: np.ndarray, config: DecoderConfig) -> np.ndarray:
  """One tensor as the decoder stores it: splits fused q, k, v; kernels become [in, out]."""
  is_kernel = path[-1] == "kernel"
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


def _some(names: list[str], limit: int = 4) -> str:
  rest = len(names) - limit
  return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def abstract_decoder(config: DecoderConfig) -> Decoder:
  """A decoder of `jax.ShapeDtypeStruct` leaves: shapes without memory."""
  return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def parameter_count(config: DecoderConfig) -> int:
  """Number of parameters of a decoder."""
  leaves = jax.tree.leaves(nnx.state(abstract_decoder(config), nnx.Param))
  return sum(int(np.prod(leaf.shape)) for leaf in leaves)
