"""FPQ against its baselines: a language model, vision transformers, a pretrained encoder."""

import pathlib

from ml_collections import ConfigDict

from common.errors import UserError
from common.evaluation.perplexity import WindowLosses
from common.reporting.measurements import Measurements
from common.reporting.report import Report
from projects.llm_fp4.encoder_experiment import compare_on_encoder
from projects.llm_fp4.language_experiment import Result, compare_on_language_model
from projects.llm_fp4.methods import classifier_settings, fpq_settings
from projects.llm_fp4.vision_experiment import compare_on_digits, compare_on_images


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Runs every part that the config asks for.

  Raises:
    UserError: a value of the config is not supported, or a model or data is not there.
  """
  if not (config.model or config.encoder or config.vision_epochs or config.vision_model):
    raise UserError("nothing to do: set model, encoder, vision_epochs or vision_model")
  if not config.seeds:
    raise UserError("seeds is empty: give at least one")
  for bits in (config.bits, *config.other_bits, *config.encoder_bits):
    fpq_settings(config, bits)
    fpq_settings(config, bits, **classifier_settings(config))
  report = Report(tables=[], figures=[], claims=[])
  measurements = Measurements(workdir, config, (Result, WindowLosses))
  if config.model:
    compare_on_language_model(config, workdir, measurements, report)
  if config.vision_epochs:
    compare_on_digits(config, measurements, report)
  if config.vision_model:
    compare_on_images(config, measurements, report)
  if config.encoder:
    compare_on_encoder(config, measurements, report)
  return report
