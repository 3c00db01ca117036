"""Verbose images: how far a small bounded perturbation lengthens a captioning model's output.

An availability evaluation of one's own models, and of defences. No perturbed image is kept.

  ./run.sh verbose_images
  ./run.sh verbose_images --config=projects/verbose_images/config.py:paper --config.vision=VIT \
    --config.decoder=OPT --config.projector=projector.safetensors --config.data=folder:COCO

Expect, in the default preset (a small model that captions digits): captions several times as long as
of the original images at 16/255, and hardly longer for noise of the same budget.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      # digits: a model for each seed is trained in the run. folder:PATH: images of a loaded model,
      # whose parts are a ViT, a decoder (directories) and a projector (safetensors, see vlm.py).
      "data": "digits",
      "vision": "",
      "decoder": "",
      "projector": "",
      "eos": 50118,  # Of a loaded model: OPT's newline, which ends BLIP-2's captions.
      "seeds": (0, 1, 2),
      # The small model and its training.
      "image_size": 32,
      "patch_size": 8,
      "vision_width": 48,
      "width": 48,
      "num_layers": 2,
      "num_heads": 4,
      "num_prefix": 8,
      "num_steps": 340,
      "batch_size": 64,
      "learning_rate": 5e-3,
      "text_share": 0.2,
      "text_length": 24,
      # Images of each seed: attacked; clean ones for quality and again as many for calibration; and
      # how many are in one call.
      "images": 8,
      "clean_images": 48,
      "batch_images": 8,
      # The attack. Sizes in pixels of 255; the cap is of a caption's tokens.
      "eps": 16.0,
      "step_size": 2.0,
      "iterations": 30,
      "samples": 3,
      "temperature": 1.0,
      "top_p": 0.9,
      "cap": 96,
      "variant": "paper",  # Of the losses; or code, see attack.py.
      # Ablations on the first seed; empty skips one. Main values are measured anyway.
      "ablate_eps": (2.0, 4.0, 8.0, 32.0),
      "ablate_cap": (32, 64),
      "ablate_losses": True,
      "top_k": 5,
      "num_beams": 5,  # 0 skips beam search.
      # Defences: name and strength of transforms; standard deviations above the expected length;
      # slope of the bias of EOS; the monitor's window, n-gram and allowed repeats.
      "transforms": (
        ("DCT quantisation", 0.1),
        ("bit depth", 1.0 / 3),
        ("Gaussian filter", 1.0),
        ("median filter", 1.0),
        ("resize and pad", 0.2),
      ),
      "adaptive_transforms": ("DCT quantisation", "Gaussian filter"),
      "budget_deviations": 2.0,
      "eos_slope": 0.5,
      "monitor_window": 8,
      "monitor_ngram": 3,
      "monitor_repeats": 2,
      "detector_tokens": 16,
      # Adversarial fine-tuning of the first seed's model; 0 steps skip it.
      "hardening_steps": 40,
      "hardening_inner_steps": 2,
      "hardening_learning_rate": 1e-3,
      "hardening_eos_weight": 2.0,
      "resamples": 1000,
    }
  )
  if preset == "tiny":
    config.seeds = (0, 1)
    config.image_size = 16
    config.vision_width = 16
    config.width = 16
    config.num_heads = 2
    config.num_layers = 1
    config.num_prefix = 2
    config.num_steps = 30
    config.batch_size = 16
    config.images = 4
    config.clean_images = 8
    config.batch_images = 4
    config.iterations = 4
    config.samples = 2
    config.cap = 24
    config.ablate_eps = (8.0,)
    config.ablate_cap = (12,)
    config.num_beams = 0
    config.adaptive_transforms = ("Gaussian filter",)
    config.hardening_steps = 3
    config.resamples = 100
  if preset == "paper":
    config.data = "folder:coco"
    config.seeds = (0,)
    config.image_size = 224
    config.images = 1000
    config.clean_images = 200
    config.batch_images = 4
    config.num_prefix = 32
    config.eps = 8.0
    config.step_size = 1.0
    config.iterations = 1000
    config.cap = 512
    config.top_k = 50
    config.ablate_eps = (2.0, 4.0, 16.0, 32.0)
    config.ablate_cap = (128, 256, 1024)
    config.hardening_steps = 0
  return config
