"""DSL: regressions on machine-made labels, corrected with expert labels of a random few.

  ./run.sh dsl
  ./run.sh dsl --data=my.csv --outcome=label --covariates=x1,x2 --gold=label --surrogate=llm_label
  ./run.sh dsl --data=my.csv --help

Expect, in the default preset: regressions on surrogates that are right in 82 % of the documents have
intervals that never hold the truth; DSL's hold it in 95 %, and are a sixth narrower than those of
the labelled documents alone.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      # What to run: functions of experiment.py and real_data.py.
      "parts": (
        "main_experiment",
        "accuracy_sweep",
        "unequal_probabilities",
        "other_regressions",
        "learners",
        "power_analysis",
        "digits",
        "complaints",
      ),
      # Documents and expert labels of every simulated data set.
      "units": 4000,
      "labels": 500,
      "folds": 5,
      "seed": 0,
      # Claims are tested on so many blocks of draws (the "seeds" of a report).
      "blocks": 5,
      # Monte-Carlo draws of the main experiment, the digits and the other regressions; of the rest.
      "draws": 2000,
      "other_draws": 500,
      # Surrogate errors of the accuracy sweep.
      "errors": (0.3, 0.2, 0.1, 0.05, 0.01),
      # Draws of scikit-learn learners, one at a time.
      "sklearn_draws": 20,
      # Expert labels of the two real data sets, and of the power analysis.
      "digits_labels": 300,
      "power_labels": (250, 1000),
      # Random splits of the fit to the complaints of Pan and Chen (2018).
      "splits": 10,
      # A folder of CSV files with columns `text`, `label` (0 or 1) and covariates, labelled by a
      # language model; see README.md. For the part labelled_documents.
      "documents": "",
      "model": "",
      "shots": (0, 5),
    }
  )
  if preset == "tiny":
    config.parts = ("main_experiment", "power_analysis")
    config.units, config.labels = 600, 150
    config.draws, config.other_draws, config.sklearn_draws = 40, 20, 2
    config.blocks = 2
    config.digits_labels = 200
    config.power_labels = (300,)
    config.splits = 2
  if preset == "paper":
    config.parts = (*config.parts, "labelled_documents")
    config.units, config.labels = 10_000, 1000
    config.draws, config.other_draws, config.sklearn_draws = 5000, 2000, 100
    config.model = "/path/to/a/language/model"
    config.documents = "/path/to/documents"
  return config
