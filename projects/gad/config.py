"""GAD: samples of a grammar that follow the language model's own distribution (ASAp), against masks.

  ./run.sh gad
  ./run.sh gad --config=projects/gad/config.py:paper \
    --config.model=/path/to/Mistral-7B-Instruct-v0.2 --config.tasks=/path/to/tasks.jsonl

Expect, in the default preset: on toy languages ASAp's distribution becomes the exact conditional one,
where masks alone stay far from it; on grammars of Python lines its samples come closer to the model's
distribution than those of masks, at nearly the same time per token.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      # Toy languages: seeds draw a tabular model each.
      "toy_languages": ("3 bits", "5 bits"),
      "toy_seeds": 20,
      "toy_samples": 400,
      # Rounds of 2000 texts of the model at most, for rejection sampling.
      "toy_rejection_rounds": 5000,
      # The language model, and the tasks: empty for the embedded ones, or a JSONL file (see README).
      "model": "lm-small",
      "tasks": "",
      # The token that ends a text: the one of this text, or if empty the end-of-sequence token.
      "stop": "\n",
      "samples": 300,
      "new_tokens": 24,  # At most, the end included. A sample cut off is no text: its c~ is 0.
      "temperature": 1.0,
      "seeds": (0, 1, 2),
      # GCD and ASAp, and ASAp with less propagation of c~ (see README).
      "methods": ("GCD", "ASAp", "no propagation", "last level"),
      # Prefixes of each trie, beyond which rarely visited ones are collapsed.
      "max_nodes": 1_000_000,
      # A folder with tries of an earlier run (tries/ in its workdir) to go on from.
      "tries": "",
      # Texts of the model without a grammar, for each task and seed.
      "unconstrained_samples": 64,
    }
  )
  if preset == "tiny":
    config.toy_languages = ("3 bits",)
    config.toy_seeds = 2
    config.toy_samples = 40
    config.model = "lm-tiny"
    config.samples = 8
    config.seeds = (0,)
    config.unconstrained_samples = 4
  if preset == "paper":
    config.model = "mistralai/Mistral-7B-Instruct-v0.2"
    config.tasks = "tasks.jsonl"
    config.stop = ""
    config.samples = 2000
    config.new_tokens = 512
    config.seeds = (0,)
    config.methods = ("GCD", "ASAp")
  return config
