"""ThinK: key channels that the last queries do not need are dropped from the KV cache.

  ./run.sh think
  ./run.sh think --config=projects/think/config.py:paper --config.model=/path/to/Meta-Llama-3-8B-Instruct \
    --config.longbench=/path/to/longbench/qasper.jsonl

Expect, in the default preset: channels chosen by queries and keys cost less than channels chosen by
the keys alone, and these less than random ones; at a pruning ratio of 0.4 next to nothing is lost.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      # Text: prompts and continuations of a base model or a directory's.
      "model": "lm-small",
      "text_source": "embedded:code,embedded:prose,embedded:science",
      "text_rows": 64,
      "prompt_length": 96,  # With the continuation the 128 tokens that lm-small was trained on.
      "new_tokens": 32,
      "recent": 16,
      "window": 16,
      "capacity": 24,  # Tokens that SnapKV and H2O leave.
      "pool_kernel": 7,
      # Recall: a model that is trained in the run finds needles (0 rows skip it).
      "recall_rows": 240,
      "recall_symbols": 16,
      "recall_haystack": 96,
      "recall_needles": 12,
      "recall_asked": 8,
      "recall_width": 64,
      "recall_heads": 2,
      "recall_kv_heads": 1,
      "recall_head_dim": 64,
      "recall_batch": 32,
      "recall_steps": 300,
      "recall_learning_rate": 5e-3,
      "recall_recent": 16,
      "recall_window": 16,
      "recall_capacity": 40,
      "recall_pool_kernel": 1,
      "grid_lengths": (32, 64, 96),
      "grid_depths": (0.0, 0.25, 0.5, 0.75, 1.0),
      # Each draws the prompts.
      "seeds": (0, 1, 2),
      "ratios": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
      "main_ratio": 0.4,
      "partner_ratios": (0.4, 0.6),
      "bits": 2,
      "group": 16,
      "residual": 32,
      # Ablations, at the ratio 0.6.
      "ablation_ratio": 0.6,
      "ablate_recent": (0, 16, 32, 64),
      "ablate_window": (1, 4, 16, 64),
      "value_ratios": (0.3, 0.4),
      "exhaustive_channels": 12,
      # Slots of the cache that decoding is timed on (0 skips it), with the heads of Llama-3-8B.
      "timed_slots": 8192,
      # LongBench's JSON lines, read by `longbench.py`; empty skips it.
      "longbench": "",
      "longbench_format": "{context}\n\nQuestion: {input}\nAnswer:",
      "longbench_metric": "f1",
      "longbench_rows": 0,  # 0 takes all.
      "longbench_capacities": (128, 512, 1024, 2048),
    }
  )
  if preset == "tiny":
    config.model = "lm-tiny"
    config.text_source = "embedded:code"
    config.text_rows = 4
    config.prompt_length = 64
    config.new_tokens = 8
    config.recent = 16
    config.window = 16
    config.capacity = 32
    config.recall_rows = 12
    config.recall_symbols = 8
    config.recall_haystack = 24
    config.recall_needles = 4
    config.recall_asked = 2
    config.recall_width = 16
    config.recall_head_dim = 16
    config.recall_batch = 8
    config.recall_steps = 10
    config.recall_recent = 8
    config.recall_window = 8
    config.recall_capacity = 12
    config.grid_lengths = (12, 24)
    config.grid_depths = (0.0, 1.0)
    config.seeds = (0,)
    config.ratios = (0.4, 0.6, 0.8)
    config.partner_ratios = (0.4,)
    config.ablate_recent = (0, 32)
    config.ablate_window = (8,)
    config.value_ratios = (0.4,)
    config.exhaustive_channels = 6
    config.timed_slots = 0
  if preset == "paper":
    config.model = "meta-llama/Meta-Llama-3-8B"
    config.text_source = "data:wikitext2"
    config.text_rows = 0  # Text needs all queries of a prompt in memory; LongBench does not.
    config.prompt_length = 7500
    config.new_tokens = 512
    config.recent = 32
    config.window = 32
    config.capacity = 2048
    config.recall_rows = 0
    config.seeds = (0,)
    config.partner_ratios = (0.4, 0.5)
    config.group = 32
    config.residual = 128
    config.longbench = "longbench.jsonl"
  return config
