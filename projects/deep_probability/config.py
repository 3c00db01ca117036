"""CaPE: probabilities of inherently random events that are calibrated and still tell cases apart.

  ./run.sh deep_probability
  ./run.sh deep_probability --config=:paper --config.images=UTKFACE_FOLDER
  ./run.sh deep_probability --data=my.csv --outcome=y --covariates=a,b --workdir=DIR

Expect, in the default preset: against the known true probabilities, an overfitted network has
several times the error of an early-stopped one; CaPE can be trained on without that collapse, and
plain cross-entropy cannot; over methods the Brier score orders like the true error.

The last command fits a table of your own: also --targets (bin), --num_bins (10), --hidden (64,64),
--test_share (0.25), --seed (0).
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      # "digits": scikit-learn's digits, and normal vectors of this dimension (0: none) with a linear
      # log odds. "faces": UTKFace's images in a folder, resized to image_size.
      "inputs": "digits",
      "risks": ("linear", "discrete"),
      "dimension": 200,
      "images": "",
      "image_size": 200,
      # Outcomes and splits are drawn anew, for every problem, this often.
      "draws": 8,
      "train": 1000,
      "validation": 300,
      "test_normal": 2000,
      # The network of the digits; the normal vectors have a linear model, as the theory.
      "hidden": (256, 256),
      "hidden_normal": (),
      # The learning rate is halved after this many epochs without a better validation loss; 0 never
      # does. With 300 validation outcomes it would fall before the network can memorise.
      "patience": 0,
      # Stage 1.
      "epochs": 150,
      "batch_size": 250,
      "learning_rate": 0.05,
      # Stage 2, and plain cross-entropy of the same length.
      "fine_tune_epochs": 100,
      "fine_tune_rate": 0.005,
      # CaPE: B is chosen among `num_bins` by validation Brier score; c of both kinds; sigma and w.
      "num_bins": (5, 10, 15),
      "ordinary_epochs_bin": 2,
      "ordinary_epochs_kde": 3,
      "sigma": 0.05,
      "window": 100,
      # Training-time baselines.
      "focal_gamma": 2.0,
      "entropy_beta": 1.0,
      "mmce_beta": 3.0,
      "members": 5,
      "adversarial_eps": 0.01,
      # Recompute the paper's table from its saved outputs; a note says so when they are not there.
      "saved_outputs": True,
      "seed": 0,
    }
  )
  if preset == "tiny":
    config.risks = ("linear",)
    config.dimension = 0
    config.draws = 2
    config.train, config.validation = 200, 100
    config.hidden = (16,)
    # Both stages of one length: one compilation.
    config.epochs = config.fine_tune_epochs = 8
    config.batch_size = 50
    config.num_bins = (5, 10)
    config.window = 20
    config.members = 2
  if preset == "paper":
    config.inputs = "faces"
    config.risks = ("linear", "sigmoid", "skewed", "centered", "discrete")
    config.draws = 5
    config.patience = 5
    config.epochs = 200
    config.batch_size = 256
    config.learning_rate = 0.1
    config.fine_tune_epochs = 100
    config.fine_tune_rate = 1e-4
  return config
