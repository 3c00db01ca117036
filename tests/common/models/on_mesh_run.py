"""Checkpoints loaded onto a mesh of four virtual devices, and computed with, for the tests.

python -m tests.common.models.on_mesh_run FOLDER
"""

import pathlib
import sys

import jax
import numpy as np
from flax import nnx

from common.checkpoints.huggingface import Checkpoint
from common.quantization.calibration import quantize_model, rtn_block
from common.quantization.checkpoint import quantize_checkpoint
from common.quantization.quantized_array import IntegerFormat
from common.training.mesh import make_mesh
from tests.common.models.small_decoders import random_tokens

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "hf_checkpoints"
FORMAT = IntegerFormat(4, 16)


def rtn(index, block, x, context):
  return rtn_block(block, FORMAT)


def run(model: nnx.Module, tokens: np.ndarray) -> np.ndarray:
  """Logits or hidden states."""
  out = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
  return np.asarray(out[0] if isinstance(out, tuple) else out)


def check(path, name: str, shape: tuple[int, ...]) -> None:
  """Compares a model on the mesh with itself on one device.

  Args:
    path: of the checkpoint.
    name: of an array that is cut.
    shape: of a device's part of it.
  """
  checkpoint = Checkpoint(path)
  model = checkpoint.load_model()
  tokens = np.asarray(random_tokens(checkpoint.config, 4))
  expected = run(model, tokens)
  with jax.set_mesh(make_mesh({"fsdp": 2, "tensor": -1})):
    cut = checkpoint.load_model()
    arrays = dict(jax.tree.leaves_with_path(nnx.state(cut)))
    arrays = {jax.tree_util.keystr(k, simple=True, separator="."): x for k, x in arrays.items()}
    assert arrays[name].addressable_shards[0].data.shape == shape, arrays[name].sharding
    assert all(len(x.sharding.device_set) == 4 for x in arrays.values())
    # Sums over the parts of inputs, in another order.
    np.testing.assert_allclose(run(cut, tokens), expected, rtol=1e-4, atol=1e-5)
    if path == GOLDEN / "llama":
      again = quantize_model(cut, tokens, rtn, stream="full_precision")
      one = quantize_model(model, tokens, rtn, stream="full_precision")
      for a, b in zip(jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(one))):
        np.testing.assert_array_equal(a, b)


def main(folder: str) -> None:
  q_proj = "blocks.0.attention.q_proj"
  packed = pathlib.Path(folder) / "packed"
  source = Checkpoint(GOLDEN / "llama")
  quantize_checkpoint(
    source, packed, random_tokens(source.config, 4), rtn, settings={"method": "rtn"}
  )
  check(GOLDEN / "llama", f"{q_proj}.kernel.value", (32, 32))
  check(packed, f"{q_proj}.weight.value.values", (32, 32))
  check(GOLDEN / "opt", f"{q_proj}.kernel.value", (32, 32))
  check(GOLDEN / "bert_model", f"{q_proj}.kernel.value", (8, 8))
  print("all agree")


if __name__ == "__main__":
  main(*sys.argv[1:])
