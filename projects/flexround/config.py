"""FlexRound: weights divided element by element before they are rounded, learned block by block.

  ./run.sh flexround
  ./run.sh flexround --config=projects/flexround/config.py:full
  ./run.sh flexround --config=projects/flexround/config.py:paper --config.model=/path/to/Llama-2-7b-hf
  ./run.sh flexround --config=projects/flexround/config.py:encoder
  ./run.sh flexround --config=projects/flexround/config.py:vision --config.images=folder:/path/to/imagenet \\
      --config.vision_model=/path/to/resnet-18

Expect, in the default preset: at 2 bits all learned roundings are far above rounding to nearest;
FlexRound's networks and language model are a little better than AdaRound's, and AdaQuant's as good.
The second command learns for 400 steps per block of a network instead of 100, and for 300 per block
of the language model instead of 60: AdaQuant is then the best on MobileNetV2.

The vision preset quantizes a ResNet or MobileNetV2 with a classifier to 4, 3 and 2 bits and W4A4 as in
the paper, on 1024 images of `folder:PATH` (PATH/train/CLASS/*.JPEG and PATH/val/CLASS/*.JPEG) or
`tfds:imagenet2012`: work for an accelerator.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "full", "paper", "encoder", "vision")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      # Adam's rates of the sweep: the best on one block's calibration error is used. FlexRound's
      # ablations take FlexRound's.
      "learning_rates": {
        "AdaRound": (0.03, 0.1, 0.3, 1.0),
        "AdaQuant": (0.003, 0.01, 0.03, 0.1),
        "FlexRound": (0.003, 0.01, 0.03, 0.1),
      },
      # Small convolutional networks on digits, each with its weights' bits; none if empty.
      "networks": {"ResNet": (3, 2), "MobileNetV2": (2,)},
      # Of projects/flexround/methods.py; ablations run on the first network (by name) only.
      "network_methods": (
        "RTN",
        "AdaRound",
        "AdaQuant",
        "FlexRound",
        "FlexRound, no s3, s4",
        "FlexRound, fixed s1",
      ),
      # One trained network, split and calibration draw per seed.
      "network_seeds": (0, 1, 2, 3, 4),
      # On the first seed only.
      "network_other_bits": (4,),
      "train_steps": 200,
      "calibration_images": 256,
      "image_batch_size": 32,
      "network_steps": 100,
      # A Hugging Face directory of a ResNet or MobileNetV2 with a classifier, with its weights' bits;
      # none if empty. Images of its classes, folder:PATH or tfds:NAME: calibration_images of train, and
      # eval_images of val, 0 takes all. Their side, 0 for what config.json says, or 224.
      "vision_model": "",
      "vision_bits": (4, 3, 2),
      "images": "",
      "eval_images": 0,
      "image_size": 0,
      # W4A4 under the protocols of BRECQ and QDrop, on the first network (by name) and so many seeds.
      "activation_seeds": 1,
      "activation_bits": 4,
      # A language model: lm-tiny, lm-small, or a Hugging Face directory; none if empty.
      "model": "lm-small",
      "domains": ("embedded:code", "embedded:prose", "embedded:science"),
      "axis": "channel",  # Or "tensor": what shares a scale.
      "start": "search",  # Or "min_max": where scales begin.
      "layer_wise": False,  # Reconstruct layers, of networks too, one by one instead of blocks.
      "model_bits": 2,
      "model_other_bits": (3,),
      "model_seeds": (0, 1, 2),
      "calibration_samples": 64,
      "calibration_length": 128,
      # Where calibration activations lie while blocks are learned: "device", or "pinned_host", the host's
      # memory, from where every step fetches its batch.
      "sample_memory": "device",
      "batch_size": 2,
      "steps": 60,
      "eval_windows": 10,  # Per domain; 0 for all.
      "eval_length": 256,
      "choice_questions": 30,
      # Benchmarks of EleutherAI's harness, and how many questions of each (0: all).
      "tasks": (),
      "task_limit": 0,
      # Also W8A8, per tensor.
      "w8a8": True,
      # A pretrained encoder of FLAXWORKS_MODELS, or a directory (the encoder preset); none if empty.
      "encoder": "",
      "encoder_bits": (8, 6, 4),
      "encoder_calibration": 64,
      "encoder_sentences": 96,  # To train the classifier on, and as many to test.
      "encoder_length": 32,
      "encoder_steps": 50,
      "encoder_batch_size": 8,
      "encoder_learning_rate": 0.003,
      # Retrieval on queries and documents of a test collection in FLAXWORKS_DATA; 0 skips it.
      "retrieval_queries": 20,
      "retrieval_documents": 1000,
      # JSON lines of a classification task (GLUE) for an encoder with a head: calibration, test.
      "labelled_train": "",
      "labelled_test": "",
      "labelled_fields": ("sentence", "label"),
    }
  )
  if preset == "tiny":
    config.learning_rates = {"AdaRound": (0.01,), "AdaQuant": (0.01,), "FlexRound": (0.01,)}
    config.networks = {"ResNet, one block": (2,)}
    config.network_methods = ("RTN", "AdaRound", "FlexRound")
    config.network_seeds = (0,)
    config.network_other_bits = ()
    config.train_steps = 20
    config.calibration_images = 32
    config.network_steps = 4
    config.activation_seeds = 0
    config.model = "lm-tiny"
    config.model_seeds = (0,)
    config.model_other_bits = ()
    config.calibration_samples = 4
    config.calibration_length = 16
    config.steps = 4
    config.eval_windows = 2
    config.eval_length = 32
    config.choice_questions = 4
    config.w8a8 = False
  if preset == "full":
    config.network_steps, config.steps = 400, 300
    # Of the default's rates AdaRound's and AdaQuant's largest were the best on MobileNetV2.
    config.learning_rates = {
      "AdaRound": (0.03, 0.1, 0.3, 1.0, 3.0),
      "AdaQuant": (0.003, 0.01, 0.03, 0.1, 0.3),
      "FlexRound": (0.003, 0.01, 0.03, 0.1, 0.3),
    }
  if preset == "paper":
    # Weight-only, per channel, without the search (the official scripts' 4-bit Llama-2-7B).
    config.learning_rates = {"AdaRound": (0.01,), "AdaQuant": (0.003,), "FlexRound": (0.003,)}
    config.networks = {}
    config.model = "meta-llama/Llama-2-7b-hf"
    config.domains = ("data:wikitext2",)
    config.start = "min_max"
    config.model_bits = 4
    config.model_other_bits = (3,)
    config.model_seeds = (0,)
    config.calibration_samples = 512
    config.calibration_length = 1024
    config.steps = 5000
    config.eval_windows = 0
    config.eval_length = 2048
    config.tasks = (
      "boolq",
      "piqa",
      "hellaswag",
      "winogrande",
      "arc_easy",
      "arc_challenge",
      "openbookqa",
    )
  if preset == "encoder":
    config.networks = {}
    config.model = ""
    config.encoder = "all-minilm-l6-v2"
  if preset == "vision":
    # The paper's images, steps and batches. Its rates are not known here: a sweep chooses.
    config.learning_rates = {
      "AdaRound": (0.001, 0.003, 0.01),
      "AdaQuant": (0.0003, 0.001, 0.003),
      "FlexRound": (0.0003, 0.001, 0.003),
    }
    config.networks = {}
    config.model = ""
    config.vision_model = "microsoft/resnet-18"
    config.images = "tfds:imagenet2012"
    config.network_methods = ("RTN", "AdaRound", "AdaQuant", "FlexRound")
    config.network_seeds = (0,)
    config.network_other_bits = ()
    config.calibration_images = 1024
    config.network_steps = 20000
  return config
