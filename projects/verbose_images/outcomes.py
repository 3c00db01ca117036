"""Names of the conditions, and what was measured under them."""

from typing import NamedTuple

import numpy as np

from projects.verbose_images.defences import Detection
from projects.verbose_images.measures import Measured
from projects.verbose_images.verbose_images import (
  FIXED_WEIGHTS,
  NICG,
  SPONGE,
  VERBOSE,
  Objective,
)

ORIGINAL, NOISE, FULL, FIXED = "original", "random noise", "verbose images", "fixed weights"
SPONGE_NAME, NICG_NAME = "Sponge samples", "NICGSlowDown"
SINGLE = {
  "L1 (EOS)": Objective(eos=1.0),
  "L2 (uncertainty)": Objective(uncertainty=1.0),
  "L3 (diversity)": Objective(diversity=1.0),
}
PAIRS = {
  "L1 + L2": VERBOSE._replace(diversity=0.0),
  "L1 + L3": VERBOSE._replace(uncertainty=0.0),
  "L2 + L3": VERBOSE._replace(eos=0.0),
}
METHODS = {FULL: VERBOSE, SPONGE_NAME: SPONGE, NICG_NAME: NICG, FIXED: FIXED_WEIGHTS, **SINGLE}


class Found(NamedTuple):
  """What an attack of all images of a victim found.

  Attributes:
    images: float32 [images, height, width, channels].
    selected: mean length at selection, [images].
    history: the largest mean length so far after each iteration, [iterations, images].
    measured: with fresh keys.
  """

  images: np.ndarray
  selected: np.ndarray
  history: np.ndarray
  measured: Measured


class Defended(NamedTuple):
  """A defence: lengths of attacked and clean images behind it [images]; accuracy lost, or None."""

  attacked: np.ndarray
  clean: np.ndarray
  accuracy_loss: float | None


class SeedRun(NamedTuple):
  """One seed.

  Attributes:
    original, noise: measured.
    clean: the clean images.
    clean_greedy: the same, decoded greedily: the model's accuracy.
    found: of every method in `METHODS`.
    noise_images: of the noise baseline.
    images: the originals.
    decodings: {method of decoding: (lengths of originals, of verbose images)}.
    defences: {name: Defended}.
    detectors: {score: Detection}; empty where no caption was capped.
  """

  original: Measured
  noise: Measured
  clean: Measured
  clean_greedy: Measured
  found: dict[str, Found]
  noise_images: np.ndarray
  images: np.ndarray
  decodings: dict[str, tuple[np.ndarray, np.ndarray]]
  defences: dict[str, Defended]
  detectors: dict[str, Detection]


class Ablations(NamedTuple):
  """Of the first seed: {setting: Found}; caps with the originals' lengths beside them."""

  losses: dict[str, Found]
  eps: dict[float, Found]
  cap: dict[int, Found]
