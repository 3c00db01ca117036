"""Prompts: windows of a text, or instructions in the chat template of Llama 2."""

import numpy as np
import tokenizers

from common.data.pipelines import token_windows
from common.data.sources import load_documents
from common.data.tokenizer import bos_id
from common.errors import UserError
from common.evaluation import gsm8k, humaneval
from common.paths import data_dir

# Benchmarks, whose prompts are test sets whatever the split.
_BENCHMARKS = {
  "gsm8k": lambda: [p.question for p in gsm8k.load_problems(data_dir("gsm8k") / "test.jsonl.gz")],
  "humaneval": lambda: [
    p.prompt for p in humaneval.load_problems(data_dir("humaneval") / "HumanEval.jsonl.gz")
  ],
}


def load_prompts(
  source: str,
  tokenizer: tokenizers.Tokenizer,
  *,
  split: str,
  count: int,
  prompt_length: int,
  instructions: bool,
  seed: int,
) -> list[list[int]]:
  """Draws prompts without replacement.

  Args:
    source: gsm8k, humaneval, or what `load_documents` takes.
    tokenizer: of both models.
    split: train, validation or test.
    count: prompts.
    prompt_length: tokens of a window; of an instruction at most, longer ones are left out.
    instructions: each document is an instruction, put into the chat template. Otherwise the text
      is cut into windows.
    seed: of the draw.

  Raises:
    UserError: what the source raises; too few prompts.
  """
  if not instructions and source in _BENCHMARKS:
    raise UserError(f"{source} has instructions: set instructions=True, or take a text source")
  if instructions:
    texts = _BENCHMARKS[source]() if source in _BENCHMARKS else _texts(source, split)
    bos = bos_id(tokenizer)
    prefix = [] if bos is None else [bos]
    encode = lambda text: tokenizer.encode(chat(text), add_special_tokens=False).ids
    prompts = [[*prefix, *encode(text)] for text in texts]
    prompts = [prompt for prompt in prompts if len(prompt) <= prompt_length]
  else:
    prompts = token_windows(source, tokenizer, split=split, seq_len=prompt_length).tokens
  if len(prompts) < count:
    raise UserError(
      f"the {split} split of {source} has {len(prompts)} prompts of {prompt_length} tokens, "
      f"expected {count}: ask for fewer or change prompt_length"
    )
  chosen = np.random.default_rng(seed).choice(len(prompts), count, replace=False)
  return [list(map(int, prompts[i])) for i in chosen]


def chat(instruction: str) -> str:
  """An instruction in Llama 2's template, behind the bos token."""
  return f"[INST] {instruction.strip()} [/INST]"


def _texts(source: str, split: str) -> list[str]:
  return [document["text"] for document in load_documents(source, split)]
