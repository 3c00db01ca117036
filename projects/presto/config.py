"""PRESTO: rare classes of an ordered outcome, estimated by shrinking towards proportional odds.

  ./run.sh presto
  ./run.sh presto --config=projects/presto/config.py:paper
  ./run.sh presto --data=my.csv --outcome=y --order=no,maybe,yes --covariates=x1,x2 --workdir=DIR

Expect, in the default preset: a smaller error of the rare class's probability than logistic
regression and than proportional odds in the simulations; on soup and prediabetes the differences
between the methods' calibration are small.

The last command fits a table of your own: also --l1_ratio (1), --num_lambdas (100),
--smallest_ratio (1e-4), --folds (5), --seed (0).
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      # Sections 4.1 and 4.2: n observations of p covariates, 4 classes.
      "observations": 2500,
      "covariates": 10,
      "replications": 20,
      "shares": (0.5,),  # Of nonzero differences, in the sparse design.
      # The intercepts of the settings after the first, which is 0.
      "sparse_intercepts": ("3,5", "3.5,5.5", "4,6"),
      "dense_intercepts": ("3,5", "3.5,5.5", "4,6"),
      "simulated_lambdas": 20,
      "simulated_smallest_ratio": 0.01,
      # Also fit the ridge variant in the simulations.
      "ridge": True,
      # Section 4.3 and appendix B; skipped with a note when the data sets are not there.
      "soup_splits": 10,
      "prediabetes_splits": 5,
      "age_cutoffs": (40, 50, 60),
      "real_lambdas": 100,
      "real_smallest_ratio": 1e-4,
      "test_share": 0.1,
      # Predict from the intercepts of the published code, which mis-corrects the centring.
      "legacy_intercept": False,
      "folds": 5,
      "seed": 0,
      # Appendix E: rows of a Monte Carlo expectation, and repetitions.
      "condition_rows": 100_000,
      "condition_repetitions": 5,
    }
  )
  if preset == "tiny":
    # The shapes of the prediabetes splits, so that both compile once.
    config.observations = 2753
    config.covariates = 5
    config.replications = config.prediabetes_splits = 2
    config.sparse_intercepts = config.dense_intercepts = ("3",)
    config.simulated_lambdas = 6
    config.ridge = False
    config.soup_splits = 0
    config.age_cutoffs = (60,)
    config.real_lambdas = 6
    config.condition_rows = 1000
    config.condition_repetitions = 2
  if preset == "paper":
    config.replications = 700
    config.shares = (1 / 3, 1 / 2)
    config.dense_intercepts = ("2.5,4.5", "3,5", "3.5,5.5", "4,6")
    config.soup_splits = 350
    config.prediabetes_splits = 49
    config.age_cutoffs = (30, 35, 40, 45, 50, 55, 60, 65)
    config.condition_rows = 1_000_000
    config.condition_repetitions = 25
  return config
