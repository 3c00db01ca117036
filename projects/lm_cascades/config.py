"""Language model cascades: which inputs should a small model hand to a large one?

  ./run.sh lm_cascades
  ./run.sh lm_cascades --config=:paper --config.small=FLAN_T5_BASE --config.large=FLAN_T5_LARGE \\
      --config.calibration_file=A.jsonl --config.test_file=B.jsonl

Expect, in the default preset: the sequence's log-likelihood defers long outputs whether or not that
helps, a low quantile of the tokens' does better, and a rule that has learnt from held-out inputs
where the large model helps does best.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      # translation, prose, file: see tasks.py.
      "tasks": ("translation", "prose"),
      "seeds": (0, 1, 2),
      "examples": 1000,  # Calibration inputs, and as many for the test.
      "metric": "f1",  # Graded quality: f1 (of words) or exact.
      "include_eos": True,  # The stop token's log-probability counts.
      "decode_batch": 500,
      # translation: (dim, layers of either stack, steps, learning rate) of both models.
      "small_model": (32, 1, 280, 1e-2),
      "large_model": (64, 2, 400, 5e-3),
      "train_examples": 6000,
      "batch_size": 64,
      "longest": 16,
      # prose: base models of one tokenizer.
      "base_models": ("bloom-small-64", "bloom-small-192"),
      "max_new_tokens": 20,
      # file: Hugging Face directories, JSON lines with "input" and "target", and if the quality is
      # another scorer's (BLEURT), a .npy [calibration + test rows, 2].
      "small": "",
      "large": "",
      "calibration_file": "",
      "test_file": "",
      "quality_file": "",
      "max_source_tokens": 512,
      # Post-hoc rules.
      "target": "diff_quality",  # diff01, correct1 or diff_quality.
      "num_quantiles": 11,
      "runs": 5,
      "hidden_quantile": 8,
      "hidden_embed": 64,
      "learning_rate": 1e-3,
      "learner_batch": 64,
      "epochs": 30,
      "validation_share": 0.25,
      "embed_layers": 1,  # Of the large model's decoder, for Embed-1+2.
      # The cascade that is really run.
      "deferral_rate": 0.3,
      "resamples": 100,  # Of the bootstrap.
      # Ablations on the first seed of the first task; empty or 0 skips them.
      "ablate_quantiles": (3, 5, 11, 21),
      "ablate_sizes": (100, 300, 750),
      "ablate_layers": (1, 2),
      "ablate_targets": True,
      "num_beams": 4,
    }
  )
  if preset == "tiny":
    config.tasks = ("translation",)
    config.seeds = (0,)
    config.examples = 60
    config.decode_batch = 60
    config.small_model = (16, 1, 20, 1e-2)
    config.large_model = (16, 1, 40, 1e-2)
    config.train_examples = 200
    config.batch_size = 16
    config.longest = 6
    config.runs, config.epochs, config.learner_batch = 2, 3, 16
    config.hidden_quantile = config.hidden_embed = 8
    config.resamples = 10
    config.ablate_quantiles, config.ablate_sizes, config.ablate_layers = (3,), (20,), (1,)
    config.num_beams = 2
  if preset == "paper":
    config.tasks = ("file",)
    config.seeds = (0,)
    config.small, config.large = "google/flan-t5-base", "google/flan-t5-large"
    config.calibration_file, config.test_file = "calibration.jsonl", "test.jsonl"
    config.max_new_tokens = 64
    config.decode_batch = 32
    config.learning_rate, config.learner_batch, config.epochs = 1e-5, 16, 200
    config.embed_layers = 12
    config.resamples = 1000
    config.ablate_sizes = (1000, 3000)
    config.ablate_layers = (1, 12)
  return config
