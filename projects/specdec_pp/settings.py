"""What a run's settings must be, checked before any work."""

import pathlib

from ml_collections import ConfigDict

from common.errors import UserError
from common.models.base import check_base_model
from common.models.decoder import Decoder


def check_config(config: ConfigDict) -> None:
  """Raises UserError for a value that cannot work."""
  checks = [
    (0 < config.min_drafts <= config.max_drafts, "min_drafts", "1 to max_drafts"),
    (config.max_drafts >= 2, "max_drafts", "at least 2"),
    (config.engine or config.new_tokens > config.max_drafts + 1, "new_tokens", "> max_drafts + 1"),
    (min(config.new_tokens, config.prompt_length) > 0, "new_tokens", "positive, as prompt_length"),
    (config.thresholds and _within(config.thresholds, 0, 1), "thresholds", "numbers in (0, 1]"),
    (0 < config.main_threshold <= 1, "main_threshold", "in (0, 1]"),
    (
      len(config.constants) > 1 and all(0 < k <= config.max_drafts for k in config.constants),
      "constants",
      "at least two lengths from 1 to max_drafts",
    ),
    (_within(config.confidences, 0, 1), "confidences", "numbers in (0, 1]"),
    (all(0 <= r < 1 for r in (config.mixing, *config.ablate_mixing)), "mixing", "in [0, 1)"),
    (
      all(w > 0 for w in (config.rejected_weight, *config.ablate_rejected_weight)),
      "rejected_weight",
      "positive",
    ),
    (
      all(d >= 0 for d in (config.num_blocks, *config.ablate_num_blocks)),
      "num_blocks",
      "0 or more",
    ),
    (config.draft_objective in ("text", "target"), "draft_objective", "text or target"),
    (config.temperature >= 0, "temperature", "0 (greedy) or more"),
    (0 < config.dev_fraction < 1, "dev_fraction", "between 0 and 1"),
    (config.cost_ratio > 0, "cost_ratio", "positive"),
    (min(config.head_prompts, config.test_prompts) > 1, "head_prompts", ">= 2, as test_prompts"),
    (len(config.seeds) > 0, "seeds", "at least one"),
    (bool(config.draft) or config.draft_width % 32 == 0, "draft_width", "a multiple of 32"),
  ]
  for holds, name, expected in checks:
    if not holds:
      raise UserError(f"{name}={config[name]}: expected {expected}; set --config.{name}")
  # Before the target, which may be large, is read.
  for name in ("model", "draft"):
    if config[name]:
      check_base_model(config[name], name)
  if config.head and not pathlib.Path(config.head).expanduser().is_file():
    raise UserError(f"head={config.head}: there is no such file; leave it empty to train a head")


def _within(values, low: float, high: float) -> bool:
  return all(low < value <= high for value in values)


def check_models(target: Decoder, draft: Decoder) -> None:
  """Raises UserError for two vocabularies."""
  if target.config.vocab_size != draft.config.vocab_size:
    raise UserError(
      f"the draft has {draft.config.vocab_size} tokens, the target {target.config.vocab_size}: "
      "expected one vocabulary; take models of one family"
    )
