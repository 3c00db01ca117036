"""A small vision-language model: patch encoder, prefix projector, causal decoder.

An image becomes `num_prefix` embeddings which stand before the caption, as in BLIP-2 and its kin;
there is no prompt. Images are float32 [batch, height, width, channels] in [0, 1]: normalisation is
part of the model, so that perturbations are bounded in pixels.

What the attacks, generation and measurements need of a model is `CaptionModel`.
"""

import pathlib
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from common.checkpoints.huggingface import Checkpoint, load_decoder, read_config
from common.errors import UserError
from common.models.attention import merge_heads, split_heads
from common.models.decoder import Decoder, DecoderConfig, KVCache
from common.models.vit import VisionTransformer, VisionTransformerConfig
from kernels.attention.api import attention

Array = jax.Array


class CaptionModel(Protocol):
  """A model that captions images, as the rest of the project sees it; an NNX module.

  Attributes:
    decoder: continues a prefix of embeddings.
    num_prefix: embeddings of an image.
    eos: the token that ends a caption.
  """

  decoder: Decoder
  num_prefix: int
  eos: int

  def encode(self, images: Array) -> tuple[Array, list[Array]]:
    """Images -> the prefix [batch, num_prefix, width], and each layer's activations [batch, ...]."""


class PrefixProjector(nnx.Module):
  """Learned queries attend to the patches; a linear layer takes them to the decoder's width."""

  def __init__(
    self, vision_width: int, num_heads: int, num_prefix: int, width: int, *, rngs: nnx.Rngs
  ):
    self.head_dim = vision_width // num_heads
    self.queries = nnx.Param(rngs.params.normal((num_prefix, vision_width)))
    self.k_proj = nnx.Linear(vision_width, vision_width, rngs=rngs)
    self.v_proj = nnx.Linear(vision_width, vision_width, rngs=rngs)
    self.o_proj = nnx.Linear(vision_width, width, rngs=rngs)

  def __call__(self, features: Array) -> Array:
    """[batch, patches, vision_width] -> [batch, num_prefix, width]."""
    queries = jnp.broadcast_to(self.queries[...], (len(features), *self.queries.shape))
    out = attention(
      split_heads(queries, self.head_dim),
      split_heads(self.k_proj(features), self.head_dim),
      split_heads(self.v_proj(features), self.head_dim),
      causal=False,
    )
    return self.o_proj(merge_heads(out))


class VisionLanguageModel(nnx.Module):
  """See `CaptionModel`."""

  def __init__(
    self,
    vision: VisionTransformer,
    projector: PrefixProjector,
    decoder: Decoder,
    *,
    eos: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
  ):
    self.vision, self.projector, self.decoder = vision, projector, decoder
    self.num_prefix, self.eos = projector.queries.shape[0], eos
    self.mean, self.std = mean, std

  def encode(self, images: Array) -> tuple[Array, list[Array]]:
    """See `CaptionModel`."""
    normalised = (images - jnp.array(self.mean)) / jnp.array(self.std)
    x, context = self.vision.stem(normalised)
    activations = [x]
    for block in self.vision.blocks:
      x, _ = block(x, context)
      activations.append(x)
    return self.projector(self.vision.final_norm(x)), activations


class TeacherForced(NamedTuple):
  """A pass over given captions.

  Attributes:
    logits: float32 [batch, num_prefix + steps, vocab], of what follows each position.
    hidden: [layers + 1, batch, num_prefix + steps, dim], the blocks' first input, then the outputs
      of all blocks, the last behind the final norm.
    activations: of each layer of encoder and decoder, [batch, ...].
  """

  logits: Array
  hidden: Array
  activations: list[Array]


def embed_prefix(decoder: Decoder, prefix: Array) -> Array:
  """What `Decoder.embed` does to the words' embeddings, done to [batch, num_prefix, width]."""
  x = prefix if decoder.project_in is None else decoder.project_in(prefix)
  if decoder.embed_positions is not None:
    positions = jnp.arange(x.shape[1])
    x = x + decoder.embed_positions(positions + decoder.config.position_offset)
  return x if decoder.embed_norm is None else decoder.embed_norm(x)


def run_embeddings(
  decoder: Decoder, x: Array, positions: Array, cache: KVCache | None = None
) -> tuple[list[Array], KVCache | None]:
  """The blocks over embeddings [batch, seq, dim]: their input and every output, and the cache.

  Args:
    positions: int32 [batch, seq].
    cache: see `Decoder.__call__`.
  """
  context, cache = decoder.context(positions, jnp.ones_like(positions), cache)
  hidden = [x]
  for i, block in enumerate(decoder.blocks):
    x, kv = block(x, context, None if cache is None else (cache.keys[i], cache.values[i]))
    hidden.append(x)
    if cache is not None:
      cache.keys[i], cache.values[i] = kv
  if cache is not None:
    cache.length = cache.length + x.shape[1]
  return hidden, cache


def teacher_forced(
  model: CaptionModel, images: Array, tokens: Array, has_image: Array | bool = True
) -> TeacherForced:
  """Runs the model over images and their captions.

  Args:
    images: [batch, height, width, channels].
    tokens: int32 [batch, steps].
    has_image: bool [batch]; a text without an image has zeros for a prefix.
  """
  prefix, activations = model.encode(images)
  prefix = jnp.where(jnp.reshape(has_image, (-1, 1, 1)), prefix, 0)
  decoder = model.decoder
  batch, length = len(tokens), model.num_prefix + tokens.shape[1]
  positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
  words = decoder.embed(tokens, positions[:, model.num_prefix :])
  x = jnp.concatenate([embed_prefix(decoder, prefix), words], axis=1)
  hidden, _ = run_embeddings(decoder, x, positions)
  activations = activations + hidden[1:]
  hidden[-1] = decoder.head_input(hidden[-1])
  return TeacherForced(decoder.logits(hidden[-1]), jnp.stack(hidden), activations)


def of_steps(forced: TeacherForced, num_prefix: int) -> tuple[Array, Array]:
  """Logits [batch, steps, vocab] that each step's token is drawn from, and their hidden states."""
  steps = slice(num_prefix - 1, -1)
  return forced.logits[:, steps], forced.hidden[-1][:, steps]


def small_vlm(
  *,
  vocab_size: int,
  eos: int,
  image_size: int,
  patch_size: int,
  vision_width: int,
  width: int,
  num_layers: int,
  num_heads: int,
  num_prefix: int,
  max_length: int,
  rngs: nnx.Rngs,
) -> VisionLanguageModel:
  """A model for images with one channel, at its initialisation."""
  vision = VisionTransformer(
    VisionTransformerConfig(
      image_size=(image_size, image_size),
      patch_size=(patch_size, patch_size),
      hidden_size=vision_width,
      intermediate_size=2 * vision_width,
      num_layers=num_layers,
      num_heads=num_heads,
      num_channels=1,
      norm_eps=1e-6,
    ),
    rngs=rngs,
  )
  # As large as the patches' embeddings: a stroke says something by where it is.
  vision.embed_positions[...] = rngs.params.normal(vision.embed_positions.shape) * 0.5
  decoder = Decoder(
    DecoderConfig(
      vocab_size=vocab_size,
      hidden_size=width,
      intermediate_size=2 * width,
      num_layers=num_layers,
      num_heads=num_heads,
      num_kv_heads=num_heads,
      head_dim=width // num_heads,
      max_position_embeddings=num_prefix + max_length,
      gated_mlp=False,
      activation="gelu_tanh",
    ),
    rngs=rngs,
  )
  projector = PrefixProjector(vision_width, num_heads, num_prefix, width, rngs=rngs)
  return VisionLanguageModel(vision, projector, decoder, eos=eos, mean=(0.3,), std=(0.37,))


# Of CLIP, in pixels from 0 to 1.
CLIP_MEAN = (0.4815, 0.4578, 0.4082)
CLIP_STD = (0.2686, 0.2613, 0.2758)


def load_vlm(vision: str, decoder: str, projector: str, *, eos: int) -> VisionLanguageModel:
  """A model put together from a ViT, a decoder such as OPT, and the projector between them.

  Args:
    vision, decoder: Hugging Face directories.
    projector: safetensors file with queries [num_prefix, vision_width], and {k,v,o}_proj.{kernel,
      bias}, kernels [in_features, out_features]; heads are those of the ViT.
    eos: the token that ends a caption (50118 of BLIP-2 with OPT: the newline).

  Raises:
    UserError: a directory or the file is missing, holds another kind of model, or does not fit.
  """
  for folder, wanted in ((vision, "a ViT or DeiT"), (decoder, "a decoder such as OPT")):
    if not folder or not pathlib.Path(folder).expanduser().is_dir():
      raise UserError(f"no directory {folder!r}: expected the checkpoint of {wanted}")
    kind = read_config(pathlib.Path(folder).expanduser()).get("model_type", "")
    if kind in ("blip", "blip-2", "instructblip"):
      raise UserError(
        f"{folder} holds a whole {kind} model, whose Q-Former cannot be read: expected its parts, "
        "vision and decoder as directories of their own and the projector as a safetensors file"
      )
  encoder = Checkpoint(vision)
  if not isinstance(encoder.config, VisionTransformerConfig):
    raise UserError(f"{vision} holds no vision transformer; expected a ViT or DeiT")
  language = load_decoder(decoder)
  tensors = _read_projector(projector)
  heads, width = encoder.config.num_heads, encoder.config.hidden_size
  out = language.config.embedding_dim or language.config.hidden_size
  num_prefix = len(tensors["queries"])
  module = PrefixProjector(width, heads, num_prefix, out, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(module)
  expected = {".".join(map(str, path)): variable for path, variable in state.flat_state()}
  for name, variable in expected.items():
    if name not in tensors:
      raise UserError(f"{projector} lacks the tensor {name!r}; it has {', '.join(tensors)}")
    if tensors[name].shape != variable.shape:
      raise UserError(
        f"{projector}: {name} has shape {tensors[name].shape}, expected {variable.shape}"
      )
    variable.set_value(jnp.asarray(tensors[name], jnp.float32))
  if not 0 <= eos < language.config.vocab_size:
    raise UserError(f"eos={eos}: the decoder has tokens 0 to {language.config.vocab_size - 1}")
  return VisionLanguageModel(
    encoder.load_model(),
    nnx.merge(graphdef, state),
    language,
    eos=eos,
    mean=CLIP_MEAN,
    std=CLIP_STD,
  )


def _read_projector(path: str) -> dict[str, np.ndarray]:
  file = pathlib.Path(path).expanduser()
  if not path or not file.is_file():
    raise UserError(f"no projector {path!r}: expected a safetensors file, see load_vlm")
  tensors = load_file(file)
  if "queries" not in tensors or tensors["queries"].ndim != 2:
    raise UserError(f"{path}: expected a tensor 'queries' [num_prefix, vision_width]")
  for name, value in tensors.items():
    if not np.isfinite(value.astype(np.float32)).all():
      raise UserError(f"{path}: tensor {name!r} holds NaN or infinite values")
  return tensors
