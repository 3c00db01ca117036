"""AdaDim: 3-bit weights whose groups run along the input or the output, chosen for each linear.

  ./run.sh adadim
  ./run.sh adadim --config=projects/adadim/config.py:paper --config.model=/path/to/Llama-2-7b-hf

Expect, in the default preset: where a few input channels are outliers, groups along the output
leave a fraction of the error of groups along the input, and the adaptive choice finds them.
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
      # natural; norm_outliers (after the norms) and down_outliers (before down_proj), which compute
      # the same function.
      "variants": ("natural", "norm_outliers", "down_outliers"),
      "outlier_fraction": 0.02,
      "outlier_gain": 30.0,
      # Calibration draws; each also draws the outlier channels.
      "seeds": (0, 1, 2),
      # General calibration takes from all domains; evaluation is on each one's test split.
      "domains": embedded,
      "calibration": ",".join(embedded),
      # Task-specific calibration sets, each evaluated on its own test split (empty skips them).
      "task_domains": ("embedded:code", "embedded:prose"),
      "calibration_samples": 32,
      "calibration_length": 128,
      # Drop calibration documents of more tokens (0 keeps all).
      "max_document_tokens": 0,
      "eval_windows": 10,  # Per domain; 0 takes all.
      "eval_length": 256,
      "choice_questions": 30,
      # Bits x group sizes, on the first seed and the first variant with outliers (empty skips it).
      "sweep_bits": (2, 3, 4),
      "sweep_group_sizes": (32, 64, 128),
      # The block whose sensitivity is mapped, and on how many calibration samples (0 skips it).
      "sensitivity_block": 1,
      "sensitivity_samples": 16,
      # gsm8k, humaneval, piqa, or any other task by its name in EleutherAI's harness.
      "tasks": (),
      "task_limit": 0,  # Questions of each task; 0 asks all.
      "gsm8k_shots": 8,
      # HumanEval runs what the model writes.
      "allow_execution": False,
      # GPTQ's damping, and what AdaDim's choice is compared with (fp or code).
      "damping": 0.01,
      "reference": "fp",
    }
  )
  if preset == "tiny":
    config.model = "lm-tiny"
    config.variants = ("norm_outliers",)
    config.seeds = (0, 1)
    config.domains = ("embedded:code",)
    config.calibration = "embedded:code"
    config.task_domains = ("embedded:prose",)
    config.calibration_samples = 4
    config.calibration_length = 32
    config.eval_windows = 4
    config.eval_length = 32
    config.choice_questions = 8
    config.sweep_bits = ()
    config.sensitivity_samples = 2
  if preset == "paper":
    config.model = "meta-llama/Llama-2-7b-hf"
    config.group_size = 128
    config.variants = ("natural",)
    config.seeds = (42,)
    config.domains = ("data:wikitext2",)
    # The paper: the Pile's validation set; file:PATH reads it as JSON lines.
    config.calibration = "data:wikitext2"
    config.task_domains = ()
    config.calibration_samples = 256
    config.calibration_length = 512
    config.max_document_tokens = 512
    config.eval_windows = 0
    config.eval_length = 2048
    config.sweep_bits = ()
    config.tasks = ("piqa", "gsm8k")
  return config
