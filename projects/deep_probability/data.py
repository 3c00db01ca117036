"""Inputs with known probabilities, outcomes drawn from them, and the paper's saved outputs."""

import pathlib
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

from common.errors import UserError
from common.paths import data_dir
from projects.deep_probability.training import Draw

# psi(z) of the age z, which is cut off at 100: the paper's scenarios.
RISKS = {
  "linear": lambda z: z / 100,
  # As its loader computes it; its README has 1 minus that.
  "sigmoid": lambda z: 1 - 1 / (1 + np.exp(-25 * (z / 100 - 0.29))),
  "skewed": lambda z: z / 250,
  "centered": lambda z: z / 300 + 0.35,
  # The loader's >=; the README has >.
  "discrete": lambda z: 0.1 + 0.2 * np.sum([z >= age for age in (20, 40, 60, 80)], axis=0),
}


class Problem(NamedTuple):
  """N inputs and their true probabilities; draws of outcomes are split into n, m and the rest.

  Attributes:
    name: of the scenario.
    x: [N, d] float32, or [N, height, width, 3] uint8.
    p: [N] float64.
    train, validation: n and m.
  """

  name: str
  x: np.ndarray
  p: np.ndarray
  train: int
  validation: int


def digits(risk: str, *, train: int = 1000, validation: int = 300) -> Problem:
  """scikit-learn's 1,797 digits of 8 x 8 pixels; a digit c is of age 10 c + 5."""
  images, classes = load_digits(return_X_y=True)
  x = (images / 16).astype(np.float32)
  return Problem(f"digits, {risk}", x, RISKS[risk](10.0 * classes + 5), train, validation)


def high_dimensional(
  *, features: int = 200, train: int = 1000, validation: int = 300, test: int = 2000, seed: int = 0
) -> Problem:
  """x ~ N(0, I_d), p = sigmoid(x'b) with b of length 2: the log odds have a variance of 4."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((train + validation + test, features))
  b = rng.standard_normal(features)
  p = 1 / (1 + np.exp(-2 * x @ (b / np.linalg.norm(b))))
  return Problem(f"normal, d = {features}", x.astype(np.float32), p, train, validation)


def faces(folder: str, risk: str, *, size: int) -> Problem:
  """UTKFace: images whose names begin with the age, such as 26_1_0_20170116.jpg.

  A fifth of the images is held out for validation, and a fifth for the test.

  Args:
    folder: of the images, .jpg or .png.
    risk: a key of RISKS.
    size: images are resized to size x size.

  Raises:
    UserError: no such folder, fewer than 100 images, or a name that does not begin with an age.
  """
  from PIL import Image

  if not folder:
    raise UserError(
      "this preset needs face images with ages: give --config.images=FOLDER of UTKFace's files"
    )
  root = pathlib.Path(folder).expanduser()
  files = sorted([*root.glob("*.jpg"), *root.glob("*.png")])
  if len(files) < 100:
    raise UserError(f"{root} has {len(files)} .jpg and .png files; expected at least 100")
  ages = []
  for file in files:
    age = file.name.split("_")[0]
    if not age.isdecimal():
      raise UserError(f"{file.name} does not begin with an age, as 26_1_0_20170116.jpg does")
    ages.append(float(age))
  x = np.empty((len(files), size, size, 3), np.uint8)
  for row, file in zip(x, files):
    with Image.open(file) as image:
      row[:] = image.convert("RGB").resize((size, size))
  held_out = len(files) // 5
  p = RISKS[risk](np.minimum(ages, 100))
  return Problem(f"faces, {risk}", x, p, len(files) - 2 * held_out, held_out)


def draw(problem: Problem, draws: int, seed: int) -> Draw:
  """Outcomes y ~ Bernoulli(p) and a random split, drawn anew in every draw; stacked."""
  stacked = []
  for number in range(draws):
    rng = np.random.default_rng([seed, number])
    y = rng.random(len(problem.p)) < problem.p
    rows = rng.permutation(len(problem.p)).astype(np.int32)
    parts = np.split(rows, [problem.train, problem.train + problem.validation])
    stacked.append(Draw(y.astype(np.float32), problem.p.astype(np.float32), *parts))
  return Draw(*map(np.stack, zip(*stacked)))


class Outputs(NamedTuple):
  """A saved model's held-out rows: forecasts, outcomes, true probabilities, each float64 [4738]."""

  p_hat: np.ndarray
  y: np.ndarray
  p: np.ndarray


SAVED_SCENARIOS = {"linear": "unif", "discrete": "discrete"}
SAVED_MODELS = ("infinite", "overfit", "early_stop", "cape_bin")


def saved_outputs() -> dict[tuple[str, str], Outputs]:
  """The published outputs of the paper's ResNet-18: {(scenario, model): outputs}.

  Raises:
    UserError: the data set is not there.
  """
  path = data_dir("cape_face_outputs") / "outputs.npz"
  if not path.is_file():
    raise UserError(f"no such file: {path}")
  arrays = np.load(path)
  return {
    (scenario, model): Outputs(
      *(arrays[f"{name}_{model}_{part}"].astype(np.float64) for part in ("prob", "y", "p_true"))
    )
    for scenario, name in SAVED_SCENARIOS.items()
    for model in SAVED_MODELS
  }
