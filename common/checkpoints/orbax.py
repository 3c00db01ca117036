"""Orbax checkpoints: of a training run (to resume it) and of a finished model (to load it)."""

import dataclasses
import json
import logging
import os
import pathlib
import secrets
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from common.errors import UserError

PyTree = Any

# Orbax logs a screenful at INFO for every save, and absl shows INFO. Its warnings stay.
logging.getLogger("absl").addFilter(
  lambda record: record.levelno > logging.INFO or "/orbax/" not in record.pathname
)


class TrainingCheckpoints:
  """The newest `keep` checkpoints of a training run, in `directory/STEP/`.

  Saving is asynchronous: `save` returns once the arrays have been copied from the devices, and
  the files are written in the background. A checkpoint becomes visible by one rename when it is
  complete, so a process killed at any moment leaves only whole checkpoints. Use as a context
  manager: leaving it waits for the save in flight.
  """

  def __init__(self, directory: os.PathLike | str, keep: int = 2):
    self.directory = epath.Path(directory).absolute()
    state_handler, iterator_handler = ocp.StandardCheckpointHandler(), _IteratorHandler()
    handlers = ocp.DefaultCheckpointHandlerRegistry()
    handlers.add("state", ocp.args.StandardSave, state_handler)
    handlers.add("state", ocp.args.StandardRestore, state_handler)
    handlers.add("iterator", _IteratorSave, iterator_handler)
    handlers.add("iterator", _IteratorRestore, iterator_handler)
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(keep),
        cleanup_tmp_directories=True,
      ),
      handler_registry=handlers,
    )

  def latest_step(self) -> int | None:
    """Returns the step of the newest complete checkpoint, None where there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: PyTree, iterator_state: Any = None) -> None:
    """Starts to save `state` (arrays, typed PRNG keys included) as `step`.

    Args:
      step: the name of the checkpoint; a step that is already saved is left as it is.
      state: any pytree of jax.Arrays. Its buffers may be donated as soon as this returns.
      iterator_state: what this process's data iterator needs to continue; anything that JSON
        holds. Every process saves its own.
    """
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), iterator=_IteratorSave(iterator_state)
      ),
    )

  def restore_latest(self, abstract_state: PyTree) -> tuple[PyTree, Any] | None:
    """Restores the newest checkpoint.

    Args:
      abstract_state: arrays or jax.ShapeDtypeStructs with the structure, shapes, dtypes and
        shardings to restore onto. A saved dtype that differs is cast.

    Returns:
      (state, iterator_state), or None where there is no checkpoint.

    Raises:
      UserError: the newest checkpoint is damaged, or is one of another model or optimizer.
    """
    self.wait()
    step = self.latest_step()
    if step is None:
      return None
    where = self.directory / str(step)

    def read():
      metadata = self._manager.item_metadata(step).state
      _check_matches(metadata, abstract_state, where)
      return self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(_to_abstract(abstract_state)), iterator=_IteratorRestore()
        ),
      )

    restored = _read(read, where, "delete it to go back to the checkpoint before it, if any")
    return restored.state, restored.iterator

  def wait(self) -> None:
    """Blocks until the save in flight is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the save in flight and ends the writer threads."""
    self._manager.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self.close()


def save_params(path: os.PathLike | str, params: PyTree, metadata: dict[str, Any]) -> bool:
  """Saves the parameters of a finished model in the folder `path`, once.

  The folder is written under another name and renamed when it is complete: nobody ever sees
  half of it, and of several processes that save to one path the first to finish wins. A finished
  model is never overwritten: delete the folder to replace it.

  Args:
    path: a local folder, which need not exist.
    params: a pytree of jax.Arrays.
    metadata: anything JSON holds: the model's config, the tokenizer, how it was trained.

  Returns:
    True where this call wrote `path`, False where it was there already.
  """
  path = pathlib.Path(path).absolute()
  if multihost_utils.broadcast_one_to_all(path.exists()):
    return False
  # One random name for all processes of this run, another for any other run.
  token = int(multihost_utils.broadcast_one_to_all(secrets.randbits(31)))
  partial = path.parent / f".{path.name}.{token:08x}.partial"
  partial.mkdir(parents=True, exist_ok=True)
  won = True
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(partial / "params", params)
    if jax.process_index() == 0:
      (partial / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
      won = _rename_unless_there(partial, path)
  finally:
    if jax.process_index() == 0:
      shutil.rmtree(partial, ignore_errors=True)
  return bool(multihost_utils.broadcast_one_to_all(won))


def _rename_unless_there(source: pathlib.Path, target: pathlib.Path) -> bool:
  try:
    source.rename(target)
  except OSError:
    if not target.exists():
      raise
    return False
  return True


def load_params(path: os.PathLike | str, abstract_params: PyTree) -> tuple[PyTree, dict[str, Any]]:
  """Loads what `save_params` saved.

  Args:
    path: the folder.
    abstract_params: arrays or jax.ShapeDtypeStructs with the structure, shapes, dtypes and
      shardings to load onto (without a sharding: the first device, or all of the current mesh, whole
      on each). A saved dtype that differs is cast.

  Returns:
    (params, metadata).

  Raises:
    UserError: the folder is missing or damaged, or holds another model.
  """
  path = pathlib.Path(path).absolute()
  metadata = load_metadata(path)

  def read():
    with ocp.StandardCheckpointer() as checkpointer:
      stored = checkpointer.metadata(path / "params").item_metadata
      _check_matches(stored, abstract_params, path)
      return checkpointer.restore(path / "params", _to_abstract(abstract_params))

  return _read(read, path, "delete it to make it again"), metadata


def load_metadata(path: os.PathLike | str) -> dict[str, Any]:
  """Returns the metadata that `save_params` saved, without reading any array.

  Raises:
    UserError: the folder is missing or damaged.
  """
  try:
    return json.loads((pathlib.Path(path) / "metadata.json").read_text())
  except FileNotFoundError:
    raise UserError(
      f"no saved model at {path}: it has no metadata.json; check the path, or make the model again"
    ) from None
  except ValueError:
    raise UserError(
      f"the saved model {path} is damaged: its metadata.json is not JSON; delete it to make it again"
    ) from None


def _read(read, where, remedy: str):
  """Calls `read`, whose failures, but for the accelerator's and bugs, mean damaged files."""
  try:
    return read()
  except (UserError, jax.errors.JaxRuntimeError, AttributeError, TypeError):
    raise
  except Exception as e:  # Orbax and TensorStore raise everything, bare Exception included.
    cause = (str(e).splitlines() or [""])[0][:200]
    raise UserError(
      f"the checkpoint {where} is damaged ({type(e).__name__}: {cause}); {remedy}"
    ) from e


def _check_matches(metadata: Any, abstract: PyTree, where) -> None:
  """Raises a UserError that names the first arrays in which checkpoint and program differ.

  Orbax finds these differences too, but in the middle of reading and in pages of text.
  """
  if metadata is None:
    raise ValueError("it lacks the file _METADATA")
  stored = {name: tuple(x.shape) for name, x in _named_leaves(metadata.tree)}
  wanted = {name: tuple(_raw(x).shape) for name, x in _named_leaves(abstract)}
  differences = [
    f"{name} is {list(stored[name]) if name in stored else 'missing'} in the checkpoint and "
    f"{list(wanted[name]) if name in wanted else 'missing'} here"
    for name in sorted(stored.keys() | wanted.keys())
    if stored.get(name) != wanted.get(name)
  ]
  if differences:
    more = f" (and {len(differences) - 2} more)" if len(differences) > 2 else ""
    raise UserError(
      f"the checkpoint {where} is of another model or optimizer: "
      f"{'; '.join(differences[:2])}{more}; use the config that it was saved with, "
      "another folder, or delete it"
    )


def _named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
  leaves = jax.tree.leaves_with_path(tree)
  return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def _raw(x: Any) -> Any:
  """Typed PRNG keys are stored as their key data: uint32 with one more axis."""
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    return jax.eval_shape(jax.random.key_data, x)
  return x


def _to_abstract(tree: PyTree) -> PyTree:
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  else:
    default = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def abstract(x):
    sharding = getattr(x, "sharding", None)
    # What jax.eval_shape gives within `jax.set_mesh` names no devices.
    if sharding is None or isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh):
      sharding = default
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(abstract, tree)


class _IteratorHandler(ocp.CheckpointHandler):
  """One JSON file for each process: every process reads other data."""

  def _file(self, directory: epath.Path) -> epath.Path:
    return directory / f"process_{jax.process_index()}-of-{jax.process_count()}.json"

  def save(self, directory: epath.Path, args: "_IteratorSave") -> None:
    self._file(directory).write_text(json.dumps(args.iterator_state))

  def restore(self, directory: epath.Path, args: "_IteratorRestore") -> Any:
    del args
    if not self._file(directory).exists():
      raise UserError(
        f"the checkpoint {directory.parent} was saved by another number of processes than the "
        f"{jax.process_count()} that run now: resume with as many as saved it"
      )
    return json.loads(self._file(directory).read_text())


@ocp.args.register_with_handler(_IteratorHandler, for_save=True)
@dataclasses.dataclass
class _IteratorSave(ocp.args.CheckpointArgs):
  iterator_state: Any


@ocp.args.register_with_handler(_IteratorHandler, for_restore=True)
@dataclasses.dataclass
class _IteratorRestore(ocp.args.CheckpointArgs):
  pass
