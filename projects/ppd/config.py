"""Parallel prompt decoding: trained prompt tokens guess ahead, dynamic sparse trees verify.

  ./run.sh ppd
  ./run.sh ppd --config=projects/ppd/config.py:paper --config.model=/path/to/vicuna-7b-v1.3 \
    --config.train_source=sharegpt:/path/to/ShareGPT_V4.3_unfiltered_cleaned_split.json

Expect, in the default preset: greedy text is the model's own, several hundred trained numbers give
more than 1.3 tokens per pass on code, and dynamic sparse trees are better than static and random
ones of the same size.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      # The frozen model, and the draft model of the combination with speculative decoding (empty:
      # leave that out): base models or directories.
      "model": "lm-small",
      "draft": "bloom-small-64",
      # Prompt tokens: m, e, the mask among EPTs (ensemble, decoder, encoder), how the logits of the
      # EPTs are put together (mean, learned, hidden), the teacher's tokens as labels.
      "distances": 3,
      "ensemble": 1,
      "mask": "ensemble",
      "aggregation": "mean",
      "hard_labels": False,
      # Training texts and cuts. cuts_per_text: prefixes of a text in a step.
      "train_source": "embedded:code",
      "train_texts": 4000,
      "text_length": 64,
      "shortest_prefix": 16,
      "texts_per_step": 4,
      "cuts_per_text": 8,
      "num_steps": 300,
      "learning_rate": 1e-2,
      "medusa_heads": True,
      "medusa_learning_rate": 1e-3,
      # Prompt tokens of an earlier run (prompts_SEED.safetensors in its workdir) in place of training.
      "prompt_tokens": "",
      # Accuracies are measured on validation prompts, trees on test prompts of every source.
      "validation_source": "embedded:code",
      "test_sources": ("embedded:code", "embedded:prose"),
      "validation_prompts": 48,
      "test_prompts": 24,  # Per source.
      "prompt_length": 32,
      "new_tokens": 40,
      "generate_batch": 48,
      "temperature": 0.7,  # Of typical acceptance.
      "epsilon": 0.09,
      "alpha": 0.3,
      # Inputs of a pass; trees of all sorts are compared at compared_size.
      "sizes": (8, 16, 24, 32, 48, 64),
      "compared_size": 32,
      "latency_repeats": 60,
      # The slice (such as "v5e:1x1") whose static bound chooses the size of the trees that are kept
      # and decoded, and the model whose sizes it is of (empty: `model`); empty: this machine's clock.
      "tpu": "",
      "tpu_model": "",
      # Drafts that the target verifies in a pass, and inputs of a pass of the draft model.
      "drafts": 4,
      "draft_sizes": (8, 16),
      # Each draws training texts, cuts and prompts.
      "seeds": (0, 1, 2),
      # Of the first seed, all trained together; 0 skips them.
      "ablation_steps": 100,
      "ablation_ensemble": 3,
    }
  )
  if preset == "tiny":
    config.model, config.draft = "lm-tiny", ""
    config.distances = 2
    config.train_texts = 16
    config.text_length = 32
    config.shortest_prefix = 8
    config.texts_per_step = 2
    config.cuts_per_text = 2
    config.num_steps = 4
    config.test_sources = ("embedded:code",)
    config.validation_prompts = 4
    config.test_prompts = 4
    config.new_tokens = 8
    config.generate_batch = 4
    config.sizes = (6, 10)
    config.compared_size = 10
    config.latency_repeats = 2
    config.drafts = 2
    config.draft_sizes = (6,)
    config.seeds = (0,)
    config.ablation_steps = 0
    config.ablation_ensemble = 2
  if preset == "paper":
    config.model = "lmsys/vicuna-7b-v1.3"
    config.draft = "double7/vicuna-68m"
    config.train_source = "sharegpt:ShareGPT_V4.3_unfiltered_cleaned_split.json"
    config.train_texts = 100000
    config.text_length = 2048
    # Batches of 16; one epoch of the dialogues that have an answer.
    config.texts_per_step = 16
    config.cuts_per_text = 1
    config.num_steps = 5000
    config.medusa_heads = False
    config.validation_source = "instructions:alpaca_eval.jsonl"
    config.test_sources = ("mt_bench", "humaneval", "gsm8k")
    config.validation_prompts = 80
    config.test_prompts = 80
    config.prompt_length = 1024
    config.new_tokens = 512
    config.generate_batch = 8
    config.sizes = (16, 32, 64, 96, 128, 192, 256)
    config.compared_size = 64
    config.latency_repeats = 20
    config.draft_sizes = (16, 32, 64)
    config.seeds = (0,)
    config.ablation_steps = 0
  return config
