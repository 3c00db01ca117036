"""From a text source to arrays of tokens: batches to train on, windows to evaluate on, samples to
calibrate on.

`source` is what `common.data.sources.load_documents` takes, so it may be a mix such as
`embedded:code,embedded:prose`.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import grain
import grain.experimental
import jax
import numpy as np
import tokenizers

from common.data.sources import load_documents
from common.data.tokenizer import EncodedDocuments, encode_documents
from common.errors import UserError
from common.paths import cache_dir

# First-fit packing pads less when it may choose among more rows; beyond this it gains little.
_MIN_PACKING_ROWS = 64


class Windows(NamedTuple):
  """Consecutive windows of text.

  Attributes:
    tokens: [num_windows, seq], int32.
    num_bytes: [num_windows], int64. UTF-8 bytes of text in each, for bits per byte; without those
      of its first token, which nothing predicts.
  """

  tokens: np.ndarray
  num_bytes: np.ndarray


def token_batches(
  source: str,
  tokenizer: tokenizers.Tokenizer,
  *,
  split: str,
  seq_len: int,
  batch_size: int,
  seed: int,
  packing: Literal["first_fit", "concat"] = "first_fit",
  shuffle: bool = True,
  num_epochs: int | None = None,
  shard_index: int | None = None,
  shard_count: int | None = None,
) -> grain.IterDataset:
  """Returns packed batches of a source's documents, each followed by the eos token.

  Every epoch has every token once, over all shards together. Its order depends on `seed` and the
  epoch only; an iterator's `get_state`/`set_state` continue it exactly.

  Args:
    source: see `load_documents`.
    tokenizer: from `load_tokenizer`.
    split: train, validation or test.
    seq_len: tokens in a row.
    batch_size: rows in a batch of this shard.
    seed: of the order, different in every epoch.
    packing: `first_fit` cuts documents into pieces of seq_len and puts a remainder beside others
      where it fits, padding what stays free; `concat` strings whole documents together and cuts a
      row every seq_len tokens, without padding.
    shuffle: whether to shuffle; by pieces if first_fit, by documents if concat.
    num_epochs: when to stop, None for never. The last batch is filled up with rows of padding.
      Shards may differ in their number of batches: let training over several hosts count steps.
    shard_index: this shard, default `jax.process_index()`.
    shard_count: number of shards, default `jax.process_count()`.

  Returns:
    Batches {"tokens", "segment_ids", "positions"}, each [batch, seq], int32. Segment ids count
    the documents (or pieces) of a row from 1 and are 0 for padding, whose tokens and positions are
    0; positions begin at 0 in every segment.

  Raises:
    UserError: what `load_documents` raises; an unknown packing; fewer documents than shards.
    ValueError: a size is not positive, or there is no such shard.
  """
  shard_index = jax.process_index() if shard_index is None else shard_index
  shard_count = jax.process_count() if shard_count is None else shard_count
  if min(seq_len, batch_size) < 1 or not 0 <= shard_index < shard_count:
    raise ValueError(f"{seq_len=}, {batch_size=}, {shard_index=}, {shard_count=}")
  if packing not in ("first_fit", "concat"):
    raise UserError(f"unknown packing {packing!r}; there are first_fit, concat")
  encoded = _encode(source, tokenizer, split)
  pieces = _Pieces(encoded, seq_len if packing == "first_fit" else None)
  if len(pieces) < shard_count:
    raise UserError(f"{source!r} has {len(pieces)} documents for {shard_count} shards")

  dataset = grain.MapDataset.source(pieces)
  if shuffle:
    dataset = dataset.shuffle(seed % 2**32)
  # Shards are cut from the shuffled order, so each gets other documents in every epoch.
  dataset = dataset[shard_index::shard_count].repeat(num_epochs)
  # Reading from memory needs no threads.
  dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  if packing == "first_fit":
    dataset = grain.experimental.FirstFitPackIterDataset(
      dataset,
      length_struct={"tokens": seq_len},
      num_packing_bins=max(batch_size, _MIN_PACKING_ROWS),
      seed=seed % 2**32,
      shuffle_bins=shuffle,
    )
  else:
    dataset = _RestoredFromJson(
      grain.experimental.ConcatThenSplitIterDataset(dataset, length_struct={"tokens": seq_len})
    )
  return dataset.batch(batch_size, batch_fn=lambda rows: _stack(rows, batch_size))


def token_windows(
  source: str,
  tokenizer: tokenizers.Tokenizer,
  *,
  split: str,
  seq_len: int,
  limit: int | None = None,
) -> Windows:
  """Returns the text of a source in order, cut into windows, to measure perplexity on.

  Documents are joined with an eos token behind each; a last partial window is dropped.

  Args:
    source: see `load_documents`.
    tokenizer: from `load_tokenizer`.
    split: train, validation or test.
    seq_len: tokens in a window.
    limit: the largest number of windows.

  Raises:
    UserError: what `load_documents` raises; less text than one window.
  """
  encoded = _encode(source, tokenizer, split)
  num_windows = len(encoded.tokens) // seq_len
  if not num_windows:
    raise UserError(
      f"the {split} split of {source!r} has {len(encoded.tokens)} tokens, "
      f"less than one window of {seq_len}"
    )
  num_windows = num_windows if limit is None else min(num_windows, limit)
  shape = num_windows, seq_len
  size = num_windows * seq_len
  num_bytes = encoded.num_bytes[:size].reshape(shape)[:, 1:].sum(1)
  return Windows(encoded.tokens[:size].reshape(shape), num_bytes)


def evaluation_windows(
  sources: Iterable[str],
  tokenizer: tokenizers.Tokenizer,
  *,
  seq_len: int,
  per_source: int | None = None,
  split: str = "test",
) -> dict[str, np.ndarray]:
  """Windows of several sources, {source: int32 [windows, seq]}.

  They are evenly spaced over a split, so that a few windows still come from many documents.

  Args:
    sources, tokenizer, split, seq_len: see `token_windows`.
    per_source: the largest number of windows of each; None or 0 takes all.
  """
  windows = {}
  for source in sources:
    tokens = token_windows(source, tokenizer, split=split, seq_len=seq_len).tokens
    kept = min(per_source or len(tokens), len(tokens))
    windows[source] = tokens[np.linspace(0, len(tokens) - 1, kept).astype(int)]
  return windows


def calibration_samples(
  source: str,
  tokenizer: tokenizers.Tokenizer,
  *,
  num_samples: int,
  seq_len: int,
  seed: int,
  split: str = "train",
  max_document_tokens: int | None = None,
) -> np.ndarray:
  """Returns text to calibrate a quantizer or a pruner on, drawn as AWQ draws from the Pile.

  Documents are shuffled, stripped and joined, without special tokens, until there is enough to
  cut `num_samples` blocks. (AWQ, `get_calib_dataset`: 512 tokens, max_document_tokens=512.)

  Args:
    source: see `load_documents`.
    tokenizer: from `load_tokenizer`.
    num_samples: number of blocks.
    seq_len: tokens in a block.
    seed: of the order of the documents.
    split: train, validation or test.
    max_document_tokens: leave longer documents out; None keeps them all.

  Returns:
    [num_samples, seq], int32.

  Raises:
    UserError: what `load_documents` raises; too little text.
  """
  documents = load_documents(source, split)
  chosen, total, wanted = [], 0, num_samples * seq_len
  for index in np.random.default_rng(seed).permutation(len(documents)):
    text = documents[int(index)]["text"].strip()
    tokens = encode_documents(tokenizer, [{"text": text}]).tokens
    if max_document_tokens is None or len(tokens) <= max_document_tokens:
      chosen.append(tokens)
      total += len(tokens)
    if total >= wanted:
      return np.concatenate(chosen)[:wanted].reshape(num_samples, seq_len)
  limit = "" if max_document_tokens is None else f" in documents of up to {max_document_tokens}"
  raise UserError(
    f"the {split} split of {source!r} has {total} tokens{limit}: {total // seq_len} samples of "
    f"{seq_len}, not {num_samples}"
  )


class _RestoredFromJson(grain.IterDataset):
  """Lets ConcatThenSplitIterDataset continue from a state that was kept as JSON, as Grain keeps it.

  Grain 0.2.18 compares the slices of a state with a tuple; JSON makes them lists, and the iterator
  would go on a document too late.
  """

  def __iter__(self) -> grain.DatasetIterator:
    return _RestoredFromJsonIterator(iter(self._parent))


class _RestoredFromJsonIterator(grain.DatasetIterator):
  def __next__(self) -> dict[str, np.ndarray]:
    return next(self._parent)

  def get_state(self) -> dict:
    return self._parent.get_state()

  def set_state(self, state: dict) -> None:
    slices = {name: tuple(bounds) for name, bounds in state["remainder_slices"].items()}
    self._parent.set_state(state | {"remainder_slices": slices})


class _Pieces(Sequence):
  """Documents, cut where they are longer than `max_len`, as Grain elements."""

  def __init__(self, encoded: EncodedDocuments, max_len: int | None):
    self._tokens = encoded.tokens
    self._bounds = [
      (start, min(start + (max_len or end), end))
      for begin, end in zip(encoded.offsets[:-1].tolist(), encoded.offsets[1:].tolist())
      for start in range(begin, end, max_len or max(end - begin, 1))
    ]

  def __len__(self) -> int:
    return len(self._bounds)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    start, end = self._bounds[index]
    return {"tokens": self._tokens[start:end]}


def _stack(rows: Sequence[dict[str, np.ndarray]], batch_size: int) -> dict[str, np.ndarray]:
  """Stacks packed rows to [batch, seq], padding an epoch's last batch with rows of zeros."""
  names = {
    "tokens": "tokens",
    "segment_ids": "tokens_segment_ids",
    "positions": "tokens_positions",
  }
  batch = {}
  for name, grain_name in names.items():
    stacked = np.stack([row[grain_name] for row in rows])
    batch[name] = np.pad(stacked, ((0, batch_size - len(rows)), (0, 0)))
  return batch


def _encode(source: str, tokenizer: tokenizers.Tokenizer, split: str) -> EncodedDocuments:
  """Encodes a split, an eos token behind each document; kept on disk by what is encoded."""
  documents = [document["text"] for document in load_documents(source, split)]
  digest = hashlib.sha256(tokenizer.to_str().encode())
  digest.update(f"{tokenizer.encode_special_tokens}".encode())
  for text in documents:
    data = text.encode("utf-8")
    digest.update(len(data).to_bytes(8, "big") + data)
  path = cache_dir("tokens") / f"{digest.hexdigest()[:32]}.npz"
  if path.exists():
    with np.load(path) as arrays:
      return EncodedDocuments(**arrays)
  encoded = encode_documents(tokenizer, [{"text": text} for text in documents], add_eos=True)
  temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp.npz")
  np.savez(temporary, **encoded._asdict())
  os.replace(temporary, path)
  return encoded
