"""The study and LoRC: what to round, how, and what a correction of low rank wins back."""

import functools
import pathlib

from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from common.errors import UserError
from common.evaluation.perplexity import WindowLosses
from common.models.base import BaseModel, base_model
from common.quantization.checkpoint import check_format
from common.reporting.measurements import Measurements
from common.reporting.report import Report
from projects.zeroquant_v2.comparison import compare_methods
from projects.zeroquant_v2.evaluation import load_evaluation, parse_setting
from projects.zeroquant_v2.lorc_study import Scored, study_lorc
from projects.zeroquant_v2.methods import integer_format, settings_of
from projects.zeroquant_v2.sensitivity import sensitivity_study


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Runs the three parts."""
  check_config(config)
  bases = {name: base_model(name) for name in config.models}
  check_models(config, bases)
  # One tokenizer per family of checkpoints; the windows are those of the first model.
  evaluation = load_evaluation(config, next(iter(bases.values())))
  measurements = Measurements(workdir, config, (Scored, WindowLosses))
  report = Report(tables=[], figures=[], claims=[])
  setting = (config, bases, evaluation, measurements, workdir, report)
  parts = [functools.partial(f, *setting) for f in (sensitivity_study, compare_methods, study_lorc)]
  for part in track(parts, "ZeroQuant-V2", console=Console(stderr=True)):
    part()
  return report


def check_config(config: ConfigDict) -> None:
  """Checks what needs no model.

  Raises:
    UserError: a setting is not written as W4A8, a model to compare methods on is not loaded, or a
      method does not take the settings.
  """
  for setting in (*config.sensitivity, *(s for s, _ in config.method_settings)):
    parse_setting(setting)
  for method in ("RTN", *config.methods):
    settings_of(config, method, integer_format(4, -1, config.symmetric))
  if other := sorted(set(config.symmetric_sensitivity) - set(config.sensitivity)):
    raise UserError(f"symmetric_sensitivity has {', '.join(other)}, which sensitivity lacks")
  if missing := sorted(set(config.method_models) - set(config.models)):
    raise UserError(f"method_models has {', '.join(missing)}, which models lacks; add it there")


def check_models(config: ConfigDict, bases: dict[str, BaseModel]) -> None:
  """Checks, before any work, that every block size divides, that ranks exist, that texts fit.

  Raises:
    UserError: it does not (the model is named).
  """
  vocabularies = {base.tokenizer.to_str() for base in bases.values()}
  if len(vocabularies) > 1:
    raise UserError("the models have different tokenizers; compare those of one, run by run")
  for name, base in bases.items():
    model = base.model.config
    sizes = config.group_sizes
    if name in config.method_models:
      sizes = (*sizes, *(size for _, size in config.method_settings))
    try:
      for size in sizes:
        check_format(model, integer_format(4, size, config.symmetric))
    except UserError as e:
      raise UserError(f"{name}: {e}") from None
    largest = min(model.hidden_size, model.num_kv_heads * model.head_dim, model.intermediate_size)
    if max(*config.ranks, config.rank) > largest:
      raise UserError(f"{name}: ranks={config.ranks} and rank={config.rank}; at most {largest}")
    length = max(config.eval_length, config.calibration_length)
    if length > model.max_position_embeddings:
      raise UserError(f"{name}: {length} tokens; at most {model.max_position_embeddings}")
