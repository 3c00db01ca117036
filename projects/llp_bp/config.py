"""Instance labels from the counts of bags: belief propagation, then supervised learning.

  ./run.sh llp_bp
  ./run.sh llp_bp --config=projects/llp_bp/config.py:paper
  ./run.sh llp_bp --data=my.csv --bag=district --count=positives --covariates=age,income

Expect, in the default preset: pseudo labels of belief propagation that are far better than the bags'
proportions, and a classifier trained on them that is level with learning from proportions directly
at bags of 8 and ahead of it at bags of 32 and 64.

The last command fits a table of your own; `./run.sh llp_bp --data --help` lists its flags.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      # "adult", "bank", "criteo" are read from FLAXWORKS_DATA, "cifar10" from TFDS.
      "datasets": ("breast_cancer", "digits"),
      "bag_sizes": (8, 32, 64),
      "seeds": 3,
      "validation_share": 0.1,
      "test_share": 0.2,
      # Rows that are kept of a larger set, drawn at random.
      "max_rows": 1_000_000,
      "baselines": ("DLLP", "EasyLLP", "GenBags", "LLP-VAT", "LLP-FC", "random labels"),
      # Bag size at which the switches of the method are tried, one at a time; 0: none.
      "switches_at": 32,
      # See llp_bp.Options. Tuples are chosen from on the validation part.
      "rounds": 2,
      "learned_embedding": True,
      "neighbours": (5, 10, 25),
      "lambda_s": (0.1, 0.25, 0.5),
      "lambda_bag": (4.0, 8.0, 12.0),
      "metric": "euclidean",
      "kernel": "constant",
      "kernel_width": 1.0,
      "max_distance": float("inf"),
      "bag_factor": "quadratic",
      "damping": 0.8,  # Below 0.72 pairs of bag mates oscillate at lambda_bag = 12: see the README.
      "max_iterations": 150,
      "tolerance": 1e-3,
      "pseudo_labels": "hard",
      "tau": 0.5,
      "lambda_a": 0.1,
      "encoder": "mlp",
      "hidden": (64, 64, 32),
      "learning_rate": (2e-3, 6e-3, 2e-2),
      "weight_decay": (1e-2,),
      "batch_rows": 256,
      "steps": 400,
      "validations": 25,
      "vat_strength": 1.0,
    }
  )
  if preset == "tiny":
    config.datasets = ("breast_cancer",)
    config.bag_sizes = (8,)
    config.seeds = 1
    config.baselines = ("DLLP", "random labels")
    config.switches_at = 0
    config.neighbours, config.lambda_s, config.lambda_bag = (10,), (0.5,), (4.0, 8.0)
    config.max_iterations = 20
    config.hidden = (16, 8)
    config.steps, config.validations = 40, 4
  if preset == "paper":
    config.datasets = ("adult", "bank", "criteo", "cifar10")
    config.bag_sizes = (8, 32, 128, 512, 2048)
    # 90/10, and 10 % of the first part for validation.
    config.validation_share, config.test_share = 0.09, 0.1
    config.rounds = 3
    config.lambda_s = (0.1, 0.25, 0.5, 1.0, 2.0)
    config.lambda_bag = (2.0, 4.0, 8.0, 12.0)
    # Pairs of bag mates do not fit into memory: 2048 per instance.
    config.bag_factor = "cardinality"
    config.max_iterations = 200
    config.hidden = (256, 256, 64)
    config.batch_rows = 2048
    config.steps, config.validations = 20_000, 100
  return config
