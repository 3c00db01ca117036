"""ZeroQuant-V2: what post-training quantization costs, and what a low-rank correction wins back.

  ./run.sh zeroquant_v2
  ./run.sh zeroquant_v2 --config=projects/zeroquant_v2/config.py:paper \\
      --config.models="('/path/to/opt-6.7b',)"

Expect, in the default preset: 8-bit weights cost nothing and 2-bit ones a lot; a correction of rank 8
wins a good part of it back, whichever method rounded the weights.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  embedded = ("embedded:code", "embedded:prose", "embedded:science")
  config = ConfigDict(
    {
      # Base models or Hugging Face directories: sensitivity, LoRC's rank, trends over sizes.
      "models": (
        *("opt-small-64", "opt-small", "opt-small-192"),
        *("bloom-small-64", "bloom-small", "bloom-small-192"),
      ),
      # Of them, those on which the four methods are compared.
      "method_models": ("opt-small-64", "bloom-small-64"),
      # Perplexity is the mean over these, as the paper's over WikiText-2, PTB and C4.
      "corpora": ("embedded:code", "embedded:prose", "data:wikitext2"),
      "eval_windows": 12,  # Of each corpus; 0 takes all.
      "eval_length": 128,
      "eval_batch_size": 12,
      "calibration": ",".join(embedded),
      "calibration_samples": 32,
      "calibration_length": 128,
      # Where calibration activations lie while blocks are learned: "device", or "pinned_host", the host's
      # memory, from where every step fetches its batch.
      "sample_memory": "device",
      "seeds": (0, 1, 2),  # One calibration draw each.
      # What is rounded to nearest in the sensitivity study, and what with symmetric codes as well.
      "sensitivity": ("W8A16", "W4A16", "W3A16", "W2A16", "W16A8", "W16A4"),
      "symmetric_sensitivity": ("W4A16", "W16A8"),
      # Copies of every model with activation outliers (same function), each with a draw of channels.
      "outlier_draws": (0, 1, 2),
      "outlier_gain": 30.0,
      "methods": ("RTN", "GPTQ", "ZQ-Local", "ZQ-Global"),
      # What they are compared at: what is rounded, and how many inputs share a scale (-1: all).
      "method_settings": (("W3A16", -1), ("W2A16", -1), ("W2A16", 32)),
      "symmetric": False,  # Of the weights, there and in what follows.
      "scale_rule": "standard",  # Or "deepspeed", without GPTQ.
      "inputs": "quantized",  # Or "full_precision": what GPTQ and ZQ-* calibrate on.
      "damping": 0.01,
      # ZQ-Local and ZQ-Global.
      "distillation_steps": 60,
      "distillation_batch_size": 4,
      "learning_rates": (3e-4, 1e-3),
      # LoRC: its rank, and the weights and ranks of the sweep.
      "rank": 8,
      "factor_bits": 16,
      "rank_sweep_bits": (3, 2),
      "ranks": (0, 2, 4, 8, 16),
      # Block sizes of fine-grained scales (FGQ), -1 for one scale per output channel.
      "group_sizes": (-1, 32),
    }
  )
  if preset == "tiny":
    config.models = config.method_models = ("lm-tiny",)
    config.corpora = embedded[:2]
    config.eval_windows, config.eval_length, config.eval_batch_size = 2, 64, 4
    config.calibration_samples, config.calibration_length = 4, 64
    config.seeds, config.outlier_draws = (0,), (0,)
    config.sensitivity, config.symmetric_sensitivity = ("W2A16", "W16A8"), ()
    config.method_settings = (("W2A8", -1),)
    config.distillation_steps, config.learning_rates = 4, (1e-3, 3e-3)
    config.rank_sweep_bits, config.ranks = (2,), (0, 8)
    config.group_sizes = (-1,)
  if preset == "paper":
    config.models = ("facebook/opt-6.7b", "facebook/opt-13b")
    config.method_models = config.models
    # Its PTB is not at hand; C4 is read from TFDS.
    config.corpora = ("data:wikitext2", "tfds:c4/en")
    config.eval_windows, config.eval_length, config.eval_batch_size = 0, 2048, 1
    config.calibration = "tfds:c4/en"
    config.calibration_samples, config.calibration_length = 128, 2048
    config.seeds, config.outlier_draws = (0,), ()
    config.sensitivity = config.symmetric_sensitivity = ("W8A16", "W4A16", "W16A8")
    config.method_settings = (("W4A8", -1), ("W4A8", 256), ("W4A16", -1), ("W4A16", 256))
    config.distillation_steps, config.distillation_batch_size = 400, 1
    config.learning_rates = (5e-4, 5e-5, 5e-6, 5e-7)
    config.rank_sweep_bits, config.ranks = (4, 3, 2), (0, 4, 8, 16, 32)
    config.group_sizes = (-1, 1024, 512, 256, 128, 64, 32)
  return config
