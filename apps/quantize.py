"""usage: ./run.sh quantize --model=DIR --out=DIR [flags]

Quantizes a Hugging Face checkpoint into a packed one, one block at a time: memory holds one block
and the calibration activations, however deep the model. A run that was killed goes on where it was
when it is started again. 4-bit weights of awq, gptq, flexround and rtn are in AutoAWQ's layout;
other results are in a layout of ours, which every command here reads.

  --model=DIR           full-precision checkpoint (config.json, safetensors, tokenizer.json)
  --out=DIR             directory to create; it appears only when complete
  --method=awq          rtn, smoothquant, gptq, awq, flexround, adadim, vptq, llm_fp4, zeroquant_v2,
                        outlier_suppression_plus, qllm or flatquant (ofq trains vision transformers:
                        ./run.sh ofq)
  --bits=4              of the weights: 2, 3, 4 or 8; llm_fp4: 4, 6 or 8
  --group_size=128      weights along the input that share a scale; -1 for all (vptq, llm_fp4: none)
  --activation_bits=16  of the linears' inputs, one scale per token; 16 leaves them alone.
                        For rtn, smoothquant, llm_fp4, zeroquant_v2, outlier_suppression_plus,
                        qllm and flatquant
  --symmetric           weights and activations without zero points: at 4, 6 and 8 bits
                        ./run.sh serve multiplies integers then (flatquant: always)
  --kv_bits=16          of flatquant's keys and values, one scale per token and head
  --calibration=SOURCE  calibration text (default: embedded:prose; see common/data/sources.py)
  --num_samples=128     calibration sequences
  --seq_len=512         tokens in each
  --sample_memory=device
                        where the activations between two blocks lie: on the chip, or in the host's
                        memory (pinned_host), from where a few samples at a time come to the chip (for
                        outlier_suppression_plus and qllm all samples, one block at a time); the
                        result is the same
  --mesh=fsdp=-1        sizes of the mesh axes data, fsdp, tensor: cuts the blocks over the devices of
                        this machine (default: one device)
  --seed=42             of the calibration draw, of batches and of starts
  --search=FILE         AWQ's search result: read if the file exists, else searched and written
  --steps=0             FlexRound's and FlatQuant's per block; 0 takes the papers', 5000 and 480
  --learning_rate=3e-3  FlexRound's
  --epochs=10           QLLM's per block
  --rank=8              of zeroquant_v2's compensation and qllm's correction; 0 leaves them out
  --vector_length=0     VPTQ's; 0 takes 12-bit indices, as the paper; small models need smaller ones
  --overwrite           replace --out if it exists, and what another run left unfinished
"""

import dataclasses

from absl import flags

from common import cli
from common.errors import UserError

_MODEL = flags.DEFINE_string("model", None, "full-precision checkpoint", required=True)
_OUT = flags.DEFINE_string("out", None, "directory to create", required=True)
_METHOD = flags.DEFINE_string("method", "awq", "method")
_BITS = flags.DEFINE_integer("bits", 4, "of the weights")
_GROUP_SIZE = flags.DEFINE_integer("group_size", 128, "weights that share a scale")
_ACTIVATION_BITS = flags.DEFINE_integer("activation_bits", 16, "of the linears' inputs")
_SYMMETRIC = flags.DEFINE_bool("symmetric", False, "no zero points")
_KV_BITS = flags.DEFINE_integer("kv_bits", 16, "of keys and values")
_CALIBRATION = flags.DEFINE_string("calibration", "embedded:prose", "calibration text")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 128, "calibration sequences", lower_bound=1)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 512, "tokens in each sequence", lower_bound=2)
_SAMPLE_MEMORY = flags.DEFINE_string("sample_memory", "device", "device or pinned_host")
_MESH = flags.DEFINE_list("mesh", None, "sizes of the mesh axes")
_SEED = flags.DEFINE_integer("seed", 42, "of the calibration draw, of batches and of starts")
_SEARCH = flags.DEFINE_string("search", None, "AWQ's search result")
_STEPS = flags.DEFINE_integer("steps", 0, "FlexRound's and FlatQuant's", lower_bound=0)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 3e-3, "FlexRound's")
_EPOCHS = flags.DEFINE_integer("epochs", 10, "QLLM's per block", lower_bound=1)
_RANK = flags.DEFINE_integer("rank", 8, "ZeroQuant-V2's and QLLM's", lower_bound=0)
_VECTOR_LENGTH = flags.DEFINE_integer("vector_length", 0, "VPTQ's", lower_bound=0)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace --out")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise UserError(f"unexpected argument {argv[1]!r}; flags are --name=value")
  if _SEARCH.value and _METHOD.value != "awq":
    raise UserError(f"--search belongs to --method=awq, not {_METHOD.value}")
  cli.prepare_jax()
  with cli.on_mesh(_MESH.value):
    quantize()
  print(f"written to {_OUT.value}")


def quantize() -> None:
  """Writes the checkpoint that the flags describe."""
  import jax.numpy as jnp
  from rich.progress import track

  from apps.quantization.methods import Options, make_method
  from common.checkpoints.huggingface import Checkpoint
  from common.data.pipelines import calibration_samples
  from common.data.tokenizer import load_tokenizer
  from common.quantization.checkpoint import quantize_checkpoint
  from common.quantization.reconstruction import check_sample_memory

  check_sample_memory(_SAMPLE_MEMORY.value)
  source = Checkpoint(_MODEL.value)
  source.require_decoder()
  options = Options(
    bits=_BITS.value,
    group_size=_GROUP_SIZE.value,
    activation_bits=_ACTIVATION_BITS.value,
    symmetric=_SYMMETRIC.value,
    kv_bits=_KV_BITS.value,
    seed=_SEED.value,
    steps=_STEPS.value,
    learning_rate=_LEARNING_RATE.value,
    epochs=_EPOCHS.value,
    rank=_RANK.value,
    vector_length=_VECTOR_LENGTH.value,
    search=_SEARCH.value,
  )
  method = make_method(_METHOD.value, source.config, options)
  tokens = calibration_samples(
    _CALIBRATION.value,
    load_tokenizer(_MODEL.value),
    num_samples=_NUM_SAMPLES.value,
    seq_len=_SEQ_LEN.value,
    seed=_SEED.value,
  )
  quantize_checkpoint(
    source,
    _OUT.value,
    jnp.asarray(tokens),
    method.quantize_block,
    settings={"method": _METHOD.value} | dataclasses.asdict(options),
    format=options.weights if method.plain else None,
    stream=method.stream,
    sample_memory=_SAMPLE_MEMORY.value,
    overwrite=_OVERWRITE.value,
    track=lambda blocks: track(blocks, "blocks", total=source.config.num_layers),
  )
  method.finish()


if __name__ == "__main__":
  cli.run_app(main)
