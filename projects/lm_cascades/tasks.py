"""What is cascaded: a pair of models, prompts with references, and who may learn from which.

translation   synthetic, two T5s trained here (translation.py); other models for every seed
prose         sentences of Python's documentation to be completed, by two base models
file          JSON lines with "input" and "target", by two Hugging Face directories
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from common.checkpoints.huggingface import Checkpoint
from common.cli import closest
from common.data.sources import load_documents
from common.data.tokenizer import eos_id, load_tokenizer
from common.errors import UserError
from common.evaluation.items import read_items
from common.models.base import base_model
from common.models.decoder import Decoder
from common.models.encoder_decoder import EncoderDecoder
from projects.lm_cascades import metrics, translation
from projects.lm_cascades.outputs import Model
from projects.lm_cascades.post_hoc import TARGETS

TASKS = ("translation", "prose", "file")
METRICS = ("f1", "exact")

_PROMPT_TOKENS = 32  # Of the prose task.
_WORDS = (8, 40)  # Of a sentence that is to be completed.
_PER_DOCUMENT = 40
_DOCUMENTATION = "embedded:prose,embedded:science"


class Task(NamedTuple):
  """A pair of models and n inputs.

  Attributes:
    small, large: the models, of one vocabulary.
    prompts: n of token ids.
    references: n texts.
    calibration, test: int rows of inputs, disjoint. Everything that is learnt or chosen comes from
      the calibration inputs.
    decode: token ids -> text.
    stop_token: ends an output.
    max_new_tokens: slots of an output.
  """

  small: Model
  large: Model
  prompts: Sequence[Sequence[int]]
  references: Sequence[str]
  calibration: np.ndarray
  test: np.ndarray
  decode: Callable[[list[int]], str]
  stop_token: int
  max_new_tokens: int


def check(config: ConfigDict) -> None:
  """Looks at everything that a run would trip over, before any work.

  Raises:
    UserError: an unknown task, metric or target; too few examples; bad shares.
  """
  for task in config.tasks:
    if task not in TASKS:
      raise UserError(f"unknown task {task!r}; {closest(task, TASKS)}")
  if config.metric not in METRICS:
    raise UserError(f"unknown metric {config.metric!r}; {closest(config.metric, METRICS)}")
  if config.target not in TARGETS:
    raise UserError(f"unknown target {config.target!r}; {closest(config.target, TARGETS)}")
  if not translation.MIN_LENGTH <= config.longest <= translation.SLOTS:
    raise UserError(
      f"longest={config.longest}: a sentence has {translation.MIN_LENGTH} to "
      f"{translation.SLOTS} words; change longest"
    )
  if "translation" in config.tasks:
    check_layers(config, config.large_model[1])
  if not 0 < config.validation_share < 1:
    raise UserError(
      f"validation_share={config.validation_share}: expected a share between 0 and 1 of the "
      "calibration inputs"
    )
  if not 0 < config.deferral_rate < 1:
    raise UserError(f"deferral_rate={config.deferral_rate}: expected a rate between 0 and 1")
  if config.examples < 40 and config.tasks != ("file",):
    raise UserError(f"examples={config.examples}: rules are learnt and judged on at least 40")
  if not config.seeds:
    raise UserError("seeds is empty: expected one or more integers, such as (0, 1, 2)")


def check_layers(config: ConfigDict, num_layers: int) -> None:
  """Raises UserError unless the large model has the decoder layers that the config asks for."""
  for name in ("embed_layers", "ablate_layers"):
    for layers in np.atleast_1d(np.asarray(config[name], int)):
      if not 1 <= layers <= num_layers:
        raise UserError(
          f"{name}={config[name]}: the large model has decoder layers 1 to {num_layers}"
        )


def decoder_layers(config) -> int:
  """Decoder layers of a DecoderConfig or an EncoderDecoderConfig."""
  return getattr(config, "num_decoder_layers", None) or config.num_layers


def translation_task(config: ConfigDict, seed: int) -> Task:
  """Draws a language, trains both models on it, and draws calibration and test sentences."""
  rng = np.random.default_rng(seed)
  language = translation.make_language(rng)
  pairs = translation.make_pairs(language, config.train_examples, config.longest, rng)
  models = [
    translation.train_model(
      translation.model_config(dim, num_layers),
      *pairs,
      learning_rate=learning_rate,
      num_steps=num_steps,
      batch_size=config.batch_size,
      seed=seed,
    )
    for dim, num_layers, num_steps, learning_rate in (config.small_model, config.large_model)
  ]
  n = config.examples
  prompts, targets = translation.make_pairs(language, 2 * n, config.longest, rng)
  return Task(
    *models,
    prompts,
    [translation.decode(target) for target in targets],
    np.arange(n),
    np.arange(n, 2 * n),
    translation.decode,
    translation.EOS,
    config.longest + 1,
  )


def prose_task(config: ConfigDict, seed: int) -> Task:
  """Sentences of held-out documentation, cut in the middle, and two pretrained base models.

  Calibration and test sentences are of different documents.
  """
  small, large = (base_model(name) for name in config.base_models)
  tokenizer = small.tokenizer
  if tokenizer.to_str() != large.tokenizer.to_str():
    raise UserError(f"base_models={config.base_models} have different tokenizers: choose others")
  check_layers(config, decoder_layers(large.model.config))
  stop = tokenizer.token_to_id(".")
  documents = [d for s in ("validation", "test") for d in load_documents(_DOCUMENTATION, s)]
  prompts, references, seen = [], [], set()
  order = np.random.default_rng(seed).permutation(len(documents))
  # Of the document in the middle, rows that could be on both sides are left out.
  wanted = 2 * config.examples + _PER_DOCUMENT
  for i in order:
    of_document = 0
    for context, sentence in _sentences(documents[i]["text"]):
      words = sentence.split()
      if of_document == _PER_DOCUMENT or sentence in seen:
        continue
      cut = len(words) // 2
      ids = tokenizer.encode(f"{context} {' '.join(words[:cut])}".strip()).ids[-_PROMPT_TOKENS:]
      prompts.append(ids)
      references.append(" ".join(words[cut:]))
      seen.add(sentence)
      of_document += 1
  if len(prompts) < wanted:
    raise UserError(
      f"the documentation has {len(prompts)} sentences and examples={config.examples} takes "
      f"{wanted}: lower examples to {(len(prompts) - _PER_DOCUMENT) // 2} at most"
    )
  n = config.examples
  return Task(
    small.model,
    large.model,
    prompts[:wanted],
    references[:wanted],
    np.arange(n),
    np.arange(wanted - n, wanted),
    tokenizer.decode,
    stop,
    config.max_new_tokens,
  )


def _sentences(text: str) -> list[tuple[str, str]]:
  """(text of the paragraph before, sentence without its full stop) of a text."""
  found = []
  for paragraph in re.split(r"\n\s*\n", text):
    parts = [part for part in re.split(r"(?<=\.)\s+", " ".join(paragraph.split())) if part]
    for i, part in enumerate(parts):
      if part[:1].isupper() and part.endswith(".") and _WORDS[0] <= len(part.split()) <= _WORDS[1]:
        found.append((" ".join(parts[:i]), part[:-1]))
  return found


def file_task(config: ConfigDict) -> Task:
  """Inputs and references from files, and the models of two Hugging Face directories.

  Raises:
    UserError: a file or directory is missing or malformed, the models are of different kinds or
      vocabularies, or there is no stop token.
  """
  items = [
    read_items(path, ("input", "target")) for path in (config.calibration_file, config.test_file)
  ]
  checkpoints = [Checkpoint(path) for path in (config.small, config.large)]
  for checkpoint in checkpoints:
    if checkpoint.family.model not in (Decoder, EncoderDecoder):
      raise UserError(
        f"{checkpoint.path} holds a {checkpoint.config.family}: a cascade needs a decoder or a T5"
      )
  check_layers(config, decoder_layers(checkpoints[1].config))
  tokenizers = [load_tokenizer(path) for path in (config.small, config.large)]
  if tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
    raise UserError(
      f"{config.small} and {config.large} have different vocabularies: the cascade needs one"
    )
  stop = getattr(checkpoints[0].config, "eos_token_id", None)
  stop = eos_id(tokenizers[0]) if stop is None else stop
  if stop is None:
    raise UserError(f"the tokenizer of {config.small} has no end-of-sequence token")
  every = [item for part in items for item in part]
  sizes = [len(part) for part in items]
  return Task(
    *(checkpoint.load_model() for checkpoint in checkpoints),
    [tokenizers[0].encode(item["input"]).ids[: config.max_source_tokens] for item in every],
    [item["target"] for item in every],
    np.arange(sizes[0]),
    np.arange(sizes[0], sum(sizes)),
    tokenizers[0].decode,
    stop,
    config.max_new_tokens,
  )


def quality(metric: str, text: str, reference: str) -> float:
  """Quality of an answer in [0, 1]; words are what white space separates."""
  function = metrics.token_f1 if metric == "f1" else metrics.exact_match
  return function(text.lower().split(), reference.lower().split())


def read_quality(path: str, n: int) -> np.ndarray:
  """Qualities from another scorer (BLEURT, say), float32 [n, 2] of the small and the large model.

  Args:
    path: a .npy file of n rows in the order of the calibration file and then the test file.
    n: rows that are expected.

  Raises:
    UserError: it is missing, has another shape, or a value is not finite.
  """
  try:
    values = np.asarray(np.load(path), np.float32)
  except (OSError, ValueError) as e:
    raise UserError(f"cannot read {path}: {e}; expected a .npy array [{n}, 2]") from None
  if values.shape != (n, 2):
    raise UserError(f"{path} is {list(values.shape)}; expected [{n}, 2], small and large model")
  if not np.isfinite(values).all():
    raise UserError(f"{path} holds NaN or infinite qualities: score these outputs again")
  return values
