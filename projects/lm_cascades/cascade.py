"""The cascade as it runs: small model, score, threshold, and the large model for what is deferred."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from common.models.encoder_decoder import EncoderDecoderConfig
from projects.lm_cascades.outputs import Model, Outputs, greedy_decode


class CascadeOutputs(NamedTuple):
  """What the cascade answers.

  Attributes:
    texts: token ids of every answer, without the stop token.
    deferred: bool [n], answered by the large model.
    scores: float32 [n], of the deferral rule.
  """

  texts: list[list[int]]
  deferred: np.ndarray
  scores: np.ndarray


def run_cascade(
  small: Model,
  large: Model,
  prompts: Sequence[Sequence[int]],
  score: Callable[[Sequence[Sequence[int]], Outputs], np.ndarray],
  threshold: float,
  *,
  max_new_tokens: int,
  stop_token: int,
  batch_size: int,
) -> CascadeOutputs:
  """Answers prompts; the large model generates only for those that are deferred.

  Args:
    small, large: decoders or encoder-decoders with one vocabulary.
    prompts: token ids, n of them.
    score: of a deferral rule, (prompts, the small model's outputs) -> float [n].
    threshold: inputs of a lower score are deferred, see `deferral.threshold_for_rate`.
    max_new_tokens, stop_token, batch_size: as of `greedy_decode`.
  """
  decoding = {
    "max_new_tokens": max_new_tokens,
    "stop_token": stop_token,
    "batch_size": min(batch_size, len(prompts)),
  }
  outputs = greedy_decode(small, prompts, **decoding)
  scores = np.asarray(score(prompts, outputs), np.float32)
  deferred = scores < threshold
  texts = outputs.texts(stop_token)
  rows = np.flatnonzero(deferred)
  if len(rows):
    # Filled to whole batches, so that the large model is compiled for one size.
    filled = np.resize(rows, -(-len(rows) // decoding["batch_size"]) * decoding["batch_size"])
    answers = greedy_decode(large, [prompts[i] for i in filled], **decoding)
    for i, text in zip(rows, answers.texts(stop_token)):
      texts[i] = text
  return CascadeOutputs(texts, deferred, scores)


def generation_flops(
  config, prompt_tokens: np.ndarray, new_tokens: np.ndarray, *, num_layers: int | None = None
) -> np.ndarray:
  """Floating-point operations of generating with a cache, float64 [n]; a multiply-add counts 2.

  Matrix products and attention; norms, activations and softmax are left out.

  Args:
    config: DecoderConfig or EncoderDecoderConfig.
    prompt_tokens, new_tokens: int [n], of the prompt (the source) and of the output.
    num_layers: decoder layers that run, without the head; None for the whole model.
  """
  source, target = (np.asarray(x, np.float64) for x in (prompt_tokens, new_tokens))
  dim = config.hidden_size
  mlp = (3 if config.gated_mlp else 2) * dim * config.intermediate_size
  width = config.num_heads * config.head_dim
  # Tokens that a causal self-attention of m tokens reads, all queries together.
  causal = lambda m: m * (m + 1) / 2
  if isinstance(config, EncoderDecoderConfig):
    layers = config.num_decoder_layers if num_layers is None else num_layers
    encoder = (4 * dim * width + mlp) * source + 2 * width * source**2
    # Self-attention, queries and output of cross-attention; its keys and values are of the source.
    decoder = (6 * dim * width + mlp) * target + 2 * dim * width * source
    decoder += 2 * width * (causal(target) + source * target)
    total = config.num_layers * encoder + layers * decoder
  else:
    layers = config.num_layers if num_layers is None else num_layers
    # The last token is never read.
    read = source + target - 1
    projections = 2 * dim * (width + config.num_kv_heads * config.head_dim)
    total = layers * ((projections + mlp) * read + 2 * width * causal(read))
  head = 0 if num_layers is not None else dim * config.vocab_size * target
  return 2 * (total + head)
