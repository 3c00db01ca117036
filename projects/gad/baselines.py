"""Sampling without a grammar's help: the model's own texts, and those of them that are grammatical."""

from collections.abc import Callable, Sequence

import jax

from common.decoding.generation import Sampling, generate
from common.models.decoder import Decoder


def unconstrained_sample(
  model: Decoder,
  prompts: Sequence[Sequence[int]],
  eos: int,
  *,
  max_new_tokens: int,
  key: jax.Array,
  temperature: float = 1.0,
) -> list[list[int] | None]:
  """The model's own texts; None for one that does not end within `max_new_tokens` tokens."""
  found = generate(
    model,
    prompts,
    max_new_tokens=max_new_tokens,
    key=key,
    sampling=Sampling(temperature),
    stop_tokens=eos,
  )
  return [row if len(row) < max_new_tokens else None for row in found]


def rejection_sample(
  draw: Callable[[int], Sequence[list[int] | None]],
  accepts: Callable[[list[int]], bool],
  count: int,
  max_rounds: int,
) -> tuple[list[list[int]], int]:
  """Exact samples of the model's distribution given grammaticality.

  Args:
    draw: some texts of the model, for round 0, 1, ...; None for one that does not end.
    accepts: whether a text is grammatical.
    count: texts wanted.
    max_rounds: after which it is given up.

  Returns:
    At most `count` texts, and how many texts had to be drawn for them.
  """
  accepted, drawn = [], 0
  for i in range(max_rounds):
    for text in draw(i):
      drawn += 1
      if text is not None and accepts(text):
        accepted.append(text)
        if len(accepted) == count:
          return accepted, drawn
  return accepted, drawn
