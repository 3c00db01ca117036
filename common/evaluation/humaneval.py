"""HumanEval: does the function that a model writes below a docstring pass its tests?

Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374; section 2.1 for
pass@k, 3.2 for sampling. The file is the official one: JSON lines, whose `prompt` ends in a
docstring and whose `test` defines `check(candidate)`. What the model wrote is executed (see
common/evaluation/sandbox.py), so nothing runs without `allow_execution=True`.
"""

import concurrent.futures
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import tokenizers

from common.decoding.generation import Sampling
from common.errors import UserError
from common.evaluation.items import read_items
from common.evaluation.sandbox import Outcome, require_isolation, run_program
from common.evaluation.text_model import Generation, TextModel
from common.models.decoder import Decoder

# What follows the function is not part of it.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


class Problem(NamedTuple):
  """A function to write.

  Attributes:
    task_id: its name.
    prompt: imports, signature and docstring.
    canonical_solution: a body that is right.
    test: source that defines `check(candidate)`.
    entry_point: the name of the function.
  """

  task_id: str
  prompt: str
  canonical_solution: str
  test: str
  entry_point: str


class HumanEval(NamedTuple):
  """Share of problems solved by at least one of k samples.

  Attributes:
    pass_at: {k: pass@k}, the mean over problems.
    errors: {k: its standard error}: the deviation of the problems' estimates (n - 1) divided by the
      square root of their number; it has the choice of problems and of samples in it. NaN for one
      problem.
    outcomes: of each sample of each problem.
    completions: what was run, alike.
  """

  pass_at: dict[int, float]
  errors: dict[int, float]
  outcomes: list[list[Outcome]]
  completions: list[list[str]]


def load_problems(path: str | os.PathLike) -> list[Problem]:
  """Reads the official file.

  Raises:
    UserError: it cannot be read, or a line is no problem (the line is named).
  """
  items = read_items(path, Problem._fields, lambda item: _wrong(item["entry_point"]))
  return [Problem(**item) for item in items]


def _wrong(entry_point: str) -> str | None:
  if not entry_point.isidentifier():
    return f"the entry point is {entry_point!r}, expected the name of a function"
  return None


def program(problem: Problem, completion: str) -> str:
  """What is run: the function, then its test. Its last line calls the test."""
  parts = problem.prompt + completion, problem.test, f"check({problem.entry_point})\n"
  return "\n".join(parts)


def pass_at_k(n: int, c: int, k: int) -> float:
  """Unbiased estimate of the chance that one of k samples passes, when c of n did.

      1 - C(n - c, k) / C(n, k),  as a product: 1 - prod over i in n - c + 1 .. n of (1 - k / i)

  Raises:
    UserError: not 0 <= c <= n, or not 1 <= k <= n.
  """
  if not (0 <= c <= n and 1 <= k <= n):
    raise UserError(f"pass@{k} of {n} samples, {c} right: expected 1 <= k <= n and 0 <= c <= n")
  # The terms from n - c + 1 to n; where that range has k in it, some term is 0.
  return 1.0 - math.prod(max(0.0, 1.0 - k / i) for i in range(n - c + 1, n + 1))


def humaneval(
  model: Decoder,
  tokenizer: tokenizers.Tokenizer,
  problems: Sequence[Problem],
  *,
  samples: int = 1,
  ks: Sequence[int] = (1,),
  sampling: Sampling | None = None,
  max_new_tokens: int = 300,
  batch_size: int = 8,
  key: jax.Array | None = None,
  allow_execution: bool = False,
  isolate: bool = True,
  timeout: float = 10.0,
  workers: int | None = None,
) -> HumanEval:
  """Lets the model write every function, and runs what it wrote.

  Args:
    model: a decoder.
    tokenizer: its tokenizer.
    problems: at least one.
    samples: completions of each problem, n; 200 in the paper.
    ks: which pass@k; none above `samples`.
    sampling: greedy by default, which suits one sample. The paper's is top_p 0.95 with temperature
      0.2 for pass@1, 0.8 for pass@100.
    max_new_tokens: of each completion.
    batch_size: completions at once.
    key: for sampling.
    allow_execution: run what the model wrote.
    isolate: see `run_program`.
    timeout: seconds for each program.
    workers: programs at once; as many as processors by default.

  Raises:
    UserError: execution is not allowed or cannot be isolated, and nothing was generated; there is
      no problem; `samples` or `ks` are out of range; several samples are asked for greedily.
  """
  sampling = sampling or Sampling()
  _check(problems, samples, ks, allow_execution, isolate)
  if samples > 1 and sampling.temperature == 0:
    raise UserError(
      f"samples={samples} at temperature 0 are all the same: pass sampling=Sampling(0.8, top_p=0.95)"
    )
  wanted = Generation(STOPS, max_new_tokens, sampling)
  text_model = TextModel(model, tokenizer, batch_size=batch_size, key=key)
  texts = text_model.generate_until([(p.prompt, wanted) for p in problems for _ in range(samples)])
  completions = [texts[i : i + samples] for i in range(0, len(texts), samples)]
  return score(
    problems,
    completions,
    ks=ks,
    allow_execution=allow_execution,
    isolate=isolate,
    timeout=timeout,
    workers=workers,
  )


def score(
  problems: Sequence[Problem],
  completions: Sequence[Sequence[str]],
  *,
  ks: Sequence[int] = (1,),
  allow_execution: bool = False,
  isolate: bool = True,
  timeout: float = 10.0,
  workers: int | None = None,
) -> HumanEval:
  """Runs completions, cut already, as many for each problem; arguments as of `humaneval`.

  Completions of a problem that are the same are run once.

  Raises:
    UserError: as `humaneval`; the numbers of completions differ.
  """
  counts = {len(texts) for texts in completions}
  if len(completions) != len(problems) or len(counts) > 1:
    raise UserError(
      f"{len(problems)} problems, {len(completions)} lists of {sorted(counts)} completions: "
      "expected one list per problem, all of the same length"
    )
  _check(problems, max(counts, default=0), ks, allow_execution, isolate)
  programs = [[program(p, text) for text in texts] for p, texts in zip(problems, completions)]
  distinct = list(dict.fromkeys(source for row in programs for source in row))
  run = lambda source: run_program(source, timeout=timeout, isolate=isolate)
  with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
    found = dict(zip(distinct, pool.map(run, distinct)))
  outcomes = [[found[source] for source in row] for row in programs]
  pass_at, errors = {}, {}
  for k in ks:
    estimates = [pass_at_k(len(row), sum(o.passed for o in row), k) for row in outcomes]
    pass_at[k] = float(np.mean(estimates))
    several = len(estimates) > 1
    errors[k] = (
      float(np.std(estimates, ddof=1)) / math.sqrt(len(estimates)) if several else math.nan
    )
  return HumanEval(pass_at, errors, outcomes, [list(texts) for texts in completions])


def _check(
  problems: Sequence[Problem],
  samples: int,
  ks: Sequence[int],
  allow_execution: bool,
  isolate: bool,
) -> None:
  """Refuses before anything is generated or run."""
  if not problems:
    raise UserError("there is no problem to solve: expected at least one; pass more problems")
  for problem in problems:
    if wrong := _wrong(problem.entry_point):
      raise UserError(f"problem {problem.task_id}: {wrong}: mend or drop it")
  if not ks or not 1 <= min(ks) <= max(ks) <= samples:
    raise UserError(
      f"ks={tuple(ks)} of {samples} samples: expected at least one k from 1 to samples"
    )
  if not allow_execution:
    raise UserError(
      f"HumanEval runs {len(problems) * samples} Python programs that a model wrote on this "
      "machine: read common/evaluation/sandbox.py for what keeps them in, then pass "
      "allow_execution=True"
    )
  if isolate:
    require_isolation()
