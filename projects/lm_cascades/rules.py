"""Everything that a deferral rule can see of a task, and every rule's scores of the test inputs."""

from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from common.errors import UserError
from projects.lm_cascades import deferral, outputs, post_hoc, tasks
from projects.lm_cascades.outputs import Outputs, greedy_decode, intermediate_embedding, rescore
from projects.lm_cascades.post_hoc import Labels, Scorer

SUM, AVERAGE, BEST = "Chow-Sum", "Chow-Average", "Chow-Quantile, best alpha"
LENGTH, MEAN_ENTROPY, MAX_ENTROPY = "length", "mean entropy", "max entropy"
QUANTILE, EMBED_1, EMBED_12 = "Post-Hoc-Quantile", "Post-Hoc-Embed-1", "Post-Hoc-Embed-1+2"
RANDOM, ORACLE = "random", "oracle"
POST_HOC = (QUANTILE, EMBED_1, EMBED_12)


class Measured(NamedTuple):
  """What both models did with the n inputs of a task.

  Attributes:
    small, large: their greedy outputs.
    mask: bool [n, tokens], the small model's tokens that rules see.
    labels: quality of both answers.
    embed_1: float32 [n, dim of small], the small model's states, mean over its output.
    prompt_tokens: int [n].
  """

  small: Outputs
  large: Outputs
  mask: np.ndarray
  labels: Labels
  embed_1: np.ndarray
  prompt_tokens: np.ndarray


class Split(NamedTuple):
  """Rows of inputs: to fit rules on, to stop the fit and choose alpha by, and to judge by."""

  train: np.ndarray
  validation: np.ndarray
  test: np.ndarray

  @property
  def calibration(self) -> np.ndarray:
    return np.concatenate([self.train, self.validation])


def split(task: tasks.Task, config: ConfigDict, seed: int) -> Split:
  """Cuts the calibration inputs at random; the test inputs are the task's.

  Raises:
    UserError: a part would have fewer than 8 inputs.
  """
  order = np.random.default_rng(seed).permutation(task.calibration)
  held_out = round(config.validation_share * len(order))
  parts = Split(order[held_out:], order[:held_out], task.test)
  if min(map(len, parts)) < 8:
    raise UserError(
      f"{len(parts.train)} inputs to fit rules on, {len(parts.validation)} for validation and "
      f"{len(parts.test)} to test: expected at least 8 of each; give more examples"
    )
  return parts


def measure(task: tasks.Task, config: ConfigDict) -> Measured:
  """Runs both models on all inputs once; everything after that is arithmetic."""
  stop = task.stop_token
  decoding = {"stop_token": stop, "batch_size": config.decode_batch}
  small, large = (
    greedy_decode(model, task.prompts, max_new_tokens=task.max_new_tokens, **decoding)
    for model in (task.small, task.large)
  )
  _, embed_1 = rescore(task.small, task.prompts, small, **decoding)
  return Measured(
    small,
    large,
    outputs.scored_mask(small, stop, include_eos=config.include_eos),
    label(task, small, large, config),
    embed_1,
    np.array([len(prompt) for prompt in task.prompts]),
  )


def label(task: tasks.Task, small: Outputs, large: Outputs, config: ConfigDict) -> Labels:
  """Quality of both models' answers to every input."""
  score = lambda metric, answers: np.array(
    [
      tasks.quality(metric, task.decode(tokens), reference)
      for tokens, reference in zip(answers.texts(task.stop_token), task.references)
    ],
    np.float32,
  )
  graded = [score(config.metric, small), score(config.metric, large)]
  if config.quality_file:
    graded = list(tasks.read_quality(config.quality_file, len(task.prompts)).T)
  return Labels(*graded, score("exact", small), score("exact", large))


def embed_2(task: tasks.Task, config: ConfigDict, num_layers: int) -> np.ndarray:
  """The large model's intermediate states of all inputs, float32 [n, dim of large]."""
  return intermediate_embedding(
    task.large,
    task.prompts,
    num_layers=num_layers,
    stop_token=task.stop_token,
    batch_size=config.decode_batch,
  )


def fixed_scores(measured: Measured, alphas=deferral.ALPHAS) -> dict[str, np.ndarray]:
  """Scores of all inputs by the rules that learn nothing, float32 [n] each."""
  log_probs, mask = measured.small.log_probs, measured.mask
  scores = {
    SUM: deferral.chow_sum(log_probs, mask),
    AVERAGE: deferral.chow_average(log_probs, mask),
    LENGTH: deferral.length_score(mask),
    MEAN_ENTROPY: deferral.entropy_score(measured.small.entropies, mask, "mean"),
    MAX_ENTROPY: deferral.entropy_score(measured.small.entropies, mask, "max"),
  }
  quantiles = deferral.chow_quantile(log_probs, mask, np.array(alphas, np.float32))
  scores |= {quantile_name(a): quantiles[:, i] for i, a in enumerate(alphas)}
  return {name: np.asarray(score) for name, score in scores.items()}


def quantile_name(alpha: float) -> str:
  return f"Chow-Quantile-{alpha:.1f}"


def best_alpha(scores: dict[str, np.ndarray], labels: Labels, calibration: np.ndarray) -> float:
  """The alpha of the largest AUC-DC on calibration inputs."""
  small, large = labels.small[calibration], labels.large[calibration]
  area = lambda alpha: deferral.auc_dc(scores[quantile_name(alpha)][calibration], small, large)
  return max(deferral.ALPHAS, key=lambda alpha: float(area(alpha)))


def feature_sets(
  measured: Measured, intermediate: np.ndarray, num_quantiles: int
) -> dict[str, np.ndarray]:
  """phi of the three post-hoc rules, float32 [n, features] each."""
  quantiles = post_hoc.quantile_features(measured.small.log_probs, measured.mask, num_quantiles)
  one = np.concatenate([quantiles, measured.embed_1], axis=1)
  return {QUANTILE: quantiles, EMBED_1: one, EMBED_12: np.concatenate([one, intermediate], axis=1)}


def fit_rule(
  features: np.ndarray,
  labels: Labels,
  parts: Split,
  config: ConfigDict,
  seed: int,
  *,
  hidden: int,
  target: str | None = None,
) -> Scorer:
  """A post-hoc rule of the config's settings; `target` by default the config's."""
  return post_hoc.fit(
    features,
    labels,
    target=target or config.target,
    train=parts.train,
    validation=parts.validation,
    key=jax.random.key(seed),
    runs=config.runs,
    hidden=hidden,
    learning_rate=config.learning_rate,
    batch_size=config.learner_batch,
    epochs=config.epochs,
  )


def hidden_units(rule: str, config: ConfigDict) -> int:
  return config.hidden_quantile if rule == QUANTILE else config.hidden_embed
