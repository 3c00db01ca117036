"""Model surgery: find, replace and observe the linear layers of an NNX module by path.

A path is the dotted attribute path inside a module, such as "attention.q_proj".
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx


def get_module(module: nnx.Module, path: str):
  """Returns the submodule (or attribute) at `path`.

  Raises:
    AttributeError: there is none.
  """
  for name in path.split("."):
    module = module[int(name)] if name.isdigit() else getattr(module, name)
  return module


def replace_module(module: nnx.Module, path: str, new) -> None:
  """Puts `new` at `path`, in place."""
  parent, _, name = path.rpartition(".")
  parent = get_module(module, parent) if parent else module
  if name.isdigit():
    parent[int(name)] = new
  else:
    # A module may take the place of a plain function, such as an activation.
    setattr(parent, name, nnx.data(new) if isinstance(new, nnx.Module) else new)


def linear_paths(module: nnx.Module) -> list[str]:
  """Paths of the `nnx.Linear` layers below `module`, sorted."""
  paths = (
    ".".join(map(str, path)) for path, m in nnx.iter_modules(module) if isinstance(m, nnx.Linear)
  )
  return sorted(paths)


class _Recorder(nnx.Module):
  def __init__(self, layer, record: Callable[[jax.Array], None]):
    self.layer = layer
    self.record = record

  def __call__(self, x):
    self.record(x)
    return self.layer(x)


def record_inputs(module: nnx.Module, paths: list[str], run: Callable[[nnx.Module], object]):
  """Runs `run(module)` while noting the input of the layers at `paths`.

  Safe under `jit`: the notes are values of the same trace, returned to the caller.

  Args:
    module: is restored before the call returns. Inside a trace it must be one that was made or
      merged there.
    paths: layers to observe; each must be called exactly once by `run`.
    run: any function of the module.

  Returns:
    (what `run` returned, {path: that layer's input}).
  """
  inputs: dict[str, jax.Array] = {}
  originals = {path: get_module(module, path) for path in paths}
  for path, layer in originals.items():
    replace_module(module, path, _Recorder(layer, lambda x, path=path: inputs.update({path: x})))
  try:
    output = run(module)
  finally:
    for path, layer in originals.items():
      replace_module(module, path, layer)
  return output, inputs


class _Added(nnx.Module):
  """A layer to whose output something is added; of a tuple, to the first."""

  def __init__(self, layer, add: Callable[[jax.Array], jax.Array]):
    self.layer = layer
    self.add = add

  def __call__(self, *args, **options):
    output = self.layer(*args, **options)
    if isinstance(output, tuple):
      return (self.add(output[0]), *output[1:])
    return self.add(output)


def output_gradients(
  module: nnx.Module, paths: Sequence[str], loss: Callable[[nnx.Module], jax.Array]
) -> dict[str, jax.Array]:
  """Gradients of a loss by the outputs of layers, {path: in the output's shape}.

  Args:
    module: not modified.
    paths: layers, none below another; each must be called exactly once by `loss`. Of a layer that
      returns a tuple it is the first output.
    loss: module -> [].
  """
  graphdef, state = nnx.split(module)

  def run(add):
    module = nnx.merge(graphdef, state)
    for path in paths:
      replace_module(module, path, _Added(get_module(module, path), functools.partial(add, path)))
    return loss(module)

  outputs = {}

  def note(path, y):
    outputs[path] = jax.ShapeDtypeStruct(y.shape, y.dtype)
    return y

  jax.eval_shape(lambda: run(note))
  zeros = {path: jnp.zeros(y.shape, y.dtype) for path, y in outputs.items()}
  return jax.grad(lambda added: run(lambda path, y: y + added[path]))(zeros)
