"""usage: ./run.sh parity DIR [--tolerance=1e-4]

Compares checkpoints with the outputs that another implementation gave for them.

Every folder at or below DIR that holds config.json, the weights and reference.npz is loaded and
run on the inputs stored in reference.npz, each under the name that transformers gives it:

  inputs    input_ids, attention_mask, token_type_ids, decoder_input_ids, decoder_attention_mask,
            or pixel_values [batch, channels, height, width]
  outputs   logits, last_hidden_state, pooler_output, or embeddings (the L2-normalised mean of the
            last hidden state over the tokens that are not padding)

The table shows the greatest absolute difference over the outputs' unpadded positions. The exit
code is 1 if a difference exceeds the tolerance or a folder cannot be loaded.

  --tolerance=1e-4   greatest difference that passes
"""

import dataclasses
import pathlib

from absl import flags

from common import cli
from common.errors import UserError

_TOLERANCE = flags.DEFINE_float("tolerance", 1e-4, "greatest difference that passes", lower_bound=0)

INPUTS = (
  "input_ids",
  "attention_mask",
  "token_type_ids",
  "decoder_input_ids",
  "decoder_attention_mask",
  "pixel_values",
)
OUTPUTS = ("logits", "last_hidden_state", "pooler_output", "embeddings")


@dataclasses.dataclass(frozen=True)
class Result:
  """One folder's outcome: the greatest difference, or why there is none."""

  folder: pathlib.Path
  architecture: str
  difference: float | None = None
  error: str = ""

  def passes(self, tolerance: float) -> bool:
    return self.difference is not None and self.difference <= tolerance


def find_folders(root: pathlib.Path) -> list[pathlib.Path]:
  """Folders at or below `root` with a config.json and a reference.npz, sorted.

  Raises:
    UserError: `root` is no folder, or there are none.
  """
  if not root.is_dir():
    raise UserError(f"there is no folder {root}")
  folders = [p.parent for p in root.rglob("reference.npz") if (p.parent / "config.json").is_file()]
  if not folders:
    raise UserError(f"nothing to compare in {root}: no folder holds config.json and reference.npz")
  return sorted(folders)


def compare(folder: pathlib.Path) -> Result:
  """Loads one checkpoint and compares its outputs with the stored ones."""
  from common.checkpoints.huggingface import Checkpoint, read_config

  architecture = ""
  try:
    config = read_config(folder)
    architecture = (config.get("architectures") or [config.get("model_type", "")])[0]
    reference = read_reference(folder / "reference.npz")
    checkpoint = Checkpoint(folder)
    outputs = run_model(checkpoint.load_model(), checkpoint.family.model, reference)
    return Result(folder, architecture, difference(outputs, reference))
  except UserError as e:
    return Result(folder, architecture, error=str(e).removeprefix(f"{folder}: "))


def read_reference(path: pathlib.Path) -> dict:
  """The arrays of a reference.npz that are known here, {name: numpy array}.

  Raises:
    UserError: it is damaged, or lacks inputs or outputs.
  """
  import zipfile

  import numpy as np

  try:
    with np.load(path) as file:
      arrays = {name: file[name] for name in (*INPUTS, *OUTPUTS) if name in file}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
    raise UserError(f"{path} is damaged or not an .npz file: {e}") from None
  for kind, names in (("input", INPUTS), ("output", OUTPUTS)):
    if not any(name in arrays for name in names):
      raise UserError(f"{path} has no {kind}; expected one of {', '.join(names)}")
  return arrays


def run_model(model, kind: type, reference: dict) -> dict:
  """Runs a model on the inputs of `reference`; returns its outputs by transformers' names.

  Raises:
    UserError: the inputs are not those of this kind of model, or do not fit it.
  """
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from common.models.decoder import Decoder
  from common.models.encoder import Encoder, sentence_embeddings
  from common.models.encoder_decoder import EncoderDecoder

  def need(name):
    if name not in reference:
      raise UserError(f"reference.npz has no {name}, which a {kind.__name__} needs")
    return jnp.asarray(reference[name])

  def optional(name):
    value = reference.get(name)
    return None if value is None else jnp.asarray(value, jnp.int32)

  mask = optional("attention_mask")
  graphdef, state = nnx.split(model)
  if kind is Decoder:
    tokens = need("input_ids").astype(jnp.int32)
    positions = decoder_positions(model.config, mask)
    run = lambda model: decoder_outputs(model, tokens, positions, mask)
  elif kind is EncoderDecoder:
    tokens, target = (need(k).astype(jnp.int32) for k in ("input_ids", "decoder_input_ids"))
    masks = {"segment_ids": mask, "target_segment_ids": optional("decoder_attention_mask")}
    run = lambda model: {"logits": model(tokens, target, **masks)}
  else:

    def run(model):
      if kind is Encoder:
        tokens, types = need("input_ids").astype(jnp.int32), optional("token_type_ids")
        out = model(tokens, segment_ids=mask, token_types=types)
        segments = jnp.ones_like(tokens) if mask is None else mask
        outputs = {"embeddings": sentence_embeddings(out.hidden, segments)}
        hidden = out.hidden
      else:
        out, outputs = model(need("pixel_values").transpose(0, 2, 3, 1)), {}
        # A ResNet's features are [batch, height, width, channels].
        hidden = jnp.moveaxis(out.hidden, -1, 1) if out.hidden.ndim == 4 else out.hidden
      named = {"logits": out.logits, "last_hidden_state": hidden, "pooler_output": out.pooled}
      return outputs | {name: value for name, value in named.items() if value is not None}

  # Accelerators multiply float32 in fewer bits by default.
  with jax.default_matmul_precision("highest"):
    try:
      return jax.jit(lambda state: run(nnx.merge(graphdef, state)))(state)
    except (ValueError, TypeError) as e:
      raise UserError(f"the inputs of reference.npz do not fit the model: {e}") from None


def decoder_positions(config, mask):
  """Positions as transformers derives them: from the mask for OPT and BLOOM, else 0, 1, 2, ..."""
  import jax.numpy as jnp

  if mask is None or config.family not in ("opt", "bloom"):
    return None
  return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)


def decoder_outputs(model, tokens, positions, mask) -> dict:
  """Logits and last hidden state of a `Decoder`."""
  import jax.numpy as jnp

  if positions is None:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  context, _ = model.context(positions, jnp.ones_like(tokens))
  if mask is not None:
    # transformers counts padding into the length that dynamic RoPE scaling depends on.
    context = model.context(positions, mask)[0]._replace(rope=context.rope)
  x = model.embed(tokens, positions)
  for block in model.blocks:
    x, _ = block(x, context)
  logits = model.head(x)
  for layer in (model.final_norm, model.project_out):
    x = x if layer is None else layer(x)
  return {"logits": logits, "last_hidden_state": x}


def difference(outputs: dict, reference: dict) -> float:
  """Greatest absolute difference over the stored outputs' unpadded positions.

  Raises:
    UserError: the model does not give a stored output, or of another shape.
  """
  import numpy as np

  mask = "decoder_attention_mask" if "decoder_input_ids" in reference else "attention_mask"
  ids = reference.get("decoder_input_ids", reference.get("input_ids"))
  greatest = 0.0
  for name in OUTPUTS:
    if name not in reference:
      continue
    if name not in outputs:
      raise UserError(f"the model gives no {name}; it gives {', '.join(outputs)}")
    ours, theirs = np.asarray(outputs[name]), reference[name]
    if ours.size != theirs.size or ours.shape[:2] != theirs.shape[:2]:
      raise UserError(f"{name} is {ours.shape} here and {theirs.shape} in reference.npz")
    distance = np.abs(ours.reshape(theirs.shape) - theirs)
    per_token = ids is not None and distance.ndim == 3 and distance.shape[:2] == ids.shape
    if per_token and mask in reference:
      distance = distance[reference[mask] != 0]
    # A NaN is the greatest difference of all.
    greatest = max(greatest, float(np.nan_to_num(distance, nan=np.inf).max(initial=0)))
  return greatest


def main(argv: list[str]) -> int:
  if len(argv) != 2:
    raise UserError("parity takes one argument, the folder: ./run.sh parity DIR")
  tolerance = _TOLERANCE.value
  root = pathlib.Path(argv[1]).expanduser()
  folders = find_folders(root)
  cli.prepare_jax()
  from rich.console import Console
  from rich.markup import escape
  from rich.table import Table

  results = [compare(folder) for folder in folders]
  table = Table("folder", "architecture", "max difference", f"within {tolerance:g}")
  for result in results:
    name = str(result.folder.relative_to(root)) if result.folder != root else root.name
    name = escape(name)
    if result.difference is None:
      table.add_row(name, result.architecture, "", f"[red]FAIL[/red] {escape(result.error)}")
    else:
      verdict = "[green]ok[/green]" if result.passes(tolerance) else "[red]FAIL[/red]"
      table.add_row(name, result.architecture, f"{result.difference:.2e}", verdict)
  Console().print(table)
  failed = sum(not result.passes(tolerance) for result in results)
  print(f"{len(results) - failed} of {len(results)} within {tolerance:g}")
  return 1 if failed else 0


if __name__ == "__main__":
  cli.run_app(main)
