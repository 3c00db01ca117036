"""What the server's engine is given and gives back."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from common.decoding.constrained import Constraint
from common.decoding.generation import Sampling

TOP = 20  # Most likely tokens that a request may ask for.


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """One text to generate.

  Attributes:
    prompt: token ids, at least one.
    max_new_tokens: tokens at most.
    sampling: how they are chosen.
    seed: from 0 to 2^32 - 1; the same seed, prompt and sampling give the same text (on the same
      machine).
    stop: strings that end the text and are no part of it.
    bias: by token, added to its logit.
    presence_penalty: taken from the logit of every token that the text has.
    frequency_penalty: taken from it as often as the text has the token.
    constraint: of the text, or None.
    finish: is called when the constrained text has ended, with whether it is complete; not if it was
      cancelled.
    top: most likely tokens to report beside each token.
    emit: is called in the engine's thread with every `Piece` and at last one `End`.
  """

  prompt: Sequence[int]
  max_new_tokens: int
  emit: Callable[["Piece | End"], None]
  sampling: Sampling = Sampling()
  seed: int = 0
  stop: Sequence[str] = ()
  bias: dict[int, float] = dataclasses.field(default_factory=dict)
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  constraint: Constraint | None = None
  finish: Callable[[bool], None] | None = None
  top: int = 0


class Score(NamedTuple):
  """A token, its log-probability under the model, and the most likely tokens there."""

  token: int
  log_prob: float
  top: list[tuple[int, float]]


class Piece(NamedTuple):
  """Text that is certain, which may be "", and the token that came with it."""

  text: str
  score: Score


class End(NamedTuple):
  """The last text, and why it ended; `message` only of an error."""

  text: str
  reason: Literal["stop", "length", "cancelled", "error"]
  message: str = ""


class Busy(Exception):
  """The queue is full, or the engine is shutting down."""


@dataclasses.dataclass
class Counts:
  """What happened since the start."""

  prompt_tokens: int = 0
  prefill_slots: int = 0
  new_tokens: int = 0
  steps: int = 0
  occupied_slots: int = 0  # Summed over the steps.
  row_passes: int = 0  # Passes of the model that a taken slot took part in.
  drafted: int = 0
  accepted: int = 0
  stop: int = 0
  length: int = 0
  cancelled: int = 0
  error: int = 0
