"""usage: ./run.sh compile --model=NAME --slice=v5p:2x2x4 [flags]

Compiles a step of a decoder for a TPU slice, with no TPU present, and prints whether it fits the
memory, its FLOPs, memory traffic and collectives, and the least time that it can take. Exit code 1
if it does not fit. A paper's own steps: ./run.sh PAPER --config=:paper --compile_only=SLICE.

  --model=NAME        meta-llama/Llama-2-7b-hf, -13b-hf, -70b-hf, meta-llama/Meta-Llama-3-8B, or a
                      Hugging Face directory
  --slice=SLICE       FAMILY:SHAPE; families are v4, v5e, v5p, v6e
  --step=train        train (AdamW, bfloat16 compute, float32 masters, rematerialised blocks),
                      prefill or decode (bfloat16)
  --mesh=fsdp=-1      sizes of the mesh axes data, fsdp, tensor: --mesh=data=2,tensor=8; -1 is the
                      rest
  --batch_size=N      rows over all chips (default: one for each)
  --seq_len=2048      tokens in a row; of decode, the slots of the cache
"""

from absl import flags

from common import cli
from common.errors import UserError

_MODEL = flags.DEFINE_string("model", None, "name or directory", required=True)
_SLICE = flags.DEFINE_string("slice", None, "TPU slice", required=True)
_STEP = flags.DEFINE_enum("step", "train", ["train", "prefill", "decode"], "what to compile")
_MESH = flags.DEFINE_list("mesh", ["fsdp=-1"], "sizes of the mesh axes")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "rows", lower_bound=1)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 2048, "tokens in a row", lower_bound=2)


def main(argv: list[str]) -> int:
  if len(argv) > 1:
    raise UserError(f"unexpected argument {argv[1]!r}; see --help")
  cli.prepare_jax(compile_only=True)
  import jax.numpy as jnp

  from common.compilation import decoder_steps
  from common.compilation.compile_only import compile_for
  from common.models.scan import abstract_stack
  from common.training.mesh import make_mesh, mesh_axes

  axes = mesh_axes(_MESH.value)
  config = decoder_steps.decoder_config(_MODEL.value)

  def steps(devices):
    mesh = make_mesh(axes, devices)
    rows, length = _BATCH_SIZE.value or len(devices), _SEQ_LEN.value
    if _STEP.value == "train":
      return [decoder_steps.training_step(config, mesh, batch_size=rows, seq_len=length)]
    model = abstract_stack(config, jnp.bfloat16)
    new = 1 if _STEP.value == "decode" else length
    options = {"batch_size": rows, "max_length": length, "new_tokens": new}
    return [decoder_steps.decode_step(*model, mesh, **options)]

  return compile_for(_SLICE.value, steps)


if __name__ == "__main__":
  cli.run_app(main)
