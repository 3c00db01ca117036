"""Predictions of the next label, and how far they are from the truth and from Bayes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from common.evaluation.calibration import coverage
from common.evaluation.scoring_rules import crps_normal
from projects.icl_uncertainty.prompts import Prompts

Array = jax.Array


class Prediction(NamedTuple):
  """Mean and standard deviation of y_t given H_t, both [..., T]."""

  mean: Array
  sd: Array


class Evaluation(NamedTuple):
  """A test set and what everyone says of it.

  Attributes:
    prompts: leaves [seeds, prompts, ...], NumPy.
    predictions: by name, [seeds, prompts, T].
  """

  prompts: Prompts
  predictions: dict[str, Prediction]


def gaussian_nll(prediction: Prediction, y: Array) -> Array:
  """log sd + (y - mean)^2 / (2 sd^2), nats without log(2 pi) / 2: the bi-objective loss. [..., T]"""
  return jnp.log(prediction.sd) + 0.5 * ((y - prediction.mean) / prediction.sd) ** 2


def by_position(prediction: Prediction, bayes: Prediction, truth: Array, y: Array):
  """The metrics of a predictor, averaged over prompts.

  Args:
    prediction, bayes: [prompts, T].
    truth: w' x_t, [prompts, T].
    y: labels, [prompts, T].

  Returns:
    {metric: [T]}: squared error to w' x and to the Bayes mean, |sd - Bayes sd|, negative
    log-likelihood, its gap to Bayes (the averaged difference of KL divergences from the truth),
    coverage of mean +- 1.96 sd, CRPS.
  """
  reach = 1.96 * prediction.sd
  nll = gaussian_nll(prediction, y).mean(0)
  return {
    "squared error": jnp.mean((prediction.mean - truth) ** 2, axis=0),
    "squared error to Bayes": jnp.mean((prediction.mean - bayes.mean) ** 2, axis=0),
    "sd error to Bayes": jnp.mean(jnp.abs(prediction.sd - bayes.sd), axis=0),
    "NLL": nll,
    "NLL gap": nll - gaussian_nll(bayes, y).mean(0),
    "coverage": coverage(prediction.mean - reach, prediction.mean + reach, y),
    "CRPS": jnp.mean(crps_normal(prediction.mean, prediction.sd, y), axis=0),
  }


def icl_score(sd: Array, sigma: Array) -> Array:
  """Slope of the least-squares line of predicted sd [n] on the task's sigma [n].

  1 follows the noise of the prompt (in-context learning), 0 ignores it (in-weight learning).
  """
  centred = sigma - sigma.mean()
  return (centred * sd).sum() / (centred**2).sum()
