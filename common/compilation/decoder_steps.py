"""Steps of a decoder of any size as abstract programs: train, prefill, decode.

Nothing is allocated: parameters, optimizer state and caches are jax.ShapeDtypeStructs that carry
their shardings. A paper's `compile_steps` is made of these and of its own.
"""

import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.checkpoints.huggingface import Checkpoint
from common.compilation.step import Step
from common.errors import UserError
from common.models.base import RECIPES
from common.models.decoder import DecoderConfig
from common.models.llama_sizes import LLAMA_SIZES, MISTRAL_SIZES
from common.models.scan import ScannedDecoder, abstract_stack
from common.models.sharding import PyTree, batch_sharding, cache_shardings, place, shardings
from common.training.losses import next_token_loss
from common.training.optimizer import make_optimizer
from common.training.train_step import TrainState, make_train_step


def decoder_config(name_or_path: str) -> DecoderConfig:
  """The size of a base model, a public Llama or Mistral (nothing is downloaded) or a directory's model.

  Raises:
    UserError: there is no such model, or it is not a decoder.
  """
  if name_or_path in RECIPES:
    return RECIPES[name_or_path].config
  public = LLAMA_SIZES | MISTRAL_SIZES
  if name_or_path in public:
    return public[name_or_path]
  if not pathlib.Path(name_or_path).expanduser().exists():
    known = ", ".join([*public, *RECIPES])
    raise UserError(f"there is no model {name_or_path!r}: give a directory, or one of {known}")
  config = Checkpoint(name_or_path).config
  if not isinstance(config, DecoderConfig):
    raise UserError(f"{name_or_path} holds no decoder, but a model of the family {config.family}")
  return config


def training_step(config: DecoderConfig, mesh: Mesh, *, batch_size: int, seq_len: int) -> Step:
  """AdamW on packed rows: bfloat16 compute, float32 masters, rematerialised blocks."""
  scanned, params = abstract_stack(config)
  # Stacked norms and biases have two axes, so that they must be named.
  optimizer = make_optimizer(
    learning_rate=3e-4, num_steps=1000, weight_decay=0.1, no_decay=("norm", "bias")
  )
  state = TrainState(
    step=jax.ShapeDtypeStruct((), jnp.int32),
    params=params,
    opt_state=jax.eval_shape(optimizer.init, params),
    key=jax.eval_shape(lambda: jax.random.key(0)),
  )
  state = place(state, state_shardings := shardings(state, mesh))

  def loss_fn(params, batch, key):
    del key  # No dropout.
    logits, _ = scanned(
      params, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )
    return next_token_loss(logits, batch["tokens"], batch["segment_ids"])

  function = make_train_step(
    loss_fn, optimizer, compute_dtype=jnp.bfloat16, state_shardings=state_shardings
  )
  batch = {name: _ids(batch_size, seq_len, mesh) for name in ("tokens", "positions", "segment_ids")}
  return Step(f"train, {batch_size} x {seq_len} tokens", function, (state, batch))


def decode_step(
  scanned: ScannedDecoder,
  params: PyTree,
  mesh: Mesh,
  *,
  batch_size: int,
  max_length: int,
  new_tokens: int = 1,
  params_at: PyTree | None = None,
) -> Step:
  """Appends `new_tokens` tokens to every row of a full-size cache, and returns the next ones.

  Args:
    scanned, params: of `abstract_stack`; packed weights are welcome.
    mesh: the parameters and the cache are placed on it.
    batch_size: rows.
    max_length: slots of the cache.
    new_tokens: 1 decodes; `max_length` is the prefill of a whole prompt.
    params_at: the parameters' shardings; by default those of the table of logical axes.
  """
  cache = jax.eval_shape(lambda: scanned.empty_cache(batch_size, max_length, jnp.bfloat16))
  cache_at = cache_shardings(cache, mesh)

  def step(params, cache, tokens):
    logits, cache = scanned(params, tokens, cache=cache)
    return jnp.argmax(logits[:, -1], axis=-1), cache

  name = "decode" if new_tokens == 1 else "prefill"
  return Step(
    f"{name}, {batch_size} x {new_tokens} tokens, cache {max_length}",
    jax.jit(step, donate_argnums=1, out_shardings=(batch_sharding(mesh), cache_at)),
    (
      place(params, shardings(params, mesh) if params_at is None else params_at),
      place(cache, cache_at),
      _ids(batch_size, new_tokens, mesh),
    ),
  )


def scoring_step(
  scanned: ScannedDecoder,
  params: PyTree,
  mesh: Mesh,
  *,
  batch_size: int,
  seq_len: int,
  params_at: PyTree | None = None,
) -> Step:
  """Negative log-likelihood of windows of text, as perplexity needs it.

  Args:
    scanned, params: of `abstract_stack`; packed weights are welcome.
    mesh: the parameters and the windows are placed on it.
    batch_size, seq_len: of the windows.
    params_at: the parameters' shardings; by default those of the table of logical axes.
  """

  def step(params, tokens):
    logits, _ = scanned(params, tokens)
    return next_token_loss(logits, tokens, jnp.ones_like(tokens))

  params = place(params, shardings(params, mesh) if params_at is None else params_at)
  arguments = (params, _ids(batch_size, seq_len, mesh))
  return Step(f"score, {batch_size} x {seq_len} tokens", step, arguments)


def replicated(tree: PyTree, mesh: Mesh) -> PyTree:
  """Shardings that put every array whole on every device: of weights that are small when packed."""
  return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)


def _ids(batch_size: int, seq_len: int, mesh: Mesh) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((batch_size, seq_len), jnp.int32, sharding=batch_sharding(mesh))
