"""Quantile aggregation: a library of quantile models combined with weights that may depend on x.

  ./run.sh quantile_aggregation
  ./run.sh quantile_aggregation --config=:full
  ./run.sh quantile_aggregation --config=:uci
  ./run.sh quantile_aggregation --config=projects/quantile_aggregation/config.py:paper
  ./run.sh quantile_aggregation --data=my.csv --outcome=y --covariates=a,b --levels=0.05,0.5,0.95

Expect, in the default preset: local fine weights ahead of the best single model, of averages and of
linear aggregation on real tables; on the synthetic set, where experts differ by region, coarse and
medium local weights 30 % ahead of global ones, but fine ones by little.
The second command has 19 levels for 9 and trains global weights for twice as long. The third runs
all six UCI tables, the larger ones capped (`--config.rows=0` for no cap).
The last command fits a table of your own: also --learners, --resolution, --calibration, --folds, --seed.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "full", "uci", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      "sets": ("diabetes", "yacht", "energy", "concrete"),
      "rows": 0,  # Keep at most so many rows of a set; 0 keeps all.
      "seeds": (0, 1, 2),
      "levels": 9,  # i / (levels + 1)
      "learners": ("CGN", "MQR", "RF", "GBM"),
      "folds": 5,
      "forms": (
        "global coarse",
        "global medium",
        "global fine",
        "global factored",
        "local coarse",
        "local medium",
        "local fine",
      ),
      "aggregator": "local fine",  # Which of them is calibrated and compared with the others.
      "isotoniser": "sort",  # Of every prediction: none, sort, pava, median_outwards, soft_sort.
      "margins": "constant",  # constant, adaptive or none
      # The random search of networks, aggregators and learners of scikit-learn.
      "budget": {
        "settings": 5,
        "tree_settings": 2,
        "layers": (2,),
        "widths": (64,),
        "max_rounds": 40,  # Of 100 steps.
        "global_rounds": 150,  # Of global aggregators: few parameters, which begin at 0.
        "patience": 5,
      },
      "expert_rows": 500,  # Of each part of the synthetic set; 0 leaves it out.
      # Switches of the local medium aggregator, one at a time, on these sets.
      "ablation_sets": ("yacht",),
    }
  )
  if preset == "tiny":
    config.sets, config.rows, config.seeds = ("diabetes",), 120, (0,)
    config.levels, config.learners, config.folds = 3, ("CGN", "RF"), 2
    config.budget = ConfigDict(
      {
        "settings": 2,
        "tree_settings": 1,
        "layers": (1,),
        "widths": (8,),
        "max_rounds": 2,
        "global_rounds": 10,
        "patience": 2,
      }
    )
    config.forms, config.aggregator = ("global medium", "local medium"), "local medium"
    config.expert_rows, config.ablation_sets = 200, ()
  if preset in ("full", "uci"):
    config.levels, config.budget.global_rounds = 19, 300
  if preset == "uci":
    config.sets = ("yacht", "energy", "concrete", "wine_quality_red", "kin8nm", "power")
    config.rows, config.seeds, config.ablation_sets, config.expert_rows = 1000, (0,), (), 0
    config.forms = ("global medium", "local medium", "local fine")
  if preset == "paper":
    config.sets = ("yacht", "energy", "concrete", "wine_quality_red", "kin8nm", "power")
    config.seeds, config.levels = (0, 1, 2, 3, 4), 99
    config.learners = ("CGN", "SQR", "MQR", "RF", "XT", "GBM")
    config.ablation_sets = config.sets
    config.budget = ConfigDict(
      {
        "settings": 20,
        "tree_settings": 20,
        "layers": (2, 3),
        "widths": (64, 128),
        "max_rounds": 500,
        "global_rounds": 500,
        "patience": 5,
      }
    )
  return config
