"""Neighbours of a text: some words replaced by what a masked language model puts there.

The neighbour attack (Mattern et al. 2023) compares the loss of a text with that of its neighbours.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import nnx

from common.checkpoints.huggingface import Checkpoint
from common.data.tokenizer import load_tokenizer
from common.errors import UserError
from common.evaluation.log_likelihood import bucket_length, whole_batches
from common.models.encoder import Encoder, EncoderConfig
from common.training.loop import train
from common.training.train_step import init_train_state, make_train_step
from projects.min_k_prob.pretraining import epoch_batches

Array = jax.Array


class MaskedLM(NamedTuple):
  """A masked language model.

  Attributes:
    model: an encoder with a "masked_lm" head.
    tokenizer: its tokenizer.
    mask_token: the id that hides a token.
  """

  model: Encoder
  tokenizer: tokenizers.Tokenizer
  mask_token: int


def load_masked_lm(path: str) -> MaskedLM:
  """Loads a Hugging Face directory of BertForMaskedLM or RobertaForMaskedLM.

  Raises:
    UserError: it is no such directory.
  """
  checkpoint = Checkpoint(path)
  if getattr(checkpoint.config, "head", None) != "masked_lm":
    raise UserError(
      f"{path} holds no masked language model: expected BertForMaskedLM or RobertaForMaskedLM"
    )
  tokenizer = load_tokenizer(path)
  mask = next((i for i in map(tokenizer.token_to_id, ("[MASK]", "<mask>")) if i is not None), None)
  if mask is None:
    raise UserError(f"the tokenizer of {path} has no [MASK] or <mask>: is it another model's?")
  return MaskedLM(checkpoint.load_model(), tokenizer, mask)


def masked_logits(
  model: Encoder, tokens: Array, segment_ids: Array, positions: Array | None, places: Array
) -> Array:
  """Logits of some places only: those of all would cost more than the encoder.

  Args:
    model: with a "masked_lm" head.
    tokens, segment_ids, positions: int32 [batch, seq], as of `Encoder.__call__`.
    places: int32 [batch, masked].

  Returns:
    float32 [batch, masked, vocab].
  """
  x, context = model.stem(tokens, segment_ids, positions=positions)
  for block in model.blocks:
    x, _ = block(x, context)
  x = jnp.take_along_axis(x, places[..., None], axis=1)
  return model.lm_head(x, model.embed_tokens).astype(jnp.float32)


def draw_places(key: Array, real: Array, count: int) -> tuple[Array, Array]:
  """`count` different places of every row, real ones first.

  Args:
    key: for the draw.
    real: bool [batch, seq], places that may be drawn.
    count: at most seq.

  Returns:
    places, int32 [batch, count], and whether each is a real one, bool [batch, count].
  """
  noise = jnp.where(real, jax.random.uniform(key, real.shape), -1.0)
  places = jax.lax.top_k(noise, count)[1]
  return places, jnp.take_along_axis(real, places, axis=1)


def train_masked_lm(
  documents: Sequence[Sequence[int]],
  tokenizer: tokenizers.Tokenizer,
  *,
  width: int,
  num_layers: int,
  row_length: int,
  batch_size: int,
  num_steps: int,
  learning_rate: float,
  max_tokens: int,
  seed: int,
  mask_rate: float = 0.15,
) -> MaskedLM:
  """Trains a small BERT on token ids of documents; its mask token is one more than the tokenizer's.

  Args:
    documents: token ids of each.
    tokenizer: theirs.
    width, num_layers: of the encoder.
    row_length, batch_size: of the packed rows that it is trained on.
    num_steps, learning_rate: of Adam with a linear decay to 0.
    max_tokens: rows of the table of positions.
    seed: of parameters, data order and masks.
    mask_rate: share of tokens that are hidden.
  """
  mask_token = tokenizer.get_vocab_size()
  config = EncoderConfig(
    vocab_size=mask_token + 1,
    hidden_size=width,
    intermediate_size=4 * width,
    num_layers=num_layers,
    num_heads=max(2, width // 32),
    max_position_embeddings=max_tokens,
    head="masked_lm",
  )
  graphdef, params = nnx.split(Encoder(config, rngs=nnx.Rngs(seed)))
  masked = max(1, int(mask_rate * row_length))

  def loss_fn(params, batch, key):
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    places, real = draw_places(key, segment_ids != 0, masked)
    targets = jnp.take_along_axis(tokens, places, axis=1)
    hidden = _hide(tokens, places, real, mask_token)
    model = nnx.merge(graphdef, params)
    logits = masked_logits(model, hidden, segment_ids, batch["positions"], places)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(nll, where=real), jnp.sum(real, dtype=jnp.float32)

  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adam(optax.linear_schedule(learning_rate, 0.0, num_steps)),
  )
  state = train(
    init_train_state(params, optimizer, jax.random.key(seed)),
    make_train_step(loss_fn, optimizer),
    epoch_batches(documents, row_length=row_length, batch_size=batch_size, seed=seed),
    num_steps=num_steps,
    description="masked language model",
    quiet=True,
  )
  return MaskedLM(nnx.merge(graphdef, state.params), tokenizer, mask_token)


def _hide(tokens: Array, places: Array, real: Array, mask_token: int) -> Array:
  """Puts the mask token at the real places; all arguments as of `draw_places`."""
  rows = jnp.arange(len(tokens))[:, None]
  old = jnp.take_along_axis(tokens, places, axis=1)
  return tokens.at[rows, places].set(jnp.where(real, mask_token, old))


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def _propose(graphdef, state, rows, allowed, mask_token, key, masked: int, count: int):
  """Places int32 [batch, masked], whether they are real, and draws int32 [batch, count, masked].

  rows: tokens and maskable (1: may be hidden, 2: is read only, 0: padding), int32 [batch, seq], and
  how many tokens of each row to hide, int32 [batch], at most `masked`.
  """
  tokens, maskable, wanted = rows
  choose, draw = jax.random.split(key)
  segment_ids = (maskable != 0).astype(jnp.int32)
  places, real = draw_places(choose, maskable == 1, masked)
  real &= jnp.arange(masked) < wanted[:, None]
  original = jnp.take_along_axis(tokens, places, axis=1)
  hidden = _hide(tokens, places, real, mask_token)
  logits = masked_logits(nnx.merge(graphdef, state), hidden, segment_ids, None, places)
  vocabulary = jnp.arange(logits.shape[-1])
  logits = jnp.where(allowed & (vocabulary != original[..., None]), logits, -jnp.inf)
  draws = jax.random.categorical(draw, logits, shape=(count, *original.shape))
  return places, real, jnp.swapaxes(draws, 0, 1)


def substitutes(masked_lm: MaskedLM) -> np.ndarray:
  """Tokens that may take another's place, bool [vocab]: plain text by themselves, or after a word."""
  tokenizer, size = masked_lm.tokenizer, masked_lm.model.config.vocab_size
  vocabulary = min(tokenizer.get_vocab_size(), size)
  texts = tokenizer.decode_batch([[i] for i in range(vocabulary)])
  special = tokenizer.get_added_tokens_decoder()
  plain = [bool(t.strip()) and "\ufffd" not in t and i not in special for i, t in enumerate(texts)]
  return np.pad(np.array(plain), (0, size - vocabulary))


def neighbours(
  masked_lm: MaskedLM,
  texts: Sequence[str],
  *,
  count: int,
  rate: float,
  key: Array,
  batch_size: int = 8,
) -> list[list[str]]:
  """Replaces tokens by draws from the masked language model.

  A share `rate` of a text's tokens is hidden at once, and each neighbour draws anew for all of them,
  never the original token. White space at the edge of a token and all other text stay as they are.

  Args:
    masked_lm: the masked language model.
    texts: the texts; what is beyond its positions is never replaced.
    count: neighbours of every text.
    rate: share of tokens to replace, at least one.
    key: for places and draws.
    batch_size: texts per forward pass.

  Returns:
    `count` texts for every text.
  """
  model, tokenizer, mask_token = masked_lm
  encodings = tokenizer.encode_batch(list(texts), add_special_tokens=True)
  longest = max(len(e.ids) for e in encodings)
  length = min(bucket_length(longest), model.config.max_position_embeddings)
  tokens, maskable = np.zeros((2, len(texts), length), np.int32)
  allowed = substitutes(masked_lm)
  for i, encoding in enumerate(encodings):
    ids = np.array(encoding.ids[:length])
    tokens[i, : len(ids)] = ids
    # White space and special tokens stay.
    maskable[i, : len(ids)] = np.where(allowed[ids], 1, 2)
  wanted = np.maximum(1, (rate * (maskable == 1).sum(axis=1)).astype(int))
  graphdef, state = nnx.split(model)
  size = min(batch_size, len(texts))
  found = [
    _propose(
      graphdef,
      state,
      (tokens[batch], maskable[batch], wanted[batch]),
      allowed,
      mask_token,
      jax.random.fold_in(key, i),
      max(1, int(rate * length)),
      count,
    )
    for i, batch in enumerate(whole_batches(list(range(len(texts))), size))
  ]
  places, real, draws = (
    np.concatenate(parts)[: len(texts)] for parts in zip(*jax.device_get(found))
  )
  result = []
  for i, text in enumerate(texts):
    kept = np.flatnonzero(real[i])
    spans = [encodings[i].offsets[place] for place in places[i, kept]]
    pieces = [tokenizer.decode_batch([[int(t)] for t in draw[kept]]) for draw in draws[i]]
    result.append([_substitute(text, spans, new) for new in pieces])
  return result


def _substitute(text: str, spans: Sequence[tuple[int, int]], new: Sequence[str]) -> str:
  """Puts `new` at the spans of characters; the white space around the old ones stays."""
  for (start, end), piece in sorted(zip(spans, new), reverse=True):
    old = text[start:end]
    left = old[: len(old) - len(old.lstrip())]
    right = old[len(old.rstrip()) :] if old.strip() else ""
    # WordPiece marks what continues a word.
    piece = piece.strip().removeprefix("##")
    text = text[:start] + left + piece + right + text[end:]
  return text
