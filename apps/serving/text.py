"""From tokens to text while they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

import tokenizers

# The decoder needs some text before the new one to know about spaces between words.
_CONTEXT = 8


class TextStream:
  """The text of one generation."""

  def __init__(
    self, tokenizer: tokenizers.Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()
  ):
    """prompt: what the text continues. stop: strings of which the first ends it."""
    self._tokenizer = tokenizer
    context = list(prompt[-_CONTEXT:])
    self._decoder = tokenizers.decoders.DecodeStream(ids=context, skip_special_tokens=True)
    self.stop = [text for text in stop if text]
    self._held = ""
    self.stopped = False

  def add(self, token: int) -> str:
    """The text that is certain now; "" while a character or a stop string may be unfinished."""
    if self.stopped:
      return ""
    self._held += self._decoder.step(self._tokenizer, token) or ""
    found = [at for at in map(self._held.find, self.stop) if at >= 0]
    if found:
      self.stopped = True
      text, self._held = self._held[: min(found)], ""
      return text
    # What may be the beginning of a stop string is held back.
    keep = max((_overlap(self._held, text) for text in self.stop), default=0)
    text = self._held[: len(self._held) - keep]
    self._held = self._held[len(self._held) - keep :]
    return text

  def end(self) -> str:
    """What was held back for a stop string that did not come."""
    text, self._held = self._held, ""
    return text


def _overlap(text: str, stop: str) -> int:
  """Characters at the end of the text that a stop string begins with, less than all of it."""
  longest = min(len(text), len(stop) - 1)
  return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
