"""The paper's benchmarks as far as data are at hand: PIQA, GSM8K, HumanEval, the harness's."""

import importlib.util

import numpy as np
import tokenizers
from ml_collections import ConfigDict

from common.errors import UserError
from common.evaluation import gsm8k, humaneval
from common.evaluation.harness import LM_EVAL, harness_model
from common.evaluation.items import read_items
from common.evaluation.text_model import TextModel
from common.models.decoder import Decoder
from common.paths import data_dir

# These read files of FLAXWORKS_DATA; any other task is the harness's.
LOCAL_TASKS = ("piqa", "gsm8k", "humaneval")


def check_tasks(config: ConfigDict) -> None:
  """Checks, before any work, that what the tasks need is there.

  Raises:
    UserError: data are missing, HumanEval may not run programs, or lm-eval is not installed.
  """
  if "humaneval" in config.tasks and not config.allow_execution:
    raise UserError(
      "HumanEval runs Python programs that a model wrote: expected permission; pass "
      "--config.allow_execution=True, or leave humaneval out of --config.tasks"
    )
  for task in config.tasks:
    if task in LOCAL_TASKS:
      data_dir(task)
    elif importlib.util.find_spec("lm_eval") is None:
      raise UserError(
        f"the task {task!r} is none of {', '.join(LOCAL_TASKS)} and needs EleutherAI's harness: "
        f"pip install {LM_EVAL}"
      )


def task_score(
  config: ConfigDict, task: str, model: Decoder, tokenizer: tokenizers.Tokenizer
) -> float:
  """Share of the task's questions that are answered right (pass@1 of HumanEval)."""
  chosen = slice(config.task_limit or None)
  if task == "piqa":
    return piqa_accuracy(model, tokenizer, chosen)
  if task == "gsm8k":
    problems = gsm8k.load_problems(data_dir(task) / "test.jsonl.gz")[chosen]
    shots = gsm8k.load_problems(data_dir(task) / "train_3000.jsonl.gz")[: config.gsm8k_shots]
    return gsm8k.gsm8k_accuracy(model, tokenizer, problems, shots).strict
  if task == "humaneval":
    problems = humaneval.load_problems(data_dir(task) / "HumanEval.jsonl.gz")[chosen]
    allowed = config.allow_execution
    return humaneval.humaneval(model, tokenizer, problems, allow_execution=allowed).pass_at[1]
  import lm_eval

  found = lm_eval.simple_evaluate(
    model=harness_model(model, tokenizer), tasks=[task], limit=config.task_limit or None
  )
  scores = found["results"][task]
  return float(next(v for k, v in scores.items() if k.startswith(("acc,", "exact_match,"))))


def piqa_accuracy(model: Decoder, tokenizer: tokenizers.Tokenizer, chosen: slice) -> float:
  """Physical commonsense, two choices, by log-likelihood of the whole solution, as the harness."""
  items = read_items(data_dir("piqa") / "valid.jsonl", ("goal", "sol1", "sol2"))[chosen]
  labels = np.loadtxt(data_dir("piqa") / "valid-labels.lst", dtype=int)[chosen]
  pairs = [
    (f"Question: {item['goal']}\nAnswer:", " " + item[solution])
    for item in items
    for solution in ("sol1", "sol2")
  ]
  scores = [score for score, _ in TextModel(model, tokenizer).log_likelihoods(pairs)]
  return float(np.mean(np.argmax(np.reshape(scores, (-1, 2)), axis=1) == labels))
