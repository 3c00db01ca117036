"""VPTQ: 2-bit weights as indices into codebooks, quantized one input channel at a time.

  ./run.sh vptq
  ./run.sh vptq --config=projects/vptq/config.py:paper --config.model=/path/to/Llama-2-7b-hf

Expect, in the default preset: the pass with feedback cuts the proxy error of k-means to about a
quarter, and 2.1 stored bits lose less than GPTQ's 2.6.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      # lm-tiny, lm-small, or a Hugging Face directory.
      "model": "lm-small",
      # Text domains: calibration takes from all of them, evaluation is on each one's test split.
      "domains": ("embedded:code", "embedded:prose", "embedded:science"),
      "calibration_samples": 32,
      "calibration_length": 128,
      # One calibration draw, and one start of every k-means, per seed.
      "seeds": (0, 1, 2),
      "eval_windows": 10,  # Per domain; 0 takes all.
      "eval_length": 256,
      "choice_questions": 30,
      # Tasks of the evaluation harness for the final model (needs lm-eval).
      "tasks": (),
      # The method (VPTQSettings). 2 index bits: log2(64) / 3.
      "vector_length": 3,
      "num_centroids": 64,
      "num_groups": 1,
      "permute": True,
      "normalize": False,
      "damping": 0.01,
      "kmeans_iterations": 30,
      # (v, k1, k2) of the two-stage variant, at about the same index bits.
      "residual": (4, 16, 16),
      # (fraction, v0, k0) of the variant with outlier channels; empty leaves it out.
      "outliers": (0.02, 2, 64),
      # Ablations, on the first seed: (v, k) at equal index bits, outlier fractions, groups.
      "vector_lengths": ((2, 16), (4, 256)),
      "outlier_fractions": (0.01, 0.05),
      "group_numbers": (2, 4),
      # RTN and GPTQ.
      "bits": 2,
      "group_size": 32,
      # Adam on centroids and norms: (steps, learning rate, samples per step).
      "layer_finetuning": (100, 1e-3, 4),
      "end_to_end_finetuning": (60, 1e-3, 4),
    }
  )
  if preset == "tiny":
    config.model = "lm-tiny"
    config.calibration_samples = 8
    config.calibration_length = 64
    config.seeds = (0,)
    config.eval_windows = 4
    config.eval_length = 64
    config.choice_questions = 8
    config.vector_length, config.num_centroids = 2, 16
    config.kmeans_iterations = 5
    config.vector_lengths = ()
    config.outlier_fractions = ()
    config.group_numbers = ()
    config.outliers = ()
    config.residual = (2, 16, 16)
    config.layer_finetuning = (5, 1e-3, 4)
    config.end_to_end_finetuning = (5, 1e-3, 4)
  if preset == "paper":
    config.model = "meta-llama/Llama-2-7b-hf"
    config.domains = ("data:wikitext2",)
    config.calibration_samples = 128
    config.calibration_length = 4096
    config.seeds = (0,)
    config.eval_windows = 0
    config.eval_length = 4096
    config.tasks = ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge")
    config.vector_length, config.num_centroids = 6, 4096
    config.normalize = True
    config.kmeans_iterations = 100
    config.residual = (12, 4096, 4096)
    config.outliers = (0.01, 4, 8192)
    config.vector_lengths = ((2, 16), (4, 256), (8, 65536))
    config.outlier_fractions = (0.02, 0.05)
    config.group_numbers = (4, 16)
    config.group_size = 128
    config.layer_finetuning = (100, 1e-4, 32)
    config.end_to_end_finetuning = (100, 1e-5, 1)
  return config
