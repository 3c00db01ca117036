"""ICN: asking a language model for many different answers by showing it those already explored.

  ./run.sh icn
  ./run.sh icn --config=projects/icn/config.py:paper \
    --config.model=/path/to/Meta-Llama-3-8B-Instruct --config.judge=VERDICTS.jsonl

Expect, in the default preset: first tokens chosen with the explored answers in the prompt find as
many right answers as the plain ranking or slightly more, and far more than sampling; the answers of
another question in the prompt cost some. Clusters of keys tell little beyond the rank.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      # A base model or a directory; empty: a small model is trained on lists, for every seed.
      "model": "",
      "width": 48,
      "layers": 1,
      "heads": 2,
      "head_dim": 64,
      "tied": True,
      "vocab_size": 768,
      "num_steps": 1800,
      "batch_size": 16,
      "seq_len": 128,
      "learning_rate": 1e-2,
      # The lists: synthetic questions with so many answers, members of modules, lines of text.
      "questions": 72,
      "answers": 16,
      "modules": ("math", "operator", "statistics", "random", "shutil", "textwrap"),
      "domains": ("code", "prose", "science"),
      # Lists of each kind, of 1 to so many items, and how often an item is wrong at first.
      "synthetic_lists": 8000,
      "module_lists": 500,
      "line_lists": 500,
      "longest": 20,
      "longest_lines": 5,
      "mistakes": 0.05,
      # Synthetic questions are as unequally common as words (1: Zipf's law; 0: equally), and the
      # rarest of them are probed: what is common is known perfectly.
      "zipf_exponent": 1.0,
      "probed": 36,
      # A model of your own is asked these; JSON lines of {"instruction", "answer", "correct"} judge
      # what has no gold answers.
      "instructions": (),
      "judge": "",
      "merge_spaces": True,
      "max_new_tokens": 8,
      # Clusters of keys, K and N of the measurement; clusters larger than this share of the
      # vocabulary are left out in a second row.
      "clusters": 76,
      "top": 5,
      "ranks": 50,
      "largest_share": 0.1,
      "resamples": 500,
      # ICN: n_run and n_tol; the others get rounds x per_round completions as well.
      "rounds": 4,
      "per_round": 4,
      "ablate_per_round": (1,),  # Of the first seed.
      "key_penalties": (0.1, 0.3, 1.0),
      "temperatures": (1.0,),
      "top_k": 20,
      "top_p": 0.9,
      "beam_groups": (1, 4),  # One group is beam search.
      "beam_penalty": 0.5,
      # Open-ended generation: texts of each domain.
      "text_rounds": 5,
      "text_per_round": 3,
      "text_tokens": 16,
      "held_out_lines": 200,
      # Chain of thought; no task is run by a model that cannot reason.
      "cot_tasks": (),
      "cot_problems": 0,  # Of each task; 0 takes all.
      "cot_ways": 4,
      "cot_tokens": 256,
      "prompt_lengths": (32, 128, 384),
      "prompt_batch": 64,
      "branch_batch": 256,
      "seeds": (0, 1, 2),
    }
  )
  if preset == "tiny":
    config.num_steps = 40
    config.questions = 4
    config.answers = 8
    config.modules = ("math",)
    config.domains = ("code", "prose")
    config.synthetic_lists = 120
    config.module_lists = 40
    config.line_lists = 40
    config.longest = 10
    config.longest_lines = 3
    config.probed = 4
    config.heads = 2
    config.head_dim = 8
    config.vocab_size = 512
    config.seq_len = 96
    config.width = 16
    config.layers = 1
    config.clusters = 16
    config.ranks = 12
    config.resamples = 10
    config.rounds = 2
    config.beam_groups = (2,)
    config.per_round = 3
    config.ablate_per_round = ()
    config.key_penalties = (0.3,)
    config.text_rounds = 2
    config.text_per_round = 2
    config.text_tokens = 8
    config.held_out_lines = 10
    config.prompt_lengths = (96,)
    config.seeds = (0,)
  if preset == "paper":
    config.model = "meta-llama/Meta-Llama-3-8B"
    config.instructions = (
      "Please show me some basketball leagues.",
      "Please show me some USA sports leagues.",
      "Please show me some European sports leagues.",
    )
    config.merge_spaces = False
    config.max_new_tokens = 64
    config.clusters = 1024
    config.top = 10
    config.ranks = 100
    config.largest_share = 0.05
    config.rounds = 10
    config.per_round = 10
    config.text_rounds = 10
    config.text_per_round = 10
    config.text_tokens = 64
    config.cot_tasks = ("gsm8k", "svamp", "aqua_rat")
    config.prompt_lengths = (64, 512, 1024, 2048)
    config.prompt_batch = 8
    config.branch_batch = 64
    config.seeds = (0,)
  return config
