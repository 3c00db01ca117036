"""Outlier Suppression+: a shift and a scale per channel make activations easy to round.

  ./run.sh outlier_suppression_plus
  ./run.sh outlier_suppression_plus --config=:encoder       # a real BERT, all-MiniLM-L6-v2
  ./run.sh outlier_suppression_plus --config=:paper --config.model=/path/to/Llama-2-7b-hf
  ./run.sh outlier_suppression_plus --config=:paper --config.model=/path/to/opt-6.7b \
    --config.settings="('W8A8','W6A6')" --config.lower_bound=1.0

Expect, in the default preset: on a model with asymmetric outliers, 6-bit static quantization costs
0.2 nats per token with MinMax ranges and 0.002 with Outlier Suppression+.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "encoder", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      # A base model or a Hugging Face directory with a decoder; "" leaves decoders out.
      "model": "opt-small",
      # The formats, see `methods.settings_of`.
      "settings": ("W8A8", "W6A6", "W4A4 per token", "W4A4 per group"),
      "group_size": 32,
      # The model that is quantized has outliers put in: of this share of each norm's channels, the
      # gain is multiplied and the bias shifted, by so many standard deviations of a usual channel.
      "outliers": True,
      "outlier_fraction": 0.02,
      "outlier_gain": 10.0,
      "outlier_shift": 60.0,
      # Other families, with outliers (not shifted in Llama, which has no bias for it).
      "other_models": ("bloom-small", "lm-small"),
      "other_settings": ("W6A6", "W4A4 per token"),
      "ablation_settings": ("W6A6",),
      "domains": ("embedded:code", "embedded:prose", "embedded:science"),
      "calibration_samples": 8,
      "calibration_length": 128,
      # One draw of calibration text and of outlier channels per seed.
      "seeds": (0, 1, 2),
      "eval_windows": 16,  # Per domain.
      "eval_length": 128,
      # Calibration set sizes of the curve (empty skips it).
      "sample_sizes": (1, 2, 8),
      # Benchmarks of EleutherAI's harness, and how many questions of each (0: all).
      "tasks": (),
      "task_limit": 0,
      # The search of the scale.
      "lower_bound": 1.0,
      "lower_fraction": 0.01,
      "search_samples": 2,
      "linear_to_linear": True,
      # Static ranges.
      "observer": "average_min_max",
      "percentile": 99.99,
      # Hyper-parameters that the baselines choose by their loss on the calibration text.
      "smoothquant_alphas": (0.25, 0.5, 0.75),
      "clipping_steps_8": 10,
      "clipping_steps": 20,
      # A checkpoint of FLAXWORKS_MODELS or a directory with an encoder; "" leaves encoders out.
      "encoder": "",
      "encoder_settings": ("W8A8", "W6A6", "W4A4"),
      "encoder_methods": ("MinMax", "ZeroQuant", "SmoothQuant", "Outlier Suppression", "OS+"),
      "encoder_calibration": 16,
      "encoder_queries": 20,
      "encoder_documents": 1000,
      "encoder_length": 128,
      # JSON lines of a classification task (GLUE) for an encoder with a head: calibration, test.
      "labelled_train": "",
      "labelled_test": "",
      "labelled_fields": ("sentence", "label"),
    }
  )
  if preset == "tiny":
    config.model = "lm-tiny"
    config.settings = ("W4A4 per token",)
    config.other_models = ()
    config.ablation_settings = ()
    config.calibration_samples = 12
    config.calibration_length = 32
    config.seeds = (0,)
    config.eval_windows = 4
    config.eval_length = 32
    config.sample_sizes = ()
    config.smoothquant_alphas = (0.5,)
  if preset == "encoder":
    config.model = ""
    config.encoder = "all-minilm-l6-v2"
    config.seeds = (0,)
  if preset == "paper":
    config.model = "meta-llama/Llama-2-7b-hf"
    config.settings = ("W6A6 per token", "W4A4 per token")
    config.group_size = 1024
    config.outliers = False
    config.other_models = ()
    config.ablation_settings = ()
    config.domains = ("data:wikitext2",)
    config.calibration_samples = 128
    config.calibration_length = 2048
    config.seeds = (42,)
    config.eval_windows = 0  # All.
    config.eval_length = 2048
    config.sample_sizes = ()
    config.tasks = ("piqa", "winogrande", "hellaswag", "lambada_openai", "arc_easy", "boolq")
    config.lower_bound = 0.1
    config.lower_fraction = 1.0
    config.search_samples = 1
  return config
