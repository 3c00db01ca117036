"""FlexRound against its baselines: convolutional networks, a language model, a pretrained encoder."""

import pathlib

from ml_collections import ConfigDict

from common.reporting.report import Report
from projects.flexround.encoder_experiment import compare_on_encoder
from projects.flexround.language_experiment import compare_on_language_model
from projects.flexround.network_experiment import compare_on_digits, compare_on_images


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Runs every part that the config asks for."""
  report = Report(tables=[], figures=[], claims=[])
  if config.networks:
    compare_on_digits(config, workdir, report)
  if config.vision_model:
    compare_on_images(config, report)
  if config.model:
    compare_on_language_model(config, workdir, report)
  if config.encoder:
    compare_on_encoder(config, report)
  return report
