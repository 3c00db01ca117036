"""FlexRound against its baselines: convolutional networks, a language model, a pretrained encoder."""

import pathlib

from ml_collections import ConfigDict

from common.evaluation.perplexity import WindowLosses
from common.reporting.measurements import Measurements
from common.reporting.report import Report
from projects.flexround.encoder_experiment import compare_on_encoder
from projects.flexround.language_experiment import LanguageResult, compare_on_language_model
from projects.flexround.network_experiment import Outcome, compare_on_digits, compare_on_images


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Runs every part that the config asks for."""
  report = Report(tables=[], figures=[], claims=[])
  measurements = Measurements(workdir, config, (Outcome, LanguageResult, WindowLosses))
  if config.networks:
    compare_on_digits(config, workdir, measurements, report)
  if config.vision_model:
    compare_on_images(config, measurements, report)
  if config.model:
    compare_on_language_model(config, workdir, measurements, report)
  if config.encoder:
    compare_on_encoder(config, measurements, report)
  return report
