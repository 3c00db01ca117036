"""CaPE and all baselines, trained on every draw of a problem."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from scipy.special import expit

from projects.deep_probability import cape, posthoc
from projects.deep_probability.data import Problem, draw
from projects.deep_probability.networks import Network, Weights
from projects.deep_probability.training import Draw, Recipe, Settings, Trained, starts, train

INFINITE, OVERFIT, EARLY = "infinite data", "CE, overfit", "CE, early stop"
FOCAL, ENTROPY, ENSEMBLE = "focal", "entropy-regularised", "deep ensemble"
MMCE, MMCE_PUBLISHED = "MMCE", "MMCE, as published"
CE_TUNED, CE_TUNED_LAST = "CE, fine-tuned", "CE, fine-tuned, last epoch"
CAPE_BIN, CAPE_BIN_LAST = "CaPE-bin", "CaPE-bin, last epoch"
CAPE_KDE, CAPE_KDE_LAST = "CaPE-kde", "CaPE-kde, last epoch"


class Outcome(NamedTuple):
  """What the methods say about the test rows of every draw.

  Attributes:
    y, p: outcomes and true probabilities, [draws, k].
    p_hat: {method: [draws, k]}.
    curves: MSE_p after every epoch, {stage: [draws, epochs + 1]}.
    num_bins: B of CaPE-bin's best epoch, chosen on validation, [draws].
    moved: draws whose CaPE-bin is not the starting point.
  """

  y: np.ndarray
  p: np.ndarray
  p_hat: dict[str, np.ndarray]
  curves: dict[str, np.ndarray]
  num_bins: np.ndarray
  moved: int


def settings_of(config: ConfigDict) -> tuple[Settings, Settings]:
  """Of stage 1 and of stage 2."""
  # Without patience, more epochs than there are: the rate never falls.
  patience = config.patience or max(config.epochs, config.fine_tune_epochs) + 1
  first = Settings(config.epochs, config.batch_size, config.window, patience=patience)
  return first, first._replace(epochs=config.fine_tune_epochs)


def run_methods(
  problem: Problem,
  network: Network,
  config: ConfigDict,
  progress: Callable[[str], None] = lambda _: None,
) -> Outcome:
  """Trains and calibrates everything; `progress` is told each method's name when it starts."""
  first, second = settings_of(config)
  draws = draw(problem, config.draws, config.seed)
  x = jax.numpy.asarray(problem.x)
  # One key per method's start and shuffles and draw; all methods but the ensemble share them.
  member_keys = jax.random.split(jax.random.key(config.seed), (config.members, 2, config.draws))
  start = starts(network, member_keys[0, 0])

  def fit(name: str, settings: Settings, start: Weights, keys, recipe: Recipe) -> Trained:
    progress(name)
    trained = train(start, keys, x, draws, recipe, network=network, settings=settings)
    return jax.block_until_ready(trained)

  stage_1 = lambda name, **changes: fit(
    name, first, start, member_keys[0, 1], Recipe(config.learning_rate, **changes)
  )
  plain = stage_1(EARLY)
  infinite = stage_1(INFINITE, targets=cape.REDRAWN)
  p_hat = {
    INFINITE: last(infinite.test),
    OVERFIT: last(plain.test),
    EARLY: at_best(plain, plain.test),
  }
  p_hat |= calibrated(plain, draws)
  for name, changes in {
    FOCAL: {"focal_gamma": config.focal_gamma},
    ENTROPY: {"entropy_beta": config.entropy_beta},
    MMCE: {"mmce_beta": config.mmce_beta, "mmce_power": 1.0},
    MMCE_PUBLISHED: {"mmce_beta": config.mmce_beta},
  }.items():
    trained = stage_1(name, **changes)
    p_hat[name] = at_best(trained, trained.test)
  adversarial = Recipe(config.learning_rate, adversarial_eps=config.adversarial_eps)
  members = [
    fit(ENSEMBLE, first, starts(network, start_keys), keys, adversarial)
    for start_keys, keys in member_keys
  ]
  p_hat[ENSEMBLE] = np.mean([at_best(member, member.test) for member in members], axis=0)

  fine_tune_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(member_keys[0, 1])
  stage_2 = lambda name, **changes: fit(
    name, second, plain.best, fine_tune_keys, Recipe(config.fine_tune_rate, **changes)
  )
  tuned = stage_2(CE_TUNED)
  bins = [
    stage_2(
      f"{CAPE_BIN}, B = {b}",
      targets=cape.BIN,
      num_bins=b,
      ordinary_epochs=config.ordinary_epochs_bin,
    )
    for b in config.num_bins
  ]
  kde = stage_2(
    CAPE_KDE,
    targets=cape.KDE,
    sigma=config.sigma,
    ordinary_epochs=config.ordinary_epochs_kde,
  )
  y_validation = np.take_along_axis(draws.y, draws.validation, axis=1)
  best, chosen = choose(bins, at_best, y_validation)
  final, chosen_last = choose(bins, lambda _, z: last(z), y_validation)
  p_hat |= {
    CE_TUNED: at_best(tuned, tuned.test),
    CAPE_BIN: best,
    CAPE_KDE: at_best(kde, kde.test),
    CE_TUNED_LAST: last(tuned.test),
    CAPE_BIN_LAST: final,
    CAPE_KDE_LAST: last(kde.test),
  }
  p = problem.p[draws.test]
  curve = lambda z: np.mean((expit(np.asarray(z, np.float64)) - p[:, None]) ** 2, axis=2)
  bin_curves = np.stack([curve(trained.test) for trained in bins])
  each = np.arange(config.draws)
  return Outcome(
    y=np.take_along_axis(draws.y, draws.test, axis=1),
    p=p,
    p_hat=p_hat,
    curves={
      "CE": curve(plain.test),
      INFINITE: curve(infinite.test),
      CE_TUNED: curve(tuned.test),
      CAPE_BIN: bin_curves[chosen_last, each],
      CAPE_KDE: curve(kde.test),
    },
    num_bins=np.asarray(config.num_bins)[chosen],
    moved=int(sum(np.asarray(bins[c].best_epoch)[i] > 0 for i, c in enumerate(chosen))),
  )


def last(z: jax.Array) -> np.ndarray:
  """Probabilities of the last epoch; log odds [draws, epochs + 1, k] -> [draws, k]."""
  return expit(np.asarray(z[:, -1], np.float64))


def at_best(trained: Trained, z: jax.Array) -> np.ndarray:
  """Probabilities of the best validation epoch; log odds [draws, epochs + 1, k] -> [draws, k]."""
  return expit(best_log_odds(trained, z))


def best_log_odds(trained: Trained, z: jax.Array) -> np.ndarray:
  """float64 [draws, k] of [draws, epochs + 1, k]."""
  z, epoch = np.asarray(z, np.float64), np.asarray(trained.best_epoch)
  return z[np.arange(len(z)), epoch]


def calibrated(trained: Trained, draws: Draw) -> dict[str, np.ndarray]:
  """Every post-hoc calibrator on the early-stopped network: {name: [draws, k]}."""
  y = np.take_along_axis(draws.y, draws.validation, axis=1)
  fitted_on = best_log_odds(trained, trained.validation)
  applied_to = best_log_odds(trained, trained.test)
  return {
    name: np.stack([fit(*part)(z) for *part, z in zip(fitted_on, y, applied_to)])
    for name, fit in posthoc.CALIBRATORS.items()
  }


def choose(
  candidates: list[Trained], at: Callable[[Trained, jax.Array], np.ndarray], y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """The candidate with the smallest validation Brier score, in every draw.

  Args:
    candidates: trained alike but for one number.
    at: (trained, log odds [draws, epochs + 1, rows]) -> probabilities [draws, rows].
    y: outcomes of the validation rows, [draws, m].

  Returns:
    Its probabilities of the test rows [draws, k], and its index [draws].
  """
  brier = [np.mean((at(c, c.validation) - y) ** 2, axis=1) for c in candidates]
  chosen = np.argmin(brier, axis=0)
  test = np.stack([at(c, c.test) for c in candidates])
  return test[chosen, np.arange(len(y))], chosen
