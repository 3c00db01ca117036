"""LLM-FP4: 4-bit floating point for weights and activations, formats and ranges from a search.

  ./run.sh llm_fp4
  ./run.sh llm_fp4 --config=projects/llm_fp4/config.py:encoder
  ./run.sh llm_fp4 --config=projects/llm_fp4/config.py:vision --config.images=folder:/path/to/imagenet \\
      --config.vision_model=/path/to/deit-small-patch16-224
  ./run.sh llm_fp4 --config=projects/llm_fp4/config.py:paper --config.model=/path/to/Llama-7b-hf

Expect, in the default preset: MinMax in 4 bits useless where activations have outliers, both
searches close to full precision, and channels' own biases (FPQ) a little better than one bias.

The encoder preset quantizes a pretrained sentence encoder of FLAXWORKS_MODELS, the vision preset a
ViT or DeiT with a classifier, on `folder:PATH` (PATH/train/CLASS/*.JPEG and PATH/val/CLASS/*.JPEG) or
`tfds:imagenet2012`.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "encoder", "vision", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      # lm-tiny, lm-small, or a Hugging Face directory of a decoder; empty leaves this part out.
      "model": "lm-small",
      # Weights, activations and embeddings have so many bits; the others on the first seed only.
      "bits": 4,
      "other_bits": (8,),
      # Copies of the model with activation outliers (same function); each seed puts them elsewhere.
      "outlier_gains": (8.0, 32.0),
      "domains": ("embedded:code", "embedded:prose", "embedded:science"),
      "calibration_samples": 16,
      "calibration_length": 128,
      # A calibration draw and places of outliers per seed. The natural model has the first only.
      "seeds": (0, 1, 2),
      "eval_windows": 4,  # Per domain.
      "eval_length": 256,
      "ablations": True,
      "few_samples": 2,  # Calibration samples of the ablation of their number.
      "tasks": (),
      # The search.
      "search_tokens": 256,  # 0 takes all.
      "rounds": 3,
      "grid_size": 16,
      "param": "bias_gamma",
      "metric": "l2",
      "offset_rounding": "separate",
      "fold": "exact",
      # Of encoders and vision transformers, as in the paper, and not of language models: the products
      # inside attention, Q K^T and P V, are quantized too, and classifiers' errors are weighted by the
      # loss's gradients ("hessian"; "metric" serves what has no loss here).
      "attention_products": True,
      "classifier_metric": "hessian",
      # Small ViTs trained on scikit-learn's digits, one per seed: their epochs, 0 leaves them out.
      "vision_epochs": 12,
      "vision_size": 32,
      # A Hugging Face directory of a ViT or DeiT with a classifier; empty leaves it out. Images of its
      # classes, folder:PATH or tfds:NAME: calibration_samples of train, and eval_images of val, 0 takes
      # all.
      "vision_model": "",
      "images": "",
      "eval_images": 0,
      # A folder of FLAXWORKS_MODELS, or a directory, with an encoder; empty leaves it out.
      "encoder": "",
      "encoder_bits": (8, 6, 4),
      "encoder_samples": 32,
      "encoder_length": 64,
      "queries": 20,
      "documents": 1000,
      # JSON lines of a classification task (GLUE) for an encoder with a head: calibration, test.
      "labelled_train": "",
      "labelled_test": "",
      "labelled_fields": ("sentence", "label"),
    }
  )
  if preset == "tiny":
    config.model = "lm-tiny"
    config.other_bits = ()
    config.outlier_gains = (8.0,)
    config.calibration_samples = 4
    config.calibration_length = 32
    config.seeds = (0,)
    config.eval_windows = 2
    config.eval_length = 64
    config.ablations = False
    config.search_tokens = 32
    config.grid_size = 3
    config.vision_epochs = 0
  if preset == "encoder":
    config.model = ""
    config.vision_epochs = 0
    config.encoder = "all-minilm-l6-v2"
    # 384 to 1536 channels: fewer tokens and gammas keep the search to minutes.
    config.search_tokens = 64
    config.grid_size = 8
  if preset == "vision":
    config.model = ""
    config.vision_epochs = 0
    config.vision_model = "facebook/deit-small-patch16-224"
    config.images = "tfds:imagenet2012"
    config.other_bits = (6,)
    config.seeds = (0,)
    config.calibration_samples = 32
    config.search_tokens = 0
    config.grid_size = 100
  if preset == "paper":
    config.model = "meta-llama/Llama-2-7b-hf"
    config.other_bits = ()
    config.outlier_gains = ()
    config.domains = ("data:wikitext2",)
    config.calibration_samples = 32
    config.calibration_length = 1024
    config.seeds = (0,)
    config.eval_windows = 0  # All.
    config.eval_length = 2048
    config.ablations = False
    config.search_tokens = 0
    config.grid_size = 100
    config.vision_epochs = 0
    config.tasks = (
      "boolq",
      "piqa",
      "hellaswag",
      "winogrande",
      "arc_easy",
      "arc_challenge",
    )
  return config
