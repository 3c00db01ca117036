"""What a run's settings must be, checked before any work."""

import pathlib

from ml_collections import ConfigDict

from common.compilation.topology import tpu_slice
from common.decoding.generation import Sampling
from common.errors import UserError
from common.models.base import check_base_model
from common.models.decoder import Decoder
from projects.ppd.compile_steps import size_of
from projects.ppd.sparse_tree import room
from projects.ppd.training import Student, TrainSettings

MASKS = ("ensemble", "decoder", "encoder")
AGGREGATIONS = ("mean", "learned", "hidden")

# What is measured, by the names of the tables.
DYNAMIC, STATIC, RANDOM = "dynamic sparse tree", "static sparse tree", "random tree"
PPD = "PPD"
UNTRAINED = "untrained prompts"
MEDUSA = "Medusa heads"
MATCHED = "Medusa heads, matched"


def check_config(config: ConfigDict) -> None:
  """Raises UserError for a value that cannot work."""
  distances, ensemble = config.distances, config.ensemble
  checks = [
    (1 <= distances <= 8, "distances", "1 to 8"),
    (ensemble >= 1, "ensemble", "at least 1"),
    (config.mask in MASKS, "mask", " or ".join(MASKS)),
    (config.aggregation in AGGREGATIONS, "aggregation", " or ".join(AGGREGATIONS)),
    (config.shortest_prefix >= 1, "shortest_prefix", "at least 1"),
    (config.text_length > config.shortest_prefix + distances, "text_length", "room for a cut"),
    (0 < config.texts_per_step <= config.train_texts, "texts_per_step", "1 to train_texts"),
    (config.cuts_per_text >= 1, "cuts_per_text", "at least 1"),
    (config.num_steps >= 1, "num_steps", "at least 1"),
    (config.ablation_steps >= 0, "ablation_steps", "0 (none) or more"),
    (config.ablation_ensemble >= 2, "ablation_ensemble", "at least 2"),
    (config.learning_rate > 0, "learning_rate", "positive"),
    (config.medusa_learning_rate > 0, "medusa_learning_rate", "positive"),
    (min(config.validation_prompts, config.test_prompts) >= 1, "test_prompts", "at least 1"),
    (config.prompt_length >= 1, "prompt_length", "at least 1"),
    (config.new_tokens > distances, "new_tokens", "more than distances"),
    (config.generate_batch >= 1, "generate_batch", "at least 1"),
    (config.temperature > 0, "temperature", "positive, of typical acceptance"),
    (0 < config.epsilon <= 1, "epsilon", "in (0, 1]"),
    (0 < config.alpha <= 1, "alpha", "in (0, 1]"),
    (len(config.sizes) > 1, "sizes", "at least two"),
    (config.compared_size in config.sizes, "compared_size", "one of sizes"),
    (config.latency_repeats >= 1, "latency_repeats", "at least 1"),
    (config.drafts >= 1, "drafts", "at least 1"),
    (not config.draft or len(config.draft_sizes) > 0, "draft_sizes", "at least one size"),
    (len(config.test_sources) > 0, "test_sources", "at least one"),
    (len(config.seeds) > 0, "seeds", "at least one"),
  ]
  for holds, name, expected in checks:
    if not holds:
      raise UserError(f"{name}={config[name]}: expected {expected}; set --config.{name}")
  Sampling(config.temperature)
  for size in (*config.sizes, *(config.draft_sizes if config.draft else ())):
    room(size, distances, ensemble)
  if room(min(config.sizes), distances, ensemble) < 1 + distances * ensemble:
    raise UserError(
      f"sizes={tuple(config.sizes)}: the smallest has no room for a static tree's candidate with "
      f"{distances} prompt tokens; expected at least {2 * (1 + distances * ensemble)}"
    )
  for name in ("model", "draft"):
    if config[name]:
      check_base_model(config[name], name)
  if config.tpu_model and not config.tpu:
    raise UserError(f"tpu_model={config.tpu_model} is for a bound: set --config.tpu=v5e:1x1, or so")
  if config.tpu:
    tpu_slice(config.tpu)
    size_of(config.tpu_model or config.model)
  for name, prefix in (("train_source", "sharegpt:"), ("validation_source", "instructions:")):
    file = config[name].removeprefix(prefix)
    if file != config[name] and not pathlib.Path(file).expanduser().is_file():
      raise UserError(f"{name}: there is no file {file}; set --config.{name}={prefix}FILE")
  if config.prompt_tokens and not pathlib.Path(config.prompt_tokens).expanduser().is_file():
    raise UserError(
      f"prompt_tokens={config.prompt_tokens}: there is no such file; leave it empty to train them"
    )


def check_models(target: Decoder, draft: Decoder | None) -> None:
  """Raises UserError for two vocabularies."""
  if draft is not None and draft.config.vocab_size != target.config.vocab_size:
    raise UserError(
      f"the draft has {draft.config.vocab_size} tokens, the target {target.config.vocab_size}: "
      "expected one vocabulary; take models of one family"
    )


def main_students(config: ConfigDict) -> dict[str, Student]:
  """The prompt tokens of the config and the Medusa heads that they are compared with."""
  students = {
    PPD: Student(
      ensemble=config.ensemble,
      mask=config.mask,
      aggregation=config.aggregation,
      hard_labels=config.hard_labels,
    )
  }
  if config.medusa_heads:
    students |= {MEDUSA: Student("medusa"), MATCHED: Student("matched medusa")}
  return students


def ablated_students(config: ConfigDict) -> dict[str, Student]:
  """Prompt tokens that differ from the paper's e = 1, KL, in one or two settings."""
  e = config.ablation_ensemble
  students = {
    "e=1": Student(),
    "e=1, hard labels": Student(hard_labels=True),
    f"e={e}, ensemble mask": Student(ensemble=e),
    f"e={e}, decoder mask": Student(ensemble=e, mask="decoder"),
    f"e={e}, encoder mask": Student(ensemble=e, mask="encoder"),
    f"e={e}, learned weights": Student(ensemble=e, aggregation="learned"),
    f"e={e}, weights of the hidden states": Student(ensemble=e, aggregation="hidden"),
  }
  return students


def train_settings(config: ConfigDict, num_steps: int) -> TrainSettings:
  """The config's, for a training of so many steps."""
  return TrainSettings(
    learning_rate=config.learning_rate,
    medusa_learning_rate=config.medusa_learning_rate,
    num_steps=num_steps,
    texts_per_step=config.texts_per_step,
    cuts_per_text=config.cuts_per_text,
    distances=config.distances,
  )
