"""SpecDec++: a head on the draft model that decides when to stop drafting, against fixed lengths.

  ./run.sh specdec_pp
  ./run.sh specdec_pp --config=:peaked
  ./run.sh specdec_pp --config=projects/specdec_pp/config.py:paper \
    --config.model=/path/to/Llama-2-70b-chat-hf --config.draft=/path/to/Llama-2-7b-chat-hf \
    --config.head_sources=file:/path/to/alpaca.jsonl

Expect, in the default preset: the head tells drafts that will be rejected from those that will not,
and for the same discarded drafts the target is called less often than with any fixed length. The
gain in speed is small; it is larger with `peaked`, at a low temperature with a distilled draft.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "peaked", "tiny", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      # The target, and the draft: a base model or a directory; an empty draft is trained in the run.
      "model": "lm-small",
      "draft": "",
      "draft_width": 64,
      "draft_layers": 1,
      "draft_steps": 500,
      "draft_learning_rate": 1e-2,
      "draft_objective": "text",  # What it learns: the text, or "target", the target's distributions.
      # Prompts that the head is trained on (validation split) and tested on (test split).
      "head_sources": ("embedded:code", "embedded:prose"),
      "test_sources": ("embedded:code", "embedded:prose", "embedded:science"),
      "instructions": False,
      "prompt_length": 32,
      "head_prompts": 240,  # Per source; dev_fraction of them are not trained on.
      "dev_fraction": 0.2,
      "test_prompts": 40,  # Per source.
      "new_tokens": 53,
      "temperature": 1.0,
      "top_p": 1.0,
      # The head. mixing is r, rejected_weight w_rej.
      "mixing": 0.15,
      "rejected_weight": 6.0,
      "num_blocks": 3,
      "tied_blocks": False,
      "learning_rate": 3e-3,
      "epochs": 20,
      "batch_size": 16,
      # A head of an earlier run (head_SEED.safetensors in its workdir) in place of training.
      "head": "",
      # Policies. engine: measure them by decoding; otherwise they are replayed on one log of the
      # decisions, which takes test_prompts x new_tokens x max_drafts states of the draft.
      "engine": False,
      "engine_batch": 32,
      "thresholds": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99),
      "constants": (1, 2, 3, 4, 6, 8, 10, 12, 14),
      "confidences": (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4),
      "random_lengths": (2, 4, 8, 12),
      "main_threshold": 0.7,
      "min_drafts": 2,
      "max_drafts": 20,
      "cost_ratio": 10.0,  # c2 / c1, a pass of the target over one of the draft.
      "resamples": 200,
      # Each draws prompts, texts, decisions, mixing and the head's initialization.
      "seeds": (0, 1, 2),
      # Of the first seed, others at the values above; empty skips an axis.
      "ablate_mixing": (0.0, 0.15, 0.5),
      "ablate_rejected_weight": (1.0, 3.0, 6.0, 12.0),
      "ablate_num_blocks": (0, 1, 2, 3, 4),
      # Prompts that the engine decodes with the clock running (0 skips it), and tokens of each.
      "timed_prompts": 32,
      "timed_tokens": 32,
    }
  )
  if preset == "peaked":
    # As a large chat model beside a smaller one of its family: few tokens are likely to the target,
    # and the draft agrees on most of them.
    config.temperature = 0.3
    config.draft_objective = "target"
  if preset == "tiny":
    config.model = "lm-tiny"
    config.draft_width = 32
    config.draft_steps = 20
    config.head_sources = ("embedded:code",)
    config.test_sources = ("embedded:code",)
    config.head_prompts = 40
    config.test_prompts = 8
    config.new_tokens = 16
    config.num_blocks = 1
    config.epochs = 2
    config.batch_size = 8
    config.thresholds = (0.1, 0.3, 0.5, 0.9)
    config.constants = (1, 2, 4, 6)
    config.confidences = ()
    config.random_lengths = ()
    config.max_drafts = 6
    config.resamples = 20
    config.seeds = (0,)
    config.ablate_mixing = (0.0,)
    config.ablate_rejected_weight = (1.0,)
    config.ablate_num_blocks = ()
    config.timed_prompts = 0
  if preset == "paper":
    config.model = "meta-llama/Llama-2-70b-hf"
    config.draft = "meta-llama/Llama-2-7b-hf"
    # JSON lines with the instruction as "text".
    config.head_sources = ("file:alpaca.jsonl",)
    config.test_sources = ("file:alpaca.jsonl", "gsm8k", "humaneval")
    config.instructions = True
    config.engine = True
    config.prompt_length = 512
    config.head_prompts = 50000
    config.test_prompts = 150
    config.new_tokens = 512
    config.learning_rate = 5e-5
    config.epochs = 3
    config.batch_size = 32
    config.thresholds = (0.1, 0.3, 0.5, 0.7, 0.9)
    config.constants = (2, 4, 6, 8, 10, 12, 14)
    config.seeds = (0,)
    config.timed_prompts = 32
    config.timed_tokens = 512
  return config
