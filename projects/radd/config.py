"""RADD: a masked diffusion language model without time input, and samplers that skip network calls.

  ./run.sh radd
  ./run.sh radd --config=projects/radd/config.py:paper --config.tokenizer=GPT2_FOLDER --config.judge=GPT2_LARGE_FOLDER

Expect, in the default preset: four losses that estimate one bound; without time input the model is
as good as with it; sampling that skips calls gives the same text, in fewer calls by a known formula.
An autoregressive model of the same size has the lower perplexity.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      # embedded-259 has the 256 bytes and the special tokens; or a folder with a tokenizer.json.
      "tokenizer": "embedded-259",
      "train_source": "embedded:code",
      # Test splits of these: the first is the training domain's, the others are zero-shot.
      "evaluation_sources": ("embedded:code", "embedded:prose", "embedded:science"),
      "seq_len": 32,
      "hidden_size": 64,
      "num_layers": 2,
      "num_heads": 4,
      "dropout": 0.0,
      # Training, the same for every model.
      "seeds": (0, 1, 2),
      "num_steps": 500,
      "batch_size": 32,
      "accumulate_steps": 1,
      "learning_rate": 1e-2,
      "warmup_steps": 50,
      "clip_norm": 1.0,
      "ema_decay": 0.9999,
      "schedule": "log_linear",  # Of SEDD's loss and of sampling; or geometric.
      "compute_dtype": "float32",
      "save_every": 0,  # Steps between checkpoints in the workdir; 0 keeps none.
      # Windows of each source, and draws of masks and noise levels for each of them.
      "eval_windows": 24,
      "bound_draws": 64,
      # Sampling: rows, and T; other samplers are compared at the T of `compared_steps`.
      "samples": 32,
      "sampling_steps": (8, 32, 64, 128),
      "compared_steps": 64,
      "top_p": 0.8,
      # A Hugging Face decoder with the same tokenizer judges the samples; empty: the autoregressive
      # baseline does.
      "judge": "",
      # A Markov chain whose conditional distributions are known (0 steps skip it).
      "chain_vocab": 4,
      "chain_length": 6,
      "chain_hidden": 32,
      "chain_batch": 128,
      "chain_steps": 300,
    }
  )
  if preset == "tiny":
    config.evaluation_sources = ("embedded:code", "embedded:prose")
    config.seq_len = 16
    config.hidden_size = 32
    config.num_layers = 1
    config.num_heads = 2
    config.seeds = (0,)
    config.num_steps = 40
    config.batch_size = 16
    config.warmup_steps = 4
    config.eval_windows = 4
    config.bound_draws = 16
    config.samples = 2
    config.sampling_steps = (4, 32)
    config.compared_steps = 32
    config.top_p = 1.0  # One compilation less.
    config.chain_vocab = 3
    config.chain_length = 3
    config.chain_hidden = 32
    config.chain_batch = 32
    config.chain_steps = 60
  if preset == "paper":
    config.tokenizer = "gpt2"
    config.train_source = "tfds:openwebtext"
    config.evaluation_sources = ("data:wikitext2", "tfds:lambada#passage", "tfds:lm1b")
    config.seq_len = 1024
    config.hidden_size = 768
    config.num_layers = 12
    config.num_heads = 12
    config.dropout = 0.02
    config.seeds = (42,)
    config.num_steps = 400_000
    config.batch_size = 512
    config.accumulate_steps = 64
    config.learning_rate = 3e-4
    config.warmup_steps = 2500
    config.compute_dtype = "bfloat16"
    config.save_every = 5000
    config.eval_windows = 0  # All.
    config.bound_draws = 1024
    config.samples = 8
    config.sampling_steps = (32, 64, 128, 256, 512, 1024, 2048, 4096)
    config.compared_steps = 1024
    config.judge = "gpt2-large"
    config.chain_steps = 0
  return config
