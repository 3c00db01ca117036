"""Which tokens may come next: masks over a vocabulary, from the states of a recogniser.

A token is allowed if its bytes can be read, whatever borders of terminals or characters they cross,
and the end-of-sequence tokens where the text may end. The bytes of all tokens are one trie, which is
walked level by level in bulk; the recogniser's transitions are kept in a table as they are found.
"""

import functools
import json
from collections.abc import Sequence

import numpy as np
import tokenizers

from common.data.tokenizer import eos_id
from common.decoding.grammar.grammar import Grammar, restrict
from common.decoding.grammar.recognizer import Recognizer, State
from common.errors import UserError

# Masks that are kept, packed: 8,192 take 32 MiB with 32,000 tokens.
_CACHED_MASKS = 8192
# Rows of the table of transitions (of 1 KiB) beyond which it is begun anew.
_TABLE_ROWS = 16384
_UNKNOWN, _DEAD = -1, 0


def token_bytes(tokenizer: tokenizers.Tokenizer) -> list[bytes]:
  """The bytes that each token stands for inside a text; none for special tokens and unused ids.

  Of two kinds of tokenizers: byte-level BPE, and SentencePiece's, in which U+2581 is a space and
  <0x0A> a byte. Its text begins behind a prompt, so that the space of a first token counts.

  Raises:
    UserError: the tokenizer is of another kind.
  """
  settings = json.loads(tokenizer.to_str())
  kinds = _kinds(settings["pre_tokenizer"]) | _kinds(settings["decoder"])
  if "ByteLevel" in kinds:
    to_bytes = _byte_level
  elif kinds & {"ByteFallback", "Metaspace"} or settings["model"].get("byte_fallback"):
    to_bytes = _sentencepiece
  else:
    raise UserError(
      "the tokenizer's tokens are no bytes of text: expected byte-level BPE or SentencePiece with "
      f"byte fallback, got {settings['model'].get('type')} with {sorted(kinds) or 'no decoder'}"
    )
  added = tokenizer.get_added_tokens_decoder()
  vocabulary = tokenizer.get_vocab(with_added_tokens=True)
  found = [b""] * (max(vocabulary.values()) + 1)
  for token, i in vocabulary.items():
    if i not in added:
      found[i] = to_bytes(token)
    elif not added[i].special:
      found[i] = token.encode()
  return found


def _kinds(component: dict | None) -> set[str]:
  """Types of a tokenizer's component and of its parts."""
  if component is None:
    return set()
  parts = component.get("pretokenizers", []) + component.get("decoders", [])
  return {component["type"]}.union(*map(_kinds, parts))


def _byte_level(token: str) -> bytes:
  return bytes(_byte_of_character()[c] for c in token)


@functools.cache
def _byte_of_character() -> dict[str, int]:
  """GPT-2's alphabet: printable Latin-1 is itself, other bytes are the characters from 256 on."""
  printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = (byte for byte in range(256) if byte not in printable)
  return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _sentencepiece(token: str) -> bytes:
  if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
    return bytes([int(token[3:5], 16)])
  return token.replace("\u2581", " ").encode()


class Vocabulary:
  """A trie of the bytes of all tokens, for any number of grammars.

  Attributes:
    tokens: bytes of each token; empty for those that are never allowed.
    size: of the model's vocabulary, in which ids behind the tokenizer's mean nothing.
    eos: the end-of-sequence token, the first one if there are several.
    stop_tokens: all end-of-sequence tokens.
  """

  def __init__(self, tokens: list[bytes], eos: int | Sequence[int], size: int | None = None):
    """Raises UserError if an end-of-sequence token or a token lies outside the vocabulary."""
    self.size = len(tokens) if size is None else size
    self.stop_tokens = tuple(np.ravel(eos).tolist())
    if not self.stop_tokens:
      raise UserError("there is no end-of-sequence token: a grammar needs one to stop at")
    for token in self.stop_tokens:
      if not 0 <= token < self.size:
        raise UserError(f"the end-of-sequence token {token} is none of the {self.size} tokens")
    if any(tokens[self.size :]):
      raise UserError(
        f"the tokenizer has {len(tokens)} tokens, the model {self.size}: is it another model's?"
      )
    self.eos = self.stop_tokens[0]
    self.tokens = tokens[: self.size] + [b""] * (self.size - len(tokens))
    for token in self.stop_tokens:
      self.tokens[token] = b""
    self._build_trie()

  @classmethod
  def of(
    cls,
    tokenizer: tokenizers.Tokenizer,
    size: int | None = None,
    stop_tokens: Sequence[int] | None = None,
  ) -> "Vocabulary":
    """The vocabulary of a tokenizer, for a model with `size` tokens.

    Args:
      stop_tokens: end texts; by default the tokenizer's end-of-sequence token.

    Raises:
      UserError: of `token_bytes`, or there is no end-of-sequence token.
    """
    if stop_tokens is None:
      stop_tokens = [token for token in [eos_id(tokenizer)] if token is not None]
    return cls(token_bytes(tokenizer), stop_tokens, size)

  @functools.cached_property
  def alphabet(self) -> frozenset[int]:
    """Bytes that some token has."""
    return frozenset(b"".join(self.tokens))

  def text(self, tokens: list[int]) -> bytes:
    """The bytes of tokens in a row."""
    return b"".join(self.tokens[t] for t in tokens)

  def _build_trie(self) -> None:
    """Nodes are numbered level by level, so that the children of a node are neighbours.

    node_of_token: int32 [size], 0 (the root) for tokens without bytes.
    byte: uint8 [nodes], on the edge to the node. first_child: int32 [nodes + 1].
    """
    lengths = np.array([len(text) for text in self.tokens])
    flat = np.frombuffer(b"".join(self.tokens), np.uint8)
    begins = np.cumsum(lengths) - lengths
    node = np.zeros(self.size, np.int32)
    edges, children = [np.zeros(1, np.uint8)], [np.zeros(1, np.int32)]
    nodes = 1
    for depth in range(lengths.max(initial=0)):
      longer = np.flatnonzero(lengths > depth)
      keys = node[longer].astype(np.int64) << 8 | flat[begins[longer] + depth]
      unique, inverse = np.unique(keys, return_inverse=True)
      node[longer] = nodes + inverse.reshape(-1)
      edges.append((unique & 255).astype(np.uint8))
      children.append((unique >> 8).astype(np.int32))
      nodes += len(unique)
    self.node_of_token = node
    self.byte = np.concatenate(edges)
    parents = np.concatenate(children)[1:]
    self.first_child = np.searchsorted(parents, np.arange(nodes + 1)).astype(np.int32) + 1


class TokenMasks:
  """The tokens that a grammar allows in each state. Not for several threads at once.

  Attributes:
    vocabulary: of the model.
    start: the state before the first token.
    packed: `mask` as bits, uint8 [vocab / 8, rounded up], the first token in the highest bit;
      cached by state.
  """

  def __init__(self, grammar: Grammar, vocabulary: Vocabulary):
    """Raises UserError if no text of the grammar can be spelled."""
    self.vocabulary = vocabulary
    self._recognizer = Recognizer(restrict(grammar, vocabulary.alphabet))
    self.start = self._recognizer.start
    self.packed = functools.lru_cache(_CACHED_MASKS)(self._packed)
    self._forget()

  def mask(self, state: State) -> np.ndarray:
    """bool [vocab]: whether a text of the grammar may go on with each token, or end with it.

    Raises:
      UserError: there is none, because bytes that come next are in no token by themselves.
    """
    return np.unpackbits(self.packed(state), count=self.vocabulary.size).view(bool)

  def accepts(self, state: State) -> bool:
    """Whether the tokens so far are a text of the grammar."""
    return self._recognizer.accepts(state)

  def advance(self, state: State, token: int) -> State | None:
    """The state behind a token that ends no text; None if it is not allowed."""
    text = self.vocabulary.tokens[token]
    return self._recognizer.read(state, text) if text else None

  def read(self, tokens: list[int]) -> State | None:
    """The state behind tokens from the start on."""
    state = self.start
    for token in tokens:
      state = None if state is None else self.advance(state, token)
    return state

  def _packed(self, state: State) -> np.ndarray:
    """The same as bits: uint8 [vocab / 8, rounded up], the first token in the highest bit."""
    vocabulary = self.vocabulary
    alive = np.zeros(len(vocabulary.byte), bool)
    nodes, rows = np.zeros(1, np.int64), np.array([self._row(state)])
    while len(nodes):
      first = vocabulary.first_child[nodes]
      count = vocabulary.first_child[nodes + 1] - first
      # The children of all nodes in a row: an offset for each, and 0, 1, ... within a node's.
      begins = np.cumsum(count) - count
      children = np.repeat(first - begins, count) + np.arange(count.sum())
      rows = np.repeat(rows, count)
      for row in np.unique(rows):
        self._fill(row)
      rows = self._table[rows, vocabulary.byte[children]]
      nodes, rows = children[rows != _DEAD], rows[rows != _DEAD]
      alive[nodes] = True
    if len(self._states) > _TABLE_ROWS:
      self._forget()
    mask = alive[vocabulary.node_of_token]
    mask[list(vocabulary.stop_tokens)] = self.accepts(state)
    if not mask.any():
      raise UserError(
        "the vocabulary cannot spell the grammar: no token continues a text that is not complete; "
        "expected a tokenizer with a token for each single byte of the grammar"
      )
    return np.packbits(mask)

  def _forget(self) -> None:
    """An empty table of transitions: int32 [rows, 256], the row of the next state or `_DEAD`."""
    self._states: list[State | None] = [None]
    self._rows: dict[State, int] = {}
    self._table = np.full((64, 256), _DEAD, np.int32)

  def _row(self, state: State) -> int:
    row = self._rows.setdefault(state, len(self._states))
    if row == len(self._states):
      self._states.append(state)
      if row == len(self._table):
        self._table = np.concatenate([self._table, np.full_like(self._table, _DEAD)])
      self._table[row, 0] = _UNKNOWN
    return row

  def _fill(self, row: int) -> None:
    if self._table[row, 0] == _UNKNOWN:
      successors = self._recognizer.successors(self._states[row])
      after = np.array([_DEAD if s is None else self._row(s) for s in successors], np.int32)
      self._table[row] = after[self._recognizer.byte_class]
