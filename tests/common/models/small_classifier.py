"""A small BERT classifier on disk, with a tokenizer and labelled sentences."""

import json
import pathlib
import shutil

import numpy as np
import tokenizers

from common.checkpoints.huggingface import Checkpoint

CHECKPOINT = pathlib.Path(__file__).parents[2] / "golden" / "hf_checkpoints" / "bert_sequence"


def write_classifier(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """The model's directory, and a JSON-lines file of twelve sentences with labels of the model."""
  model = folder / "bert"
  shutil.copytree(CHECKPOINT, model)
  size = json.loads((model / "config.json").read_text())["vocab_size"]
  words = tokenizers.models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w1")
  tokenizer = tokenizers.Tokenizer(words)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.save(str(model / "tokenizer.json"))
  names = Checkpoint(model).config.labels
  rng = np.random.default_rng(0)
  lines = [
    {
      "sentence": " ".join(f"w{w}" for w in rng.integers(2, size, rng.integers(3, 9))),
      "label": names[i % len(names)],
    }
    for i in range(12)
  ]
  labelled = folder / "labelled.jsonl"
  labelled.write_text("\n".join(map(json.dumps, lines)))
  return model, labelled
