"""Prompt tokens: trained input embeddings that guess the tokens ahead of a frozen decoder's text."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.models.decoder import Decoder

Array = jax.Array


class PromptTokens(NamedTuple):
  """The trained parameters: m prompt tokens, each an ensemble of e (EPTs).

  The logits of P_i are those of its EPTs, averaged with weights softmax_j(bias_ij + h_ij gate_i), h
  the hidden state behind the final norm. With both zero it is the plain mean.

  Attributes:
    embeddings: [m, e, width], of the input embeddings.
    bias: [m, e].
    gate: [m, hidden width].
  """

  embeddings: Array
  bias: Array
  gate: Array


class PromptedEmbedding(nnx.Module):
  """An input embedding that knows prompt tokens too: id vocab + i e + j is EPT j of P_{i + 1}.

  The head of a model with tied embeddings stays as it is.
  """

  def __init__(self, base: nnx.Module, embeddings: Array):
    """embeddings: [m, e, width]."""
    self.base = base
    self.prompts = nnx.Param(embeddings.reshape(-1, embeddings.shape[-1]))

  def __call__(self, ids: Array) -> Array:
    """int32 [...] -> [..., width]."""
    vocab, prompts = self.base.num_embeddings, self.prompts[...]
    text = self.base(jnp.minimum(ids, vocab - 1))
    rows = prompts[jnp.clip(ids - vocab, 0, len(prompts) - 1)].astype(text.dtype)
    return jnp.where((ids >= vocab)[..., None], rows, text)

  def attend(self, x: Array) -> Array:
    """The tied head: logits of the vocabulary only."""
    return self.base.attend(x)

  @property
  def embedding(self):
    return self.base.embedding


def with_prompt_tokens(model: Decoder, prompt_tokens: PromptTokens) -> Decoder:
  """The model with a `PromptedEmbedding`; arrays are shared, the given model stays as it is."""
  prompted = nnx.merge(*nnx.split(model))
  prompted.embed_tokens = PromptedEmbedding(prompted.embed_tokens, prompt_tokens.embeddings)
  return prompted


def prompt_logits(
  model: Decoder, prompt_tokens: PromptTokens, text_hidden: Array, prompt_hidden: Array
) -> Array:
  """Logits of the prompt tokens, float32 [batch, m, vocab]; a `Propose`.

  Args:
    model: whose head is read.
    prompt_tokens: weights of the ensemble.
    text_hidden: not looked at.
    prompt_hidden: of the EPTs, behind the final norm, [batch, m, e, width].
  """
  del text_hidden
  logits = model.logits(prompt_hidden)
  if logits.shape[2] == 1:
    return logits[:, :, 0]
  scores = prompt_tokens.bias + jnp.einsum("bmew,mw->bme", prompt_hidden, prompt_tokens.gate)
  weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
  return jnp.einsum("bme,bmev->bmv", weights, logits)


def check_prompt_tokens(model: Decoder, prompt_tokens: PromptTokens) -> None:
  """Raises UserError for prompt tokens of another model or with values that are not finite."""
  width = model.embed_tokens.embedding.shape[-1]
  distances, ensemble, found = prompt_tokens.embeddings.shape
  if found != width:
    raise UserError(
      f"the prompt tokens have width {found}, the model's embeddings {width}: expected prompt "
      "tokens that were trained on this model"
    )
  shapes = (
    (distances, ensemble),
    (distances, model.config.embedding_dim or model.config.hidden_size),
  )
  for name, shape in zip(("bias", "gate"), shapes):
    if getattr(prompt_tokens, name).shape != shape:
      raise UserError(
        f"{name} of the prompt tokens has shape {getattr(prompt_tokens, name).shape}, expected "
        f"{shape}: take prompt tokens of this model"
      )
  for name, value in prompt_tokens._asdict().items():
    if not bool(jnp.isfinite(value).all()):
      raise UserError(f"{name} of the prompt tokens has NaN or infinite values: train them again")
