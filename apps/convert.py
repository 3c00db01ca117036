"""usage: ./run.sh convert --from=DIR --to=DIR [--overwrite]

Converts a checkpoint between a Hugging Face directory and an Orbax folder, whichever --from is not.

The Orbax folder holds the parameters as our models name them (`params/`, sharded and streamed by
Orbax), config.json's content in metadata.json, and the tokenizer's files. Both directions keep
every value and data type, so that there and back again gives the same tensors bit by bit.

  --from=DIR     Hugging Face directory, or an Orbax folder that this command made
  --to=DIR       folder to create; it appears only when complete
  --overwrite    replace --to if it exists
"""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from absl import flags

from common import cli
from common.errors import UserError

_FROM = flags.DEFINE_string("from", None, "checkpoint to convert", required=True)
_TO = flags.DEFINE_string("to", None, "folder to create", required=True)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace --to if it exists")

FORMAT = "flaxworks-model"


def to_orbax(source: pathlib.Path, target: pathlib.Path) -> None:
  """Writes a Hugging Face directory as an Orbax folder, which must not exist.

  Raises:
    UserError: `source` cannot be read (see `Checkpoint`), or is quantized.
  """
  from flax import nnx

  from common.checkpoints.huggingface import Checkpoint
  from common.checkpoints.orbax import save_params
  from common.checkpoints.shards import TOKENIZER_FILES
  from common.checkpoints.tensors import tensor_name

  checkpoint = Checkpoint(source)
  if checkpoint.quantization:
    raise UserError(f"{source} is quantized; convert the full-precision checkpoint instead")
  state = nnx.state(checkpoint.load_model(dtype=None))
  dtypes = {tensor_name(checkpoint.family, p): str(v.dtype) for p, v in state.flat_state()}
  hf_config = dict(checkpoint.hf_config)
  if not getattr(checkpoint.config, "tie_word_embeddings", True):
    hf_config["tie_word_embeddings"] = False  # The tensors may have said so, not config.json.
  metadata = {"format": FORMAT, "hf_config": hf_config, "dtypes": dtypes}
  with _appears_whole(target) as partial:
    save_params(partial, nnx.to_pure_dict(state), metadata)
    for name in TOKENIZER_FILES:
      if (source / name).is_file():
        shutil.copyfile(source / name, partial / name)


def to_huggingface(source: pathlib.Path, target: pathlib.Path) -> None:
  """Writes an Orbax folder of `to_orbax` as a Hugging Face directory, which must not exist.

  Raises:
    UserError: `source` is damaged or was not made by `to_orbax`.
  """
  import jax
  from flax import nnx

  from common.checkpoints import huggingface
  from common.checkpoints.orbax import load_metadata, load_params
  from common.checkpoints.shards import CheckpointWriter
  from common.checkpoints.tensors import bare_names, tensor_name, to_hf

  metadata = load_metadata(source)
  if metadata.get("format") != FORMAT:
    raise UserError(f"{source} was not made by convert; expected an Orbax folder that was")
  hf_config, dtypes = metadata["hf_config"], metadata["dtypes"]
  family = huggingface.find_family(hf_config, source)
  config = huggingface.model_config(family, hf_config, dtypes, source)
  model = huggingface.abstract_model(config)
  state = nnx.state(model)
  stored = {
    path: value.replace(jax.ShapeDtypeStruct(value.shape, dtypes[tensor_name(family, path)]))
    for path, value in state.flat_state()
  }
  params, _ = load_params(source, nnx.to_pure_dict(nnx.State.from_flat_path(stored)))
  nnx.replace_by_pure_dict(state, params)
  nnx.update(model, state)
  with CheckpointWriter(target, hf_config, tokenizer_from=source) as writer:
    writer.add(bare_names(family, hf_config, to_hf(model, config)))


@contextlib.contextmanager
def _appears_whole(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder beside `target` that takes its name when the body is through."""
  partial = target.with_name(f".{target.name}.incomplete-{os.getpid()}")
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    os.rename(partial, target)
  except OSError as e:
    raise UserError(f"cannot write {target}: {e.strerror}") from None
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise UserError(f"unexpected argument {argv[1]!r}; flags are --name=value")
  source, target = (pathlib.Path(f.value).expanduser().absolute() for f in (_FROM, _TO))
  if not source.is_dir():
    raise UserError(f"there is no folder {source}")
  if target.exists() and not _OVERWRITE.value:
    raise UserError(f"{target} exists; choose another folder or add --overwrite")
  if target == source or target in source.parents:
    raise UserError(f"--to={target} would replace --from={source}")
  is_orbax = (source / "metadata.json").is_file() and (source / "params").is_dir()
  if not is_orbax and not (source / "config.json").is_file():
    raise UserError(
      f"{source} is neither a Hugging Face directory (config.json) nor an Orbax folder "
      "(metadata.json, params)"
    )
  cli.prepare_jax()
  convert = to_huggingface if is_orbax else to_orbax
  with _replaces(target):
    convert(source, target)
  print(f"written to {target} ({'Hugging Face' if is_orbax else 'Orbax'})")


@contextlib.contextmanager
def _replaces(target: pathlib.Path) -> Iterator[None]:
  """Puts what is at `target` aside; it comes back if the body fails, and goes if it succeeds."""
  aside = target.with_name(f".{target.name}.replaced-{os.getpid()}")
  existed = target.exists()
  if existed:
    target.rename(aside)
  try:
    yield
  except BaseException:
    if existed:
      aside.rename(target)
    raise
  if existed:
    shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


if __name__ == "__main__":
  cli.run_app(main)
