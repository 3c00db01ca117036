"""Captions of a batch of images, with a key, a cap and a bias of EOS.

The loop ends as soon as every row has: the cost of a batch is that of its longest caption.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from common.decoding.beam_search import Hypothesis, beam_search
from common.decoding.generation import RowSampling, Sampling, adjust_rows, categorical, fold_in
from common.models.decoder import Decoder, KVCache
from projects.verbose_images.vlm import CaptionModel, embed_prefix, run_embeddings

Array = jax.Array


class EosBias(NamedTuple):
  """Adds slope * max(0, step - start) to the logit of EOS; a slope of 0 changes nothing."""

  slope: float = 0.0
  start: float = 0.0


NO_BIAS = EosBias()


class Captions(NamedTuple):
  """Generated text.

  Attributes:
    tokens: int32 [..., width]; EOS from the end of a row on.
    lengths: int32 [...], tokens before EOS.
    steps: int32 [...], tokens drawn, EOS included where it came before the cap.
    entropy: float32 [..., width], of the model's distribution at each step, nats; 0 behind the end.
    surprise: float32 [..., width], - log p of each token drawn, likewise.
  """

  tokens: Array
  lengths: Array
  steps: Array
  entropy: Array
  surprise: Array


def row_sampling(sampling: Sampling, rows: int) -> RowSampling:
  """The same `Sampling` for every row, as arrays: one program serves all decoding methods."""
  return RowSampling(
    jnp.full(rows, sampling.temperature, jnp.float32),
    jnp.full(rows, sampling.top_k, jnp.int32),
    jnp.full(rows, sampling.top_p, jnp.float32),
  )


def caption_prefixes(
  model: CaptionModel,
  prefix: Array,
  keys: Array,
  sampling: RowSampling,
  cap: Array,
  width: int,
  bias: EosBias,
) -> Captions:
  """Continues prefixes.

  Args:
    model: the model.
    prefix: [batch, num_prefix, width of embeddings].
    keys: one for each row, [batch]; a row's text does not depend on the others.
    sampling: of each row.
    cap: int32 [], tokens at most.
    width: of the arrays; at least the cap.
    bias: of EOS.
  """
  decoder, batch, length = model.decoder, len(prefix), prefix.shape[1]
  cache = KVCache.empty(decoder.config, batch, length + width, prefix.dtype)
  positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
  hidden, cache = run_embeddings(decoder, embed_prefix(decoder, prefix), positions, cache)
  graphdef, state = nnx.split(decoder)
  zeros = jnp.zeros((batch, width), jnp.float32)
  start = (
    jnp.int32(0),
    decoder.head(hidden[-1][:, -1:])[:, 0],
    cache,
    jnp.zeros(batch, bool),
    Captions(
      tokens=jnp.full((batch, width), model.eos, jnp.int32),
      lengths=jnp.zeros(batch, jnp.int32),
      steps=jnp.zeros(batch, jnp.int32),
      entropy=zeros,
      surprise=zeros,
    ),
  )

  def unfinished(loop):
    i, _, _, done, _ = loop
    return (i < cap) & ~jnp.all(done)

  def draw(loop):
    i, logits, cache, done, text = loop
    decoder = nnx.merge(graphdef, state)
    late = bias.slope * jnp.maximum(i - bias.start, 0.0)
    logits = logits.at[:, model.eos].add(late)
    token = categorical(fold_in(keys, i), adjust_rows(logits, sampling))
    token = jnp.where(done, model.eos, token)
    log_p = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    surprise = -jnp.take_along_axis(log_p, token[:, None], axis=-1)[:, 0]
    text = Captions(
      tokens=text.tokens.at[:, i].set(token),
      lengths=text.lengths + (~done & (token != model.eos)),
      steps=text.steps + ~done,
      entropy=text.entropy.at[:, i].set(jnp.where(done, 0, entropy)),
      surprise=text.surprise.at[:, i].set(jnp.where(done, 0, surprise)),
    )
    at = jnp.full((batch, 1), length + i)
    hidden, cache = run_embeddings(decoder, decoder.embed(token[:, None], at), at, cache)
    return i + 1, decoder.head(hidden[-1])[:, 0], cache, done | (token == model.eos), text

  return jax.lax.while_loop(unfinished, draw, start)[-1]


def caption_images(
  model: CaptionModel,
  images: Array,
  keys: Array,
  sampling: RowSampling,
  cap: Array,
  width: int,
  bias: EosBias,
) -> Captions:
  """Several captions of each image, [batch, samples, ...].

  Args:
    images: [batch, height, width, channels].
    keys: [batch, samples].
    sampling: of each caption, row by row, [batch * samples].
    cap, width, bias: see `caption_prefixes`.
  """
  batch, samples = keys.shape
  prefix, _ = model.encode(images)
  rows = jnp.repeat(prefix, samples, axis=0)
  text = caption_prefixes(model, rows, keys.reshape(-1), sampling, cap, width, bias)
  return jax.tree.map(lambda x: x.reshape(batch, samples, *x.shape[1:]), text)


def sample_keys(key: Array, batch: int, samples: int) -> Array:
  """A key for each caption, [batch, samples]."""
  return jax.random.split(key, (batch, samples))


@functools.partial(jax.jit, static_argnums=(0, 6))
def caption_step(graphdef, params, images, keys, sampling, cap, width, bias) -> Captions:
  """`caption_images` of a model that was split, as one program."""
  model = nnx.merge(graphdef, params)
  return caption_images(model, images, keys, sampling, cap, width, bias)


def prefix_decoder(model: CaptionModel, prefix: Array) -> tuple[Decoder, list[list[int]]]:
  """The decoder with every image's prefix as words of its own, and the prompts made of them.

  So the prompt of image i is the words V + i num_prefix, ..., and all of `common.decoding` applies.

  Args:
    prefix: [batch, num_prefix, width].
  """
  decoder = nnx.clone(model.decoder)
  words = decoder.embed_tokens.embedding[...]
  head = nnx.Linear(words.shape[1], len(words), use_bias=False, rngs=nnx.Rngs(0))
  head.kernel = nnx.Param(model.decoder.head_kernel)
  decoder.lm_head = head
  table = jnp.concatenate([words, prefix.reshape(-1, words.shape[1])])
  decoder.embed_tokens = nnx.Embed(len(table), table.shape[1], rngs=nnx.Rngs(0))
  decoder.embed_tokens.embedding[...] = table
  decoder.config = dataclasses.replace(decoder.config, vocab_size=len(table))
  batch, num_prefix, _ = prefix.shape
  ids = len(words) + jnp.arange(batch * num_prefix).reshape(batch, num_prefix)
  return decoder, ids.tolist()


def beam_captions(
  model: CaptionModel, images: Array, *, max_new_tokens: int, num_beams: int
) -> list[Hypothesis]:
  """The best caption of each image by beam search."""
  prefix, _ = model.encode(images)
  decoder, prompts = prefix_decoder(model, prefix)
  found = beam_search(
    decoder,
    prompts,
    max_new_tokens=max_new_tokens,
    num_beams=num_beams,
    stop_tokens=model.eos,
  )
  return [hypotheses[0] for hypotheses in found]
