"""Hardware-aware parallel prompt decoding: what is trained, and on which labels.

m prompt tokens, each an ensemble of e embeddings (EPTs), are the only trained parameters of a frozen
language model. Appended to a text x_1, ..., x_T they take positions T, T + 1, ..., and the logits of
P_i are a guess of the token at distance i + 1, of which the token itself is not known yet. Labels
are the model's own logits along its greedy continuation t_1, ..., t_{m+1} (section 3.1):

  L = 1/m sum_i 0.8^(i-1) KL( p(. | x, t_1, ..., t_i) || p_i(. | x, P_1, ..., P_i) )

The trees are `sparse_tree.py`, decoding is `common.decoding.parallel_prompt`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers

from common.decoding.cache import roll_back, take_rows
from common.decoding.prompt_tokens import PromptTokens, prompt_logits, with_prompt_tokens
from common.decoding.prompt_tree import ChainMask, chain_mask
from common.errors import UserError
from common.models.decoder import Decoder, KVCache

Array = jax.Array

# What the prompt tokens are before training.
INITIAL_TEXT = "Next 2 word"
DECAY = 0.8


def initial_prompts(
  model: Decoder, tokenizer: tokenizers.Tokenizer, distances: int, ensemble: int
) -> PromptTokens:
  """Embeddings of the tokens of `INITIAL_TEXT`, repeated; a plain mean over the ensemble."""
  ids = tokenizer.encode(INITIAL_TEXT, add_special_tokens=False).ids
  table = model.embed_tokens.embedding[...].astype(jnp.float32)
  rows = table[np.resize(ids, distances * ensemble)]
  width = model.config.embedding_dim or model.config.hidden_size
  return PromptTokens(
    embeddings=rows.reshape(distances, ensemble, -1),
    bias=jnp.zeros((distances, ensemble)),
    gate=jnp.zeros((distances, width)),
  )


def random_truncation(
  rng: np.random.Generator, spans: Sequence[tuple[int, int]], distances: int
) -> int:
  """How many tokens of a text are kept, cut in the last answer that is long enough.

  Args:
    rng: of the uniform draw.
    spans: first token and end of every answer of the text, in order.
    distances: m; at least m + 1 tokens of the answer lie behind the cut.

  Raises:
    UserError: no answer has m + 1 tokens.
  """
  for start, end in reversed(spans):
    shortest, longest = max(start, 1), end - distances - 1
    if shortest <= longest:
      return int(rng.integers(shortest, longest, endpoint=True))
  raise UserError(f"no answer of the text has {distances + 1} tokens: leave the text out")


class Prefixes(NamedTuple):
  """Texts up to a cut, one a row.

  Attributes:
    cache: of their tokens, a length for each row and room for what follows.
    hidden: behind the final norm, at the last token, [rows, width].
    positions: int32 [rows], of the next token.
  """

  cache: KVCache
  hidden: Array
  positions: Array


def read_prefixes(
  model: Decoder, tokens: Array, segment_ids: Array, cuts: Array, room: int
) -> Prefixes:
  """Reads every text once, for all prefixes of it.

  Args:
    model: the frozen language model.
    tokens, segment_ids: int32 [texts, seq]; segment 0 is padding, on the left.
    cuts: slots of a text that a prefix keeps, int32 [texts, cuts].
    room: slots to leave for what is appended.

  Returns:
    Of texts * cuts rows, text by text.
  """
  texts, length = tokens.shape
  positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
  dtype = model.embed_tokens.embedding.dtype
  cache = KVCache.empty(model.config, texts, length + room, dtype)
  x, cache = model.run_blocks(tokens, positions, segment_ids, cache)
  rows, ends = jnp.repeat(jnp.arange(texts), cuts.shape[1]), cuts.reshape(-1)
  return Prefixes(
    cache=roll_back(take_rows(cache, rows), ends),
    hidden=model.head_input(x[rows, ends - 1][:, None])[:, 0],
    positions=positions[rows, ends - 1] + 1,
  )


class Rollout(NamedTuple):
  """The model's greedy continuation.

  Attributes:
    tokens: t_1, ..., t_{m+1}, int32 [rows, m + 1].
    logits: that t_2, ..., t_{m+1} are the best of, float32 [rows, m, vocab]: the labels.
  """

  tokens: Array
  logits: Array


def greedy_rollout(model: Decoder, prefixes: Prefixes, distances: int) -> Rollout:
  """The labels of the prompt tokens, from the precision that the model is used in."""
  first = jnp.argmax(model.logits(prefixes.hidden), axis=-1).astype(jnp.int32)

  def step(carry, i):
    cache, token = carry
    positions = (prefixes.positions + i)[:, None]
    logits, cache = model(token[:, None], positions=positions, cache=cache)
    token = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
    return (cache, token), (logits[:, 0], token)

  steps = jnp.arange(distances)
  _, (logits, tokens) = jax.lax.scan(step, (prefixes.cache, first), steps)
  tokens = jnp.concatenate([first[None], tokens]).swapaxes(0, 1)
  return Rollout(tokens, logits.swapaxes(0, 1))


def prompt_guesses(
  model: Decoder, prompt_tokens: PromptTokens, prefixes: Prefixes, kind: ChainMask = "ensemble"
) -> Array:
  """Logits of the prompt tokens behind every prefix, float32 [rows, m, vocab].

  The prefix is in the cache already: it cannot depend on the prompts, and no gradient passes it.

  Args:
    model: the frozen language model.
    prompt_tokens: trained.
    prefixes: with room for m e tokens.
    kind: of the mask among the EPTs.
  """
  distances, ensemble, _ = prompt_tokens.embeddings.shape
  rows, inputs = len(prefixes.positions), distances * ensemble
  prompted = with_prompt_tokens(model, prompt_tokens)
  ids = model.config.vocab_size + jnp.arange(inputs)
  x, _ = prompted.run_blocks(
    jnp.broadcast_to(ids, (rows, inputs)),
    positions=prefixes.positions[:, None] + jnp.arange(inputs) // ensemble,
    cache=prefixes.cache,
    mask=jnp.asarray(chain_mask(distances, ensemble, kind))[None],
  )
  hidden = model.head_input(x)
  hidden = hidden.reshape(rows, distances, ensemble, hidden.shape[-1])
  return prompt_logits(model, prompt_tokens, prefixes.hidden, hidden)


def distillation_loss(labels: Array, logits: Array) -> Array:
  """1/m sum_i 0.8^(i-1) KL(softmax(labels_i) || softmax(logits_i)), nats, float32 [rows].

  Args:
    labels, logits: float32 [rows, m, vocab].
  """
  divergence = optax.losses.kl_divergence_with_log_targets(
    jax.nn.log_softmax(logits), jax.nn.log_softmax(labels)
  )
  return divergence @ _decay(logits.shape[1])


def hard_label_loss(tokens: Array, logits: Array) -> Array:
  """The same with the cross-entropy of the greedy tokens (an ablation), float32 [rows].

  Args:
    tokens: t_2, ..., t_{m+1}, int32 [rows, m].
    logits: float32 [rows, m, vocab].
  """
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
  return nll @ _decay(logits.shape[1])


def _decay(distances: int) -> Array:
  return DECAY ** jnp.arange(distances) / distances
