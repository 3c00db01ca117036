"""Prepacking: prompts of different lengths share rows in the prefill, instead of being padded.

  ./run.sh prepacking
  ./run.sh prepacking --config=projects/prepacking/config.py:paper \
    --config.model=/path/to/Llama-2-7b-hf --config.sources=file:/path/to/mmlu.jsonl --config.clips=512

Expect, in the default preset: the same tokens as without packing, less than half of the token slots
of batches that are padded, a prefill that is faster accordingly, and no gain for prompts that are
equally long.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      "model": "lm-small",
      # Each: "docstrings" of the standard library, or what load_documents takes; prompts are cut to
      # as many tokens as `clips` says. The first is what claims are about and what is timed.
      "sources": ("docstrings", "docstrings", "docstrings", "embedded:prose"),
      "clips": (512, 256, 128, 512),
      "split": "train",  # Of sources that have splits.
      "prompts": 256,
      # With the first every method is timed, with the others prepacking and full-batching.
      "batch_sizes": (64, 32),
      # The negative control, and the long prompts of the sweep: windows of equal length, first clip.
      "equal_source": "embedded:code",
      # Each draws the prompts and their order.
      "seeds": (41, 42, 43),
      # Prompts decoded beside the reference of one prompt at a time, and new tokens of each.
      "checked_prompts": 32,
      "new_tokens": 16,
      # Timed runs of every method, interleaved, after one that is not counted.
      "repeats": 5,
      "timed_batches": 1,  # Random batches, each padded and prepacked.
      # Batches of this many prompts, of which so many are long, and runs of each.
      "sweep_batch": 16,
      "sweep_long": (0, 1, 2, 4, 6, 8, 12, 16),
      "sweep_repeats": 3,
      # Widths of random models of the base model's depth, for the sweep over sizes; empty skips it.
      "widths": (64, 256),
      # Small batches packed by every packer, and prompts of each.
      "packed_batches": 20,
      "packed_prompts": 16,
      # The largest batch within the slots of so many padded prompts, of a longer list of prompts.
      "budget_prompts": 32,
      "feasible_prompts": 1024,
    }
  )
  if preset == "tiny":
    config.model = "lm-tiny"
    config.sources, config.clips = ("docstrings",), (64,)
    config.prompts = 16
    config.batch_sizes = (8,)
    config.seeds = (41,)
    config.checked_prompts = 8
    config.new_tokens = 4
    config.repeats = 1
    config.sweep_batch = 8
    config.sweep_long = (0, 4, 8)
    config.sweep_repeats = 1
    config.widths = ()
    config.packed_batches = 2
    config.packed_prompts = 8
    config.budget_prompts = 8
    config.feasible_prompts = 64
  if preset == "paper":
    config.model = "meta-llama/Llama-2-7b-hf"
    # JSON lines with the prompt as "text": MMLU questions, the lines of WikiText-2 raw, Anthropic HH
    # "chosen", Alpaca "text".
    config.sources = (
      "file:mmlu.jsonl",
      "file:wikitext2.jsonl",
      "file:wikitext2.jsonl",
      "file:hh_rlhf.jsonl",
      "file:alpaca.jsonl",
      "tfds:samsum#dialogue",
    )
    config.clips = (512, 256, 512, 512, 512, 512)
    config.equal_source = "data:wikitext2"
    config.prompts = 1000
    config.batch_sizes = (64, 16, 32, 128)
    config.seeds = (41, 42, 43, 44, 45)
    config.checked_prompts = 64
    config.timed_batches = 8
    config.widths = ()
  return config
