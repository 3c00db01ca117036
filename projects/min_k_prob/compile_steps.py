"""Scoring and continued training at the config's size, compiled for a TPU slice."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.compilation import decoder_steps
from common.compilation.step import Step
from common.models.decoder import DecoderConfig
from common.models.scan import abstract_stack
from common.models.sharding import batch_sharding, place, shardings
from common.training.mesh import make_mesh
from projects.min_k_prob.min_k_prob import mean_of_first

# Public sizes of Pythia and GPT-NeoX, as in those models' config.json.
_NEOX = {
  "norm": "layer",
  "norm_eps": 1e-5,
  "parallel_residual": True,
  "activation": "gelu",
  "gated_mlp": False,
  "qkv_bias": True,
  "attention_out_bias": True,
  "mlp_bias": True,
  "max_position_embeddings": 2048,
  "family": "gpt_neox",
}
NEOX_SIZES = {
  "EleutherAI/pythia-2.8b": DecoderConfig(
    vocab_size=50304,
    hidden_size=2560,
    intermediate_size=10240,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=80,
    rotary_dim=20,
    **_NEOX,
  ),
  "EleutherAI/gpt-neox-20b": DecoderConfig(
    vocab_size=50432,
    hidden_size=6144,
    intermediate_size=24576,
    num_layers=44,
    num_heads=64,
    num_kv_heads=64,
    head_dim=96,
    rotary_dim=24,
    **_NEOX,
  ),
}
# Texts at once, and tokens of each: 256 words of WikiMIA are up to 512.
TEXTS, TOKENS = 8, 512


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """Min-K% Prob of texts, and a step of the training that contaminates a model."""
  size = NEOX_SIZES.get(config.model) or decoder_steps.decoder_config(config.model)
  tensor = next(n for n in (4, 2, 1) if len(devices) % n == 0 and size.num_kv_heads % n == 0)
  mesh = make_mesh({"data": -1, "tensor": tensor}, devices)
  rows = -(-TEXTS // len(devices)) * len(devices)
  sharded = make_mesh({"fsdp": -1}, devices)
  return [
    score_step(config, size, mesh, rows),
    decoder_steps.training_step(size, sharded, batch_size=rows, seq_len=TOKENS),
  ]


def score_step(config: ConfigDict, size: DecoderConfig, mesh: Mesh, rows: int) -> Step:
  """Token log-probabilities of padded texts, and the mean of the smallest of each."""
  scanned, params = abstract_stack(size, jnp.dtype(config.dtype))

  def step(params, tokens, targets, num_tokens, sizes):
    segment_ids = (jnp.arange(tokens.shape[1]) < num_tokens[:, None]).astype(jnp.int32)
    logits, _ = scanned(params, tokens, segment_ids=segment_ids)
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    log_probs = picked - jax.nn.logsumexp(logits, axis=-1)
    return log_probs, mean_of_first(log_probs, log_probs, num_tokens, sizes)

  ids = jax.ShapeDtypeStruct((rows, TOKENS), jnp.int32, sharding=batch_sharding(mesh))
  counts = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
  params = place(params, shardings(params, mesh))
  return Step(f"Min-K% Prob of {rows} x {TOKENS} tokens", step, (params, ids, ids, counts, counts))
