"""AWQ: scales found from activations keep 3- and 4-bit weights close to full precision.

  ./run.sh awq
  ./run.sh awq --config=projects/awq/config.py:paper --config.model=/path/to/Llama-2-7b-hf

Expect, in the default preset: about 60 % of the loss that round-to-nearest costs at INT3 is
won back on the outlier model. The natural model is too small to have outliers, and wins nothing.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  embedded = ("embedded:code", "embedded:prose", "embedded:science")
  config = ConfigDict(
    {
      # lm-tiny, lm-small, or a Hugging Face directory.
      "model": "lm-small",
      "bits": 3,
      "group_size": 32,
      # Further widths in the main table, on the first calibration draw.
      "other_bits": (4, 2),
      # Also test a copy of the model with activation outliers (same function).
      "outlier_variant": True,
      # Text domains: calibration takes from all of them, evaluation is on each one's test split.
      "domains": embedded,
      "calibration_samples": 32,
      "calibration_length": 128,
      # One calibration draw per seed.
      "seeds": (0, 1, 2, 3, 4),
      "eval_windows": 10,  # Per domain.
      "eval_length": 256,
      "choice_questions": 30,
      # Table 1 and Table 2 of the paper.
      "salient_fractions": (0.001, 0.01, 0.03),
      "salient_scales": (1.0, 1.25, 1.5, 2.0, 4.0),
      # Draws of the calibration-domain x evaluation-domain matrix (0 skips it).
      "matrix_draws": 3,
      # Calibration set sizes of the sample-efficiency curve (empty skips it).
      "sample_sizes": (1, 4, 16, 32),
      "sample_draws": 3,
      # Search settings of the reference code.
      "scale_grid": 20,
      "clip_grid": 20,
      "max_shrink": 0.5,
      "scale_stat": "mean",
    }
  )
  if preset == "tiny":
    config.model = "lm-tiny"
    config.other_bits = ()
    config.outlier_variant = False
    config.calibration_samples = 4
    config.calibration_length = 32
    config.seeds = (0, 1)
    config.eval_windows = 4
    config.eval_length = 32
    config.choice_questions = 8
    config.salient_fractions = (0.03,)
    config.salient_scales = (1.0, 2.0)
    config.matrix_draws = 1
    config.sample_sizes = (4,)
    config.sample_draws = 1
  if preset == "paper":
    config.model = "meta-llama/Llama-2-7b-hf"
    config.group_size = 128
    config.other_bits = (4,)
    config.outlier_variant = False
    config.domains = ("data:wikitext2",)
    config.calibration_samples = 128
    config.calibration_length = 512
    config.seeds = (42,)
    config.eval_windows = 0  # All.
    config.eval_length = 2048
    config.matrix_draws = 0
    config.sample_sizes = ()
  return config
