"""What a `Family` says about one Hugging Face model_type, and the helpers of the families' tables."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from flax import nnx

from common.errors import UserError
from common.models.activations import Activation

ACTIVATIONS: dict[str, Activation] = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_python": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_python_tanh": "gelu_tanh",
  "gelu_accurate": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "quick_gelu": "quick_gelu",
  "relu": "relu",
  "relu2": "relu_squared",
  "tanh": "tanh",
}


@dataclasses.dataclass(frozen=True)
class Family:
  """One model_type on the Hugging Face side.

  Attributes:
    architectures: names of the classes that are read. A config.json without one means the first,
      and so does a written one unless `write` names another.
    bare: the class without a head, whose checkpoints leave the prefix out.
    model: our class, made as model(config, rngs=rngs).
    read: config.json's dict -> our config, a frozen dataclass with a field `family`.
    write: our config -> the family's own keys of config.json.
    prefix: what precedes every name but the heads'.
    names: our module path -> theirs; "{}" stands for an index. A parameter that is not a module's
      kernel, scale, embedding, bias, mean or var has an entry of its own.
    inspect: (config, names of the tensors) -> config, for what config.json does not tell.
    tied: tensors that are copies of others when the config ties embeddings, {copy: original}.
    fused_qkv: how q, k and v share one tensor: "concat" (q rows, then k, then v), "interleaved"
      (q, k, v of head 0, then of head 1, ...), or None.
    transposed: kernels are stored [out, in] (False: GPT-2's Conv1D stores [in, out]).
    buffers: name endings of what is never read: masks, rotary tables, parts of other heads.
    legacy_endings: older name endings -> those of today.
  """

  architectures: tuple[str, ...]
  bare: str
  model: type[nnx.Module]
  read: Callable[[dict[str, Any]], Any]
  write: Callable[[Any], dict[str, Any]]
  prefix: str
  names: Mapping[str, str]
  inspect: Callable[[Any, Collection[str]], Any] = lambda config, names: config
  tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
  fused_qkv: str | None = None
  transposed: bool = True
  buffers: tuple[str, ...] = ()
  legacy_endings: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def architecture(self) -> str:
    """The class that checkpoints are of by default."""
    return self.architectures[0]


def read_activation(name: str) -> Activation:
  """Our name of an activation.

  Raises:
    UserError: it is not supported.
  """
  if name not in ACTIVATIONS:
    raise UserError(f"activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
  return ACTIVATIONS[name]


def write_activation(name: Activation) -> str:
  """Inverse of `read_activation`."""
  return {"gelu_tanh": "gelu_new", "relu_squared": "relu2"}.get(name, name)


def reject(hf: dict[str, Any], **supported) -> None:
  """Refuses options whose value changes the computation in a way that our model lacks.

  Raises:
    UserError: `hf` has another value than the supported one.
  """
  for key, value in supported.items():
    if hf.get(key, value) != value:
      raise UserError(
        f"config.json has {key}={hf[key]!r}, which is not supported; expected {value!r}"
      )


def read_labels(hf: dict[str, Any]) -> tuple[str, ...]:
  """Names of the classes, in order; two without names where config.json says nothing."""
  names = hf.get("id2label")
  if names:
    return tuple(names[key] for key in sorted(names, key=int))
  return tuple(f"LABEL_{i}" for i in range(hf.get("num_labels", 2)))


def write_labels(labels: tuple[str, ...]) -> dict[str, Any]:
  """Inverse of `read_labels`; nothing without labels."""
  if not labels:
    return {}
  return {
    "id2label": {str(i): name for i, name in enumerate(labels)},
    "label2id": {name: i for i, name in enumerate(labels)},
  }


def per_block(ours: str, theirs: str, names: Mapping[str, str]) -> dict[str, str]:
  """The entries of `names` with what all blocks' names begin with: {ours.x: theirs.y}."""
  return {f"{ours}.{x}": f"{theirs}.{y}" for x, y in names.items()}
