"""Training, the likelihood bound and a sampling step at the config's size, for a TPU slice."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.compilation.decoder_steps import replicated
from common.compilation.step import Step
from common.models.sharding import batch_sharding, place
from common.training.mesh import make_mesh
from common.training.train_step import TrainState
from projects.radd.network import Denoiser, decoder_config
from projects.radd.radd import sequence_losses
from projects.radd.sampling import DIRECT, draw_tokens
from projects.radd.training import make_step, train_settings

GPT2_TOKENS = 50_257


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """Every device has all parameters, and its share of the rows."""
  mesh = make_mesh({"data": -1}, devices)
  rows_at, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
  vocab_size = GPT2_TOKENS
  sizes = decoder_config(
    vocab_size, config.hidden_size, config.num_layers, config.num_heads, config.seq_len
  )
  model = nnx.eval_shape(lambda: Denoiser(sizes, dropout_rate=config.dropout, rngs=nnx.Rngs(0)))
  graphdef, params = nnx.split(model)
  settings = train_settings(config)
  state = TrainState(
    step=jax.ShapeDtypeStruct((), jnp.int32),
    params=params,
    opt_state=jax.eval_shape(settings.optimizer().init, params),
    key=jax.eval_shape(lambda: jax.random.key(0)),
  )
  state_at = replicated(state, mesh)
  ids = lambda rows: jax.ShapeDtypeStruct((rows, config.seq_len), jnp.int32, sharding=rows_at)
  rows = -(-config.samples // len(devices)) * len(devices)
  key = jax.ShapeDtypeStruct((), state.key.dtype, sharding=whole)
  in_compute_dtype = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(config.compute_dtype), sharding=whole), params
  )

  def score(params, tokens, key):
    network = nnx.merge(graphdef, params)
    without_dropout = lambda noisy, noise, key: network(noisy, noise)
    return sequence_losses("lambda_dce", without_dropout, vocab_size, tokens, key)

  def predict(params, tokens, key):
    log_c = nnx.merge(graphdef, params)(tokens)
    return draw_tokens(log_c, jax.random.split(key, len(tokens)), DIRECT)

  train = make_step(graphdef, "lambda_dce", vocab_size, settings, state_shardings=state_at)
  batch = {"tokens": ids(config.batch_size)}
  shape = f"x {config.seq_len} tokens"
  return [
    Step(f"train, {config.batch_size} {shape}", train, (place(state, state_at), batch)),
    Step(f"bound, {rows} draws {shape}", score, (in_compute_dtype, ids(rows), key)),
    Step(f"sampling step, {rows} {shape}", predict, (in_compute_dtype, ids(rows), key)),
  ]
