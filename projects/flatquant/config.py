"""FlatQuant: learned affine transforms make 4-bit weights, activations and KV cache near lossless.

  ./run.sh flatquant
  ./run.sh flatquant --config=projects/flatquant/config.py:ablations
  ./run.sh flatquant --config=projects/flatquant/config.py:paper --config.model=/path/to/Llama-2-7b-hf

Expect, in the default preset: on a model with outliers, W4A4KV4 by rounding to nearest loses most of
what the model knows; FlatQuant costs about two hundredths of a nat per token, rotations, learned or
not, three.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "ablations", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      # lm-tiny, lm-small, or a Hugging Face directory.
      "model": "lm-small",
      # Bits of weights, activations and cache; 16 is full precision. On the model as it is, and on
      # a copy with activation outliers (same function), one draw of outlier channels per seed.
      "natural_settings": ("W3A3KV3",),
      "outlier_settings": ("W4A4KV4",),
      "outlier_fraction": 0.02,
      "outlier_gain": 30.0,
      # GPTQ on its own, and as the finisher of QuaRot and FlatQuant.
      "gptq": True,
      # The paper's ablation (LT, + PS, + LCT) on the outlier model's first setting.
      "ablation": True,
      # With the first seed, of the outlier model's first setting: each transform left out, sizes n1
      # of the left factors, and the parametrization by raw matrices.
      "locations": False,
      "left_sizes": (),
      "inverse": False,
      # Further settings, FlatQuant beside RTN and GPTQ, with the first seed.
      "other_settings": (),
      "domains": ("embedded:code", "embedded:prose", "embedded:science"),
      "calibration_samples": 32,
      "calibration_length": 64,
      # Where calibration activations lie while blocks are learned: "device", or "pinned_host", the host's
      # memory, from where every step fetches its batch.
      "sample_memory": "device",
      "seeds": (0, 1, 2),
      "eval_windows": 16,  # Per domain.
      "eval_length": 128,
      # Benchmarks of EleutherAI's harness, and how many questions of each (0: all).
      "tasks": (),
      "task_limit": 0,
      # The method.
      "matrices": "svd",
      "left_size": 0,  # n1; 0 takes the factors closest to each other.
      "scale_alpha": 0.3,
      "learning_rate": 5e-3,
      "clip_rate_factor": 10.0,
      "warmup_steps": 0,
      "epochs": 15,
      "batch_size": 8,
      # What baselines choose from, by their loss on the calibration text.
      "smoothquant_alphas": (0.5, 0.75),
      "quarot_clip_ratios": (1.0, 0.9),
    }
  )
  if preset == "tiny":
    config.model = "lm-tiny"
    config.natural_settings = ()
    config.gptq = False
    # The evaluation windows' sizes: their programs serve the calibration too.
    config.calibration_samples = 6
    config.calibration_length = 32
    config.seeds = (0,)
    config.eval_windows = 2
    config.eval_length = 32
    config.epochs = 4
    config.smoothquant_alphas = (0.5,)
    config.quarot_clip_ratios = (1.0,)
  if preset == "ablations":
    config.natural_settings = ()
    config.outlier_settings = ("W4A4KV4",)
    config.ablation = False
    config.locations = True
    config.left_sizes = (1, 2, 4, 16, 32, 64)
    config.inverse = True
    config.other_settings = ("W4A16KV16", "W3A16KV16", "W2A16KV16", "W16A16KV3")
    config.seeds = (0,)
  if preset == "paper":
    config.model = "meta-llama/Llama-2-7b-hf"
    config.natural_settings = ("W4A4KV4",)
    config.outlier_settings = ()
    config.ablation = False
    config.domains = ("data:wikitext2",)
    config.calibration_samples = 128
    config.calibration_length = 2048
    config.seeds = (0,)
    config.eval_windows = 0  # All.
    config.eval_length = 2048
    config.tasks = (
      "arc_challenge",
      "arc_easy",
      "hellaswag",
      "lambada_openai",
      "piqa",
      "winogrande",
    )
    config.batch_size = 4
    config.smoothquant_alphas = (0.5,)
  return config
