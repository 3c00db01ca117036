"""Our decoders in EleutherAI's lm-evaluation-harness, so that any of its tasks can score them.

    import lm_eval
    base = base_model("/path/to/hf")
    model = harness_model(base.model, base.tokenizer)
    lm_eval.simple_evaluate(model=model, tasks=["arc_easy", "gsm8k"])

The package lm-eval, which brings PyTorch, is imported only then.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from common.decoding.generation import Sampling
from common.errors import UserError
from common.evaluation.text_model import Generation, TextModel
from common.models.decoder import Decoder

LM_EVAL = "lm-eval==0.4.13"

_MAX_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Options of other generators, with the value at which they change nothing.
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}


def require_harness(tasks: Sequence[str]) -> None:
  """Checks, before any work, that what the tasks need is there.

  Raises:
    UserError: there are tasks, and lm-eval is not installed.
  """
  if tasks and importlib.util.find_spec("lm_eval") is None:
    raise UserError(
      f"the tasks {', '.join(tasks)} need EleutherAI's harness: pip install {LM_EVAL}, or leave "
      "them out with --config.tasks=()"
    )


def zero_shot_accuracies(
  model: Decoder,
  tokenizer: tokenizers.Tokenizer,
  tasks: Sequence[str],
  *,
  limit: int = 0,
  normalized: bool = False,
) -> list[float]:
  """Shares of the questions that are answered right, one per task; none without tasks.

  Args:
    model, tokenizer: see `harness_model`.
    tasks: names of the harness.
    limit: questions of each; 0 takes all.
    normalized: by the likelihood over the answer's length, of tasks that have it (acc_norm).

  Raises:
    UserError: see `harness_model`; or the harness gives no results.
  """
  if not tasks:
    return []
  adapted = harness_model(model, tokenizer)
  import lm_eval

  found = lm_eval.simple_evaluate(model=adapted, tasks=list(tasks), limit=limit or None)
  if found is None:
    raise UserError(f"the harness returned no results for {', '.join(tasks)}")
  name = lambda scores: "acc_norm,none" if normalized and "acc_norm,none" in scores else "acc,none"
  return [float(found["results"][task][name(found["results"][task])]) for task in tasks]


def harness_model(model: Decoder, tokenizer: tokenizers.Tokenizer, **options):
  """An `lm_eval.api.model.LM`, to be given to `lm_eval.simple_evaluate(model=...)`.

  Args:
    model: a decoder.
    tokenizer: its tokenizer.
    **options: of `TextModel`.

  Raises:
    UserError: lm-eval is not installed, or what `TextModel` raises.
  """
  try:
    from lm_eval.api.model import LM
  except ModuleNotFoundError as e:
    raise UserError(
      f"the evaluation harness is not installed ({e}): expected the package lm-eval; "
      f"pip install {LM_EVAL}"
    ) from None

  class HarnessModel(LM):
    """A `TextModel` as the harness calls one."""

    def __init__(self, text_model: TextModel):
      super().__init__()
      self._text_model = text_model

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
      return self._text_model.log_likelihoods([request.args for request in requests])

    def loglikelihood_rolling(self, requests) -> list[float]:
      return self._text_model.rolling_log_likelihoods([request.args[0] for request in requests])

    def generate_until(self, requests) -> list[str]:
      args = [request.args for request in requests]
      return self._text_model.generate_until([(text, generation(kw)) for text, kw in args])

  return HarnessModel(TextModel(model, tokenizer, **options))


def generation(options: Mapping[str, Any]) -> Generation:
  """Reads the harness's generation options: until, max_gen_toks, do_sample, temperature, top_k/p.

  Raises:
    UserError: an option that `common.decoding.generation` does not have.
  """
  options = dict(options)
  until = options.pop("until", None) or ()
  until = (until,) if isinstance(until, str) else tuple(until)
  counts = [options.pop(name, None) for name in _MAX_TOKENS_NAMES]
  max_new_tokens = int(next((count for count in counts if count is not None), 256))
  temperature = options.pop("temperature", None)
  do_sample = options.pop("do_sample", bool(temperature))
  temperature = (1.0 if temperature is None else float(temperature)) if do_sample else 0.0
  top_k, top_p = int(options.pop("top_k", None) or 0), options.pop("top_p", None)
  unknown = {k: v for k, v in options.items() if k not in _NEUTRAL or v != _NEUTRAL[k]}
  if unknown:
    raise UserError(
      f"generation options {unknown} are not supported: expected until, max_gen_toks, do_sample, "
      "temperature, top_k and top_p; override the task's generation_kwargs"
    )
  sampling = Sampling(temperature, top_k, 1.0 if top_p is None else float(top_p))
  # Greedy is one group, whatever the filters say.
  return Generation(until, max_new_tokens, sampling if do_sample else Sampling())
