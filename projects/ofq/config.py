"""OFQ: statistics as weight scales, a joint query-key matrix and annealing stop oscillation.

  ./run.sh ofq
  ./run.sh ofq --config=projects/ofq/config.py:paper --config.model=/path/to/deit-tiny \\
      --config.data=folder:/path/to/imagenet

Expect, in the default preset (a small ViT on digits, 2-bit weights and activations): StatsQ about 4
points above LSQ, QKR one point more, and counts of oscillating weights that hardly differ.

The paper preset trains on `folder:PATH` (PATH/train/CLASS/*.JPEG and PATH/val/CLASS/*.JPEG) or
`tfds:imagenet2012`; `model` is a Hugging Face directory of a ViT, DeiT or Swin.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      # digits (scikit-learn's), folder:PATH or tfds:NAME.
      "data": "digits",
      # A saved integer model (*.safetensors) to evaluate on the data; nothing is trained then.
      "integer_model": "",
      # Beside digits "small" (trained here first); otherwise a checkpoint directory.
      "model": "small",
      "hidden_size": 48,
      "num_layers": 3,
      "num_heads": 4,
      "patch_size": 2,
      "pretraining_epochs": 100,
      "pretraining_learning_rate": 3e-3,
      # Bits of weights and activations; the others are measured with two methods only.
      "bits": 2,
      "other_bits": (3, 4),
      # Of the order of images and shifts; all start from one full-precision model.
      "seeds": (0, 1, 2, 3, 4),
      # Of the baselines beside the paper's ablation; the other bits take the first.
      "baseline_seeds": (0, 1),
      "methods": (
        "LSQ",
        "LSQ + dampening",
        "LSQ + freezing",
        "Q-ViT",
        "StatsQ",
        "StatsQ + QKR",
        "StatsQ + QKR + CGA",
      ),
      "batch_size": 64,
      # Quantization-aware training, then annealing at its final learning rate. Methods without
      # annealing train on for as long.
      "epochs": 30,
      "annealing_epochs": 6,
      "learning_rate": 2e-3,
      "final_learning_rate": 4e-5,
      "warmup_epochs": 0.0,
      "weight_decay": 0.05,
      "label_smoothing": 0.0,
      # Of images in folders or TFDS sets. RandAugment's magnitude, 0 to 10, 0 leaves it out; how
      # often an image is in a batch, each time augmented anew; shares of images with an erased box.
      "rand_augment": 0,
      "repeated_augmentation": 1,
      "random_erasing": 0.0,
      # Beta's parameters; 0 leaves one out.
      "mixup": 0.0,
      "cutmix": 0.0,
      "boundary_range": 0.005,
      # Whether annealing masks the gradient of W_Q W_K^T too; the reference code does not.
      "cga_qk": "none",
      "dampening": 1e-2,
      "freezing_thresholds": (0.04, 0.01),
      "guidance": 1.0,
      # Parts that a batch is computed in.
      "microbatches": 1,
    }
  )
  if preset == "tiny":
    config.hidden_size = 16
    config.num_layers = 1
    config.patch_size = 4
    config.pretraining_epochs = 10
    config.other_bits = ()
    config.seeds = (0, 1)
    config.baseline_seeds = (0,)
    config.methods = ("StatsQ + QKR", "StatsQ + QKR + CGA")
    config.epochs = 2
    config.annealing_epochs = 2
  if preset == "paper":
    config.data = "tfds:imagenet2012"
    config.model = "facebook/deit-tiny-distilled-patch16-224"
    config.other_bits = ()
    config.seeds = (0,)
    config.methods = ("StatsQ + QKR + CGA",)
    # The reference's four GPUs see 140 images each, a number that is in LSQ's gradient scale.
    config.batch_size = 560
    config.microbatches = 4
    config.epochs = 300
    config.annealing_epochs = 30
    config.learning_rate = 5.47e-4
    config.final_learning_rate = 1e-5
    config.warmup_epochs = 5.0
    config.label_smoothing = 0.1
    config.rand_augment = 9
    config.random_erasing = 0.25
  return config
