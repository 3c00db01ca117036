"""Texts to train on and prompts to decode: windows of text, or dialogues in Vicuna's template."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers

from common.data.pipelines import token_windows
from common.data.tokenizer import bos_id, eos_id
from common.errors import UserError
from common.evaluation import gsm8k, humaneval
from common.evaluation.items import read_items
from common.paths import data_dir
from projects.ppd.training import Texts

_SYSTEM = (
  "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
  "helpful, detailed, and polite answers to the user's questions."
)
_ROLES = {"human": "USER", "user": "USER", "gpt": "ASSISTANT", "assistant": "ASSISTANT"}


def _mt_bench() -> list[str]:
  path = data_dir("mt_bench") / "question.jsonl"
  items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
  return [item["turns"][0] for item in items]


# Questions whatever the split.
BENCHMARKS = {
  "mt_bench": _mt_bench,
  "gsm8k": lambda: [p.question for p in gsm8k.load_problems(data_dir("gsm8k") / "test.jsonl.gz")],
  "humaneval": lambda: [
    p.prompt for p in humaneval.load_problems(data_dir("humaneval") / "HumanEval.jsonl.gz")
  ],
}


def load_prompts(
  source: str, tokenizer: tokenizers.Tokenizer, *, split: str, count: int, length: int, seed: int
) -> list[list[int]]:
  """Draws prompts without replacement.

  Args:
    source: one of `BENCHMARKS` or `instructions:FILE` (JSON lines with a "text"), whose questions
      are put into the template, or what `token_windows` takes.
    tokenizer: the model's.
    split: of a text source.
    count: prompts; of questions all, if there are fewer.
    length: tokens of a window, of a question at most.
    seed: of the draw.

  Raises:
    UserError: what the source raises; too few windows, no question that is short enough.
  """
  file = source.removeprefix("instructions:")
  if source in BENCHMARKS or file != source:
    questions = (
      BENCHMARKS[source]()
      if source in BENCHMARKS
      else [item["text"] for item in read_items(file, ["text"])]
    )
    prompts = [encode_dialogue([("human", q)], tokenizer)[0] for q in questions]
    prompts = [p for p in prompts if len(p) <= length]
    count = min(count, len(prompts))
    if not count:
      raise UserError(f"{source} has no prompt of up to {length} tokens: raise prompt_length")
  else:
    prompts = token_windows(source, tokenizer, split=split, seq_len=length).tokens
  if len(prompts) < count:
    raise UserError(
      f"the {split} split of {source} has {len(prompts)} windows of {length} tokens, expected "
      f"{count}: ask for fewer or shorten prompt_length"
    )
  chosen = np.random.default_rng(seed).choice(len(prompts), count, replace=False)
  return [list(map(int, prompts[i])) for i in chosen]


def load_texts(
  source: str,
  tokenizer: tokenizers.Tokenizer,
  *,
  count: int,
  length: int,
  shortest: int,
  distances: int,
  seed: int,
) -> Texts:
  """Texts to train on.

  Args:
    source: `sharegpt:FILE`, dialogues as JSON, or what `token_windows` takes (its train split).
    tokenizer: the model's.
    count: texts at most.
    length: tokens of a text at most.
    shortest: tokens of a prefix at least, in a text without dialogue.
    distances: m; a dialogue needs an answer of m + 1 tokens.
    seed: of the draw.

  Raises:
    UserError: what the source raises; texts too short for a cut.
  """
  rng = np.random.default_rng(seed)
  if source.startswith("sharegpt:"):
    dialogues = read_sharegpt(source.removeprefix("sharegpt:"))
    encoded = []
    for i in rng.permutation(len(dialogues)):
      ids, spans = encode_dialogue(dialogues[i], tokenizer)
      spans = [(start, min(end, length)) for start, end in spans]
      if any(end - start >= distances + 1 for start, end in spans):
        encoded.append((ids[:length], spans))
      if len(encoded) == count:
        break
    if not encoded:
      raise UserError(f"{source} has no answer of {distances + 1} tokens within {length}")
    return _pad(encoded)
  if length < shortest + distances + 1:
    raise UserError(
      f"text_length={length}: a prefix of {shortest} tokens and {distances + 1} behind it need more"
    )
  windows = token_windows(source, tokenizer, split="train", seq_len=length).tokens
  chosen = rng.permutation(len(windows))[:count]
  return Texts(
    windows[chosen], np.ones((len(chosen), length), np.int32), [[(shortest, length)]] * len(chosen)
  )


def _pad(encoded: Sequence[tuple[list[int], list[tuple[int, int]]]]) -> Texts:
  """Pads on the left; spans are slots then."""
  longest = max(len(ids) for ids, _ in encoded)
  tokens, segment_ids = np.zeros((2, len(encoded), longest), np.int32)
  moved = []
  for row, (ids, spans) in enumerate(encoded):
    shift = longest - len(ids)
    tokens[row, shift:], segment_ids[row, shift:] = ids, 1
    moved.append([(start + shift, end + shift) for start, end in spans])
  return Texts(tokens, segment_ids, moved)


def read_sharegpt(path: str) -> list[list[tuple[str, str]]]:
  """Dialogues of a ShareGPT file: a JSON list of {"conversations": [{"from", "value"}, ...]}.

  Returns:
    (speaker, text) of every turn. Turns before the first question are dropped, and dialogues
    without an answer.

  Raises:
    UserError: the file cannot be read or is not of this form.
  """
  file = pathlib.Path(path).expanduser()
  try:
    items = json.loads(file.read_text(encoding="utf-8"))
  except OSError as e:
    raise UserError(f"cannot read {path}: {e.strerror}; expected a ShareGPT file") from None
  except ValueError as e:
    raise UserError(f"{path} is not JSON ({e}); expected a ShareGPT file") from None
  if not isinstance(items, list):
    raise UserError(f"{path}: expected a JSON list of dialogues, got {type(items).__name__}")
  dialogues = []
  for number, item in enumerate(items):
    turns = [_turn(path, number, turn) for turn in _turns(path, number, item)]
    first = next((i for i, (who, _) in enumerate(turns) if _ROLES.get(who) == "USER"), len(turns))
    turns = [turn for turn in turns[first:] if turn[0] in _ROLES]
    if any(_ROLES[who] == "ASSISTANT" for who, _ in turns):
      dialogues.append(turns)
  if not dialogues:
    raise UserError(f"{path} has no dialogue with an answer")
  return dialogues


def _turns(path: str, number: int, item: Any) -> list:
  turns = item.get("conversations") if isinstance(item, dict) else None
  if not isinstance(turns, list):
    raise UserError(f"{path}, dialogue {number}: expected an object with a list 'conversations'")
  return turns


def _turn(path: str, number: int, turn: Any) -> tuple[str, str]:
  who, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
  if not isinstance(who, str) or not isinstance(text, str):
    raise UserError(f"{path}, dialogue {number}: a turn needs texts 'from' and 'value'")
  return who, text


def encode_dialogue(
  turns: Sequence[tuple[str, str]], tokenizer: tokenizers.Tokenizer
) -> tuple[list[int], list[tuple[int, int]]]:
  """Token ids in Vicuna's template, and first token and end of every answer.

  A dialogue that ends with a question ends with the opening of its answer.

  Args:
    turns: (speaker, text); speakers are human and gpt, or user and assistant.
    tokenizer: the model's.
  """
  encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
  bos, eos = bos_id(tokenizer), eos_id(tokenizer)
  ids = [*([] if bos is None else [bos]), *encode(_SYSTEM)]
  spans = []
  for who, text in turns:
    if _ROLES[who] == "USER":
      ids += encode(f" USER: {text.strip()} ASSISTANT:")
    else:
      start = len(ids)
      ids += [*encode(text.strip()), *([] if eos is None else [eos])]
      spans.append((start, len(ids)))
  return ids, spans
