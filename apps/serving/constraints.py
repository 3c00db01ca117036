"""What requests say their texts must be like, made into constraints of the decoder."""

import collections
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import tokenizers

from apps.serving.protocol import ChatRequest, CompletionRequest
from common.decoding.constrained import Constraint, GrammarConstraint
from common.decoding.grammar.ebnf import parse_ebnf
from common.decoding.grammar.json_schema import json_schema_ebnf
from common.decoding.grammar.token_mask import TokenMasks, Vocabulary
from common.errors import UserError
from projects.gad.asap import AsapConstraint
from projects.gad.trie import Trie

# Grammars and tries that are kept, the last ones used.
_KEPT = 64
_TRIE_NODES = 100_000
# Around the punctuation of JSON; with any white space a model may go on with it for ever.
_SPACE = '" "?'


class Constraints:
  """Makes constraints for one model, from any thread; grammars that come again are ready."""

  def __init__(self, tokenizer: tokenizers.Tokenizer, vocab_size: int, stop_tokens: Sequence[int]):
    """stop_tokens: each ends a text."""
    self._make_vocabulary = lambda: Vocabulary.of(tokenizer, vocab_size, stop_tokens)
    self._vocabulary: Vocabulary | None = None
    self._masks: collections.OrderedDict[Hashable, TokenMasks] = collections.OrderedDict()
    self._tries: collections.OrderedDict[Hashable, Trie] = collections.OrderedDict()
    self._lock = threading.Lock()

  def __call__(
    self, request: CompletionRequest | ChatRequest, prompt: Sequence[int], max_new_tokens: int
  ) -> Constraint:
    """The constraint of one text.

    Equal requests for aligned samples share what was learned of the grammar's texts.

    Raises:
      UserError: the grammar or schema cannot be read, or not be spelled by the vocabulary; or
        aligned sampling is asked for together with what changes the model's distribution.
    """
    if request.grammar is not None:
      text = request.grammar
    elif request.response_format.type == "json_schema":
      text = json_schema_ebnf(request.response_format.json_schema.schema_, whitespace=_SPACE)
    else:
      text = json_schema_ebnf({"type": "object"}, whitespace=_SPACE)
    with self._lock:
      if self._vocabulary is None:
        self._vocabulary = self._make_vocabulary()
      masks = _kept(self._masks, text, lambda: TokenMasks(parse_ebnf(text), self._vocabulary))
      if not request.grammar_aligned:
        return GrammarConstraint(masks)
      penalties = request.presence_penalty or request.frequency_penalty
      cut = request.top_k or request.top_p < 1 or not request.temperature
      if cut or penalties or request.logit_bias or request.stop_strings:
        raise UserError(
          "grammar_aligned samples from the model's own distribution: expected a positive "
          "temperature and no top_k, top_p, penalties, logit_bias or stop"
        )
      where = (text, tuple(prompt), max_new_tokens, request.temperature)
      trie = _kept(self._tries, where, lambda: Trie(self._vocabulary.eos, _TRIE_NODES))
      return AsapConstraint(masks, trie)


def _kept(cache: collections.OrderedDict, key: Hashable, make: Callable[[], Any]) -> Any:
  """The value of a key, made if it is not there; the one that was not used the longest goes."""
  if key not in cache:
    cache[key] = make()
    if len(cache) > _KEPT:
      cache.popitem(last=False)
  cache.move_to_end(key)
  return cache[key]
