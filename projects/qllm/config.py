"""QLLM: outlier channels split, similar channels merged, a low-rank term tuned and merged.

  ./run.sh qllm
  ./run.sh qllm --config=projects/qllm/config.py:paper --config.model=/path/to/llama-7b-hf
  ./run.sh qllm --config=projects/qllm/config.py:paper --compile_only=v5e:2x2

Expect, in the default preset, on a model with outlier channels: at W4A4 QLLM is far better than
rounding to nearest, and methods that scale channels equivalently are better still (the README says why).
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      # A base model or a Hugging Face directory with a decoder.
      "model": "lm-small",
      # WxAy, and the methods (of `methods.main_methods`) at the first and at the others.
      "settings": ("W4A4", "W6A6"),
      "methods": (
        "RTN",
        "SmoothQuant",
        "OS+",
        "OmniQuant",
        "EEC only",
        "QLLM, no tuning",
        "QLLM",
      ),
      "other_methods": ("RTN", "SmoothQuant", "QLLM"),
      # Outliers that leave the model's function alone: this share of the channels of each norm, and of
      # the inputs of down_proj, is multiplied by the gain.
      "outliers": True,
      "outlier_fraction": 0.016,
      "outlier_gain": 20.0,
      # Also the model without them, without tuning.
      "natural": True,
      # Of the calibration text, and of the evaluation (see common/data/sources.py).
      "domains": ("embedded:code", "embedded:prose", "embedded:science"),
      "eval_domains": ("embedded:code", "embedded:prose", "embedded:science"),
      "calibration_samples": 32,
      "calibration_length": 128,
      # Where calibration activations lie while blocks are learned: "device", or "pinned_host", the host's
      # memory, from where every step fetches its batch.
      "sample_memory": "device",
      # One draw of calibration text and of outlier channels per seed.
      "seeds": (0, 1, 2),
      # Ablations of the reassembly on all seeds; of the tuning on so many.
      "ablations": True,
      "tuning_ablation_seeds": 1,
      "fixed_threshold": 8.0,
      "ranks": (16,),
      "rounds": (1, 4),
      "eval_windows": 16,  # Per domain; 0 for all.
      "eval_length": 128,
      # Benchmarks of EleutherAI's harness, and how many questions of each (0: all).
      "tasks": (),
      "task_limit": 0,
      # Reassembly.
      "channel_ratio": 0.2,
      "score": "code",
      "search_samples": 4,
      # Tuning.
      "rank": 4,
      "blocks_per_round": 2,
      "merge": "requant",
      "epochs": 3,
      "batch_size": 2,
      "learning_rate": 3e-2,
      "all_weights_learning_rate": 2e-3,
      "final_norm": True,
      # Baselines.
      "smoothquant_alphas": (0.25, 0.5, 0.75),
      "osplus_lower_fraction": 0.01,
      "omniquant_learning_rate": 5e-3,
    }
  )
  if preset == "tiny":
    config.model = "lm-tiny"
    config.settings = ("W4A4",)
    config.methods = ("RTN", "QLLM, no tuning", "QLLM")
    config.natural = False
    config.ablations = False
    config.calibration_samples = 4
    config.calibration_length = 16
    config.seeds = (0,)
    config.eval_windows = 2
    config.eval_length = 32
    config.search_samples = 2
    config.epochs = 4
    config.final_norm = False
  if preset == "paper":
    # The official scripts' LLaMA W4A4.
    config.model = "meta-llama/Llama-2-7b-hf"
    config.settings = ("W4A4", "W6A6", "W4A8")
    config.other_methods = config.methods
    config.outliers = False
    config.natural = False
    config.ablations = False
    config.domains = ("data:wikitext2",)
    config.eval_domains = ("data:wikitext2",)  # And C4's validation set as file:PATH.
    config.calibration_samples = 128
    config.calibration_length = 2048
    config.seeds = (2,)
    config.eval_windows = 0
    config.eval_length = 2048
    config.tasks = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande")
    config.search_samples = 1
    config.blocks_per_round = 4
    config.epochs = 10
    config.batch_size = 1
    config.learning_rate = 5e-4
    config.osplus_lower_fraction = 1.0
  return config
