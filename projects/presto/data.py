"""The paper's data: simulated (sections 4.1, 4.2), soup (4.3) and prediabetes (appendix B)."""

from typing import Literal, NamedTuple

import numpy as np

from common.data.tabular import encode, numeric, read_table
from common.paths import data_dir

_COEFFICIENT_DRAWS, _OUTCOME_DRAWS = 100, 10

SOUP_COVARIATES = "PROD DAY SOUPTYPE SOUPFREQ COLD EASY GENDER AGEGROUP LOCATION".split()
# Factors that the file codes as numbers.
_SOUP_FACTORS = ("DAY", "EASY")
PREDIABETES_COVARIATES = ("Age", "Sex", "IMD_Decile", "BMI", "HbA1C")


class Draw(NamedTuple):
  """One simulated data set."""

  x: np.ndarray  # [n, p] float64, uniform on [-1, 1]
  y: np.ndarray  # [n] int64, 0 ... K-1
  intercepts: np.ndarray  # [K-1]
  slopes: np.ndarray  # [K-1, p]
  probabilities: np.ndarray  # [n, K], of the classes given x


class OrdinalData(NamedTuple):
  """A real data set."""

  x: np.ndarray  # [n, p] float64
  y: np.ndarray  # [n] int64, 0 ... K-1, the rare class last
  names: list[str]  # [p]


def simulate(
  differences: Literal["sparse", "dense"],
  intercepts: tuple[float, ...],
  rng: np.random.Generator,
  *,
  n: int = 2500,
  p: int = 10,
  share: float = 0.5,
  size: float = 0.5,
) -> Draw:
  """Draws a relaxed proportional odds model and a sample of it.

  sparse (section 4.1): every entry of beta_0 is `size` with probability `share`, else 0; every
  entry of psi_k, k >= 1, is +-size with probability `share`, else 0. dense (section 4.2): all of
  them are uniform on [-size, size]. Coefficients and covariates are drawn again, up to 100 times,
  until no boundaries cross at any x; covariates and outcomes up to 10 times for one set of
  coefficients until every class occurs.

  Raises:
    ValueError: no draw was valid.
  """
  intercepts = np.asarray(intercepts, float)
  shape = (len(intercepts), p)
  for _ in range(_COEFFICIENT_DRAWS):
    if differences == "sparse":
      psi = size * (rng.random(shape) < share)
      psi[1:] *= rng.choice([-1, 1], (len(psi) - 1, p))
    else:
      psi = rng.uniform(-size, size, shape)
    slopes = np.cumsum(psi, axis=0)
    for _ in range(_OUTCOME_DRAWS):
      x = rng.uniform(-1, 1, (n, p))
      below = 1 / (1 + np.exp(-(intercepts + x @ slopes.T)))
      probabilities = np.diff(below, axis=1, prepend=0, append=1)
      if (probabilities < 0).any():
        break
      y = (rng.random((n, 1)) > below).sum(axis=1)
      if len(np.unique(y)) == len(intercepts) + 1:
        return Draw(x, y, intercepts, slopes, probabilities)
  raise ValueError(f"no valid draw of {differences} differences with intercepts {intercepts}")


def soup() -> OrdinalData:
  """1,847 ratings of sureness in 6 levels, reversed so that level 1 (12 %) is the last class.

  Raises:
    UserError: the data set is not there.
  """
  table = read_table(data_dir("soup") / "soup.csv", ["SURENESS", *SOUP_COVARIATES])
  y = 6 - numeric(table, "SURENESS").astype(np.int64)
  for name in _SOUP_FACTORS:
    # Two digits, so that the levels' alphabetical order is that of the numbers.
    table[name] = np.array([f"{int(value):02d}" for value in table[name]], object)
  x, names = encode(table, SOUP_COVARIATES)
  return OrdinalData(x, y, names)


def prediabetes(age_cutoff: int) -> OrdinalData:
  """3,059 patients at an age: no diagnosis, pre-diabetes, diabetes.

  Raises:
    UserError: the data set is not there.
  """
  ages = ("Age_PreDiabetes", "Age_Diabetes")
  path = data_dir("prediabetes") / "prediabetes.csv"
  table = read_table(path, [*PREDIABETES_COVARIATES, *ages])
  x, names = encode(table, PREDIABETES_COVARIATES)
  pre, full = (numeric(table, age) < age_cutoff for age in ages)
  return OrdinalData(x, np.where(full, 2, np.where(pre, 1, 0)), names)


def train_test_split(
  y: np.ndarray, test_share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Random row numbers of a training and a test part, both with every class.

  Raises:
    ValueError: 1000 draws did not give such parts.
  """
  classes, test_rows = len(np.unique(y)), round(test_share * len(y))
  for _ in range(1000):
    rows = rng.permutation(len(y))
    test, train = rows[:test_rows], rows[test_rows:]
    if len(np.unique(y[test])) == len(np.unique(y[train])) == classes:
      return train, test
  raise ValueError("no split has every class on both sides")
