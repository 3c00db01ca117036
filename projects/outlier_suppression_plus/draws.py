"""The decoders that are quantized: outlier channels and calibration text of each seed, and the scores."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from common.data.pipelines import calibration_samples, evaluation_windows
from common.evaluation.perplexity import WindowLosses, window_losses
from common.models.base import BaseModel
from common.models.decoder import Decoder
from common.models.outliers import inject_outliers
from common.reporting.measurements import Measurements

Array = jax.Array


class Draw(NamedTuple):
  """One seed: a full-precision model, calibration text, and its losses on the evaluation windows.

  The model is made when it is asked for: with outliers, every seed has its own.
  """

  seed: int
  model: Callable[[], Decoder]
  tokens: Array
  full: WindowLosses


def held_out_windows(config: ConfigDict, base: BaseModel) -> np.ndarray:
  """Windows of every domain's test split together, int32 [windows, seq]."""
  windows = evaluation_windows(
    config.domains, base.tokenizer, seq_len=config.eval_length, per_source=config.eval_windows
  )
  return np.concatenate(list(windows.values()))


def shift_of(config: ConfigDict, base: BaseModel) -> float:
  """How far outlier channels are moved off zero: not where RMSNorm has no bias for it."""
  return config.outlier_shift if base.model.config.norm == "layer" else 0.0


def make_draws(config: ConfigDict, base: BaseModel, shift: float, what: str, score) -> list[Draw]:
  """Calibration text and, if the config asks for them, outlier channels of every seed.

  Args:
    config: the run's.
    base: the model as it is loaded.
    shift: see `shift_of`.
    what: begins the names of the measurements.
    score: `score_method` on the evaluation windows.
  """
  draws = []
  for seed in config.seeds:
    tokens = jnp.asarray(
      calibration_samples(
        ",".join(config.domains),
        base.tokenizer,
        num_samples=config.calibration_samples,
        seq_len=config.calibration_length,
        seed=seed,
      )
    )
    model = functools.partial(_model_of, config, base.model, shift, seed)
    full = score(f"{what}, full precision, seed {seed}", unchanged, model, tokens)
    draws.append(Draw(seed, model, tokens, full))
  return draws


def _model_of(config: ConfigDict, model: Decoder, shift: float, seed: int) -> Decoder:
  if not config.outliers:
    return model
  return inject_outliers(
    model,
    jax.random.key(seed),
    fraction=config.outlier_fraction,
    gain=config.outlier_gain,
    shift=shift,
  )


def unchanged(model: Decoder, tokens: Array) -> Decoder:
  """Full precision among the methods of `main_methods`."""
  del tokens
  return model


def score_method(
  windows: np.ndarray,
  measurements: Measurements,
  name: str,
  method: Callable[[Decoder, Array], Decoder],
  model: Callable[[], Decoder],
  tokens: Array,
) -> WindowLosses:
  """Losses of what the method makes of a model, unless they are measured already.

  Args:
    windows: evaluation text, int32 [windows, seq].
    measurements: of the run.
    name: of the measurement.
    method: of `main_methods`, on decoders.
    model: makes the model in full precision.
    tokens: calibration text, int32 [samples, seq].
  """
  return measurements.get(name, lambda: window_losses(method(model(), tokens), windows))
