"""Outlier Suppression+ against its baselines: decoders with outliers put in, or a real encoder."""

import pathlib

from ml_collections import ConfigDict

from common.evaluation.perplexity import WindowLosses
from common.reporting.measurements import Measurements
from common.reporting.report import Report
from projects.outlier_suppression_plus.decoder_experiment import compare_on_decoders
from projects.outlier_suppression_plus.encoder_experiment import compare_on_encoder


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Runs every part that the config asks for."""
  measurements = Measurements(workdir, config, (WindowLosses,))
  report = Report(tables=[], figures=[], claims=[])
  if config.model:
    compare_on_decoders(config, measurements, workdir, report)
  if config.encoder:
    compare_on_encoder(config, measurements, workdir, report)
  return report
