"""What the cascade's models write, with token log-probabilities and embeddings.

Works for encoder-decoders and decoders. Prompts are left-padded to one length; an output has
`tokens` slots, of which the stop token, if it came, is the last that counts.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.decoding.generation import is_stop, prepare, start, step
from common.models.decoder import Decoder
from common.models.encoder_decoder import EncoderDecoder

Array = jax.Array
Model = Decoder | EncoderDecoder


class Outputs(NamedTuple):
  """Texts of one model.

  Attributes:
    tokens: int32 [n, tokens]; the stop token fills the slots behind the output.
    log_probs: float32 [n, tokens], log p(token | prompt, tokens before), in nats.
    entropies: float32 [n, tokens], of the distribution that each token was chosen from, in nats.
    mask: bool [n, tokens], tokens of the output and the stop token that ends it.
  """

  tokens: np.ndarray
  log_probs: np.ndarray
  entropies: np.ndarray
  mask: np.ndarray

  def take(self, rows: np.ndarray) -> "Outputs":
    """The outputs of some rows, int [m] or bool [n]."""
    return Outputs(*(x[rows] for x in self))

  def texts(self, stop_token: int) -> list[list[int]]:
    """Token ids of every output, without the stop token."""
    kept = self.mask & (self.tokens != stop_token)
    return [row[keep].tolist() for row, keep in zip(self.tokens, kept)]


def scored_mask(outputs: Outputs, stop_token: int, *, include_eos: bool = True) -> np.ndarray:
  """Tokens whose log-probabilities a rule sees, bool [n, tokens].

  Without the stop token an empty output would have nothing to score: there it stays.
  """
  if include_eos:
    return outputs.mask
  without = outputs.mask & (outputs.tokens != stop_token)
  return np.where(without.any(axis=1, keepdims=True), without, outputs.mask)


def greedy_decode(
  model: Model,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  stop_token: int,
  batch_size: int,
) -> Outputs:
  """Greedy outputs with the log-probabilities of their tokens, from cached decoding.

  Args:
    model: any decoder or encoder-decoder.
    prompts: token ids; the sources of an encoder-decoder.
    max_new_tokens: slots of an output, the stop token's included.
    stop_token: ends an output.
    batch_size: rows that are decoded together.

  Raises:
    UserError: what `common.decoding.generation.prepare` raises.
  """
  tokens, segment_ids, stop = prepare(model, prompts, max_new_tokens, stop_token)
  graphdef, state = nnx.split(model)
  run = lambda *rows: decode_rows(graphdef, state, *rows, stop, max_new_tokens)
  return Outputs(*in_batches(run, (tokens, segment_ids), batch_size))


@functools.partial(jax.jit, static_argnums=(0, 5))
def decode_rows(graphdef, state, tokens, segment_ids, stop, max_new_tokens):
  """`Outputs` of left-padded prompts. tokens, segment_ids: int32 [batch, seq]; stop: int32 [1]."""
  batch = len(tokens)
  logits, progress = start(nnx.merge(graphdef, state), tokens, segment_ids, max_new_tokens)
  slots = (batch, max_new_tokens)
  empty = Outputs(
    jnp.full(slots, stop[0], jnp.int32),
    jnp.zeros(slots, jnp.float32),
    jnp.zeros(slots, jnp.float32),
    jnp.zeros(slots, bool),
  )

  def unfinished(loop):
    i, _, _, _, done = loop
    return (i < max_new_tokens) & ~jnp.all(done)

  def decode(loop):
    i, outputs, logits, progress, done = loop
    token = jnp.where(done, stop[0], jnp.argmax(logits, axis=-1).astype(jnp.int32))
    log_probs, entropies = _log_probs_and_entropies(logits, token)
    new = (token, log_probs, entropies, ~done)
    outputs = Outputs(*(old.at[:, i].set(x) for old, x in zip(outputs, new)))
    logits, progress = step(nnx.merge(graphdef, state), progress, token)
    return i + 1, outputs, logits, progress, done | is_stop(token, stop)

  loop = (0, empty, logits, progress, jnp.zeros(batch, bool))
  return tuple(jax.lax.while_loop(unfinished, decode, loop)[1])


def rescore(
  model: Model,
  prompts: Sequence[Sequence[int]],
  outputs: Outputs,
  *,
  stop_token: int,
  batch_size: int,
) -> tuple[Outputs, np.ndarray]:
  """Teacher-forced log-probabilities of given outputs, and the embedding phi of Post-Hoc-Embed-1.

  Args:
    model: whose probabilities are asked for.
    prompts: that the outputs continue.
    outputs: only `tokens` and `mask` are read.

  Returns:
    The same outputs with this model's numbers, and the final-layer decoder states (after the final
    norm), averaged over the tokens of `mask`, float32 [n, dim].
  """
  tokens, segment_ids, _ = prepare(model, prompts, outputs.tokens.shape[1], stop_token)
  graphdef, state = nnx.split(model)
  arrays = (tokens, segment_ids, outputs.tokens, outputs.mask)
  run = lambda *rows: teacher_forced(graphdef, state, *rows)
  log_probs, entropies, embedding = in_batches(run, arrays, batch_size)
  return outputs._replace(log_probs=log_probs, entropies=entropies), embedding


@functools.partial(jax.jit, static_argnums=0)
def teacher_forced(graphdef, state, tokens, segment_ids, target, mask):
  """Log-probabilities, entropies [batch, target] and the mean decoder state [batch, dim].

  Args:
    tokens, segment_ids: int32 [batch, seq], left-padded prompts.
    target: int32 [batch, target], the outputs.
    mask: bool [batch, target], the tokens that count.
  """
  model = nnx.merge(graphdef, state)
  if isinstance(model, EncoderDecoder):
    inputs = _shift_right(target, model.config.decoder_start_token_id)
    logits = model(tokens, inputs, segment_ids=segment_ids)
  else:
    inputs, positions, segments = _with_prompt(tokens, segment_ids, target)
    logits, _ = model(inputs, positions=positions, segment_ids=segments)
    logits = logits[:, -target.shape[1] :]
  log_probs, entropies = _log_probs_and_entropies(logits, target)
  # A second pass as the code reads; XLA sees that both share all but the head.
  states = decoder_states(graphdef, state, tokens, segment_ids, target)
  embedding = jnp.mean(states, axis=1, where=mask[..., None])
  zero = lambda x: jnp.where(mask, x, 0.0)
  return zero(log_probs), zero(entropies), embedding


def intermediate_embedding(
  model: Model, prompts: Sequence[Sequence[int]], *, num_layers: int, stop_token: int, batch_size
) -> np.ndarray:
  """The large model's part of Post-Hoc-Embed-1+2, float32 [n, dim].

  The state after its first `num_layers` decoder layers at the first decoder position (for a
  decoder, at the prompt's last token): no later layer and no later token has to be run.
  """
  tokens, segment_ids, _ = prepare(model, prompts, 1, stop_token)
  graphdef, state = nnx.split(model)
  run = lambda *rows: (first_state(graphdef, state, *rows, num_layers),)
  return in_batches(run, (tokens, segment_ids), batch_size)[0]


@functools.partial(jax.jit, static_argnums=(0, 4))
def first_state(graphdef, state, tokens, segment_ids, num_layers):
  target = jnp.zeros((len(tokens), 1), jnp.int32)  # Its one token is predicted, never read.
  return decoder_states(graphdef, state, tokens, segment_ids, target, num_layers)[:, 0]


def decoder_states(
  graphdef: nnx.GraphDef,
  state: nnx.State,
  tokens: Array,
  segment_ids: Array,
  target: Array,
  num_layers: int | None = None,
) -> Array:
  """What each token of `target` is predicted from, float32 [batch, target, dim].

  Args:
    graphdef, state: of the model.
    tokens, segment_ids: int32 [batch, seq], left-padded prompts.
    target: int32 [batch, target].
    num_layers: decoder layers to run, None for all; the final norm follows the last of them.
  """
  model = nnx.merge(graphdef, state)  # A copy whose layers may be cut off.
  if isinstance(model, EncoderDecoder):
    model.decoder.blocks = nnx.List(list(model.decoder.blocks)[:num_layers])
    inputs = _shift_right(target, model.config.decoder_start_token_id)
    cache = model.start(tokens, segment_ids=segment_ids, max_length=target.shape[1])
    # The head becomes the identity: what `decode` returns is its input.
    model.lm_head = _identity
    states = model.decode(inputs, cache)[0]
    return states * (model.config.hidden_size**0.5 if model.config.scale_output else 1.0)
  model.blocks = nnx.List(list(model.blocks)[:num_layers])
  inputs, positions, segments = _with_prompt(tokens, segment_ids, target)
  x, _ = model.run_blocks(inputs, positions, segments)
  return model.head_input(x)[:, -target.shape[1] :].astype(jnp.float32)


def in_batches(
  run: Callable[..., Sequence[Array]], arrays: Sequence[np.ndarray], batch_size: int
) -> list[np.ndarray]:
  """Runs rows in batches of one size, the last filled with its last row; results joined."""
  n = len(arrays[0])
  batch_size = min(batch_size, n)
  fill = -n % batch_size
  padded = [np.concatenate([a, np.repeat(a[-1:], fill, axis=0)]) for a in arrays]
  results = [run(*(a[i : i + batch_size] for a in padded)) for i in range(0, n, batch_size)]
  # Read back last: until then the device is never waited for.
  return [np.concatenate([np.asarray(x) for x in column])[:n] for column in zip(*results)]


def _log_probs_and_entropies(logits: Array, tokens: Array) -> tuple[Array, Array]:
  """Of [..., vocab] logits and [...] tokens: both float32 [...], in nats."""
  log_p = jax.nn.log_softmax(logits)
  picked = jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
  return picked, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def _shift_right(target: Array, first: int) -> Array:
  """The decoder's input: the start token, then all of `target` but its last token."""
  return jnp.pad(target[:, :-1], ((0, 0), (1, 0)), constant_values=first)


def _with_prompt(tokens: Array, segment_ids: Array, target: Array) -> tuple[Array, Array, Array]:
  """A decoder's inputs, positions and segment ids, int32 [batch, seq + target - 1]."""
  inputs = jnp.concatenate([tokens, target[:, :-1]], axis=1)
  segments = jnp.pad(segment_ids, ((0, 0), (0, target.shape[1] - 1)), constant_values=1)
  return inputs, jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0), segments


def _identity(x: Array) -> Array:
  return x
