"""Streams against `generate`, for greedy and sampled tokens."""

import itertools

import jax
import pytest
import tokenizers

from common.decoding import streaming
from common.decoding.generation import Sampling, generate
from common.decoding.streaming import stream
from common.errors import UserError
from tests.common.models.small_decoders import (
  ARCHITECTURES,
  random_decoder,
  random_encoder_decoder,
)

PROMPTS = [[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [9]]
NEW = 11


def decoder():
  return random_decoder(ARCHITECTURES["llama"])


def joined(chunks):
  return [list(itertools.chain(*rows)) for rows in zip(*chunks)]


@pytest.mark.parametrize(
  "make, sampling, chunk",
  [
    (decoder, Sampling(), 4),
    (decoder, Sampling(temperature=1.0, top_k=20), 1),
    (random_encoder_decoder, Sampling(), 99),
    (random_encoder_decoder, Sampling(temperature=1.0, top_k=20), 4),
  ],
)
def test_equals_generate(make, sampling, chunk):
  model = make()
  options = {"max_new_tokens": NEW, "sampling": sampling, "key": jax.random.key(5)}
  free = generate(model, PROMPTS, stop_tokens=[], **options)
  compiled = streaming._chunk._cache_size()
  chunks = list(stream(model, PROMPTS, chunk=chunk, stop_tokens=[], **options))
  assert joined(chunks) == free
  full = [min(chunk, NEW - i) for i in range(0, NEW, chunk)]
  assert [[len(row) for row in rows] for rows in chunks] == [[n] * 3 for n in full]
  # A row stops in the first chunk of four, the others later or not at all.
  stop = free[0][1]
  stopped = [row[: row.index(stop)] if stop in row else row for row in free]
  assert joined(stream(model, PROMPTS, chunk=chunk, stop_tokens=stop, **options)) == stopped
  assert streaming._chunk._cache_size() == compiled + 1


def test_ends_when_all_rows_have_stopped(monkeypatch):
  model = decoder()
  prompts = [PROMPTS[0], PROMPTS[2]]
  free = generate(model, prompts, max_new_tokens=NEW)
  stops = [free[0][3], free[1][5]]
  ends = [min(row.index(stop) for stop in stops if stop in row) for row in free]
  assert ends[0] != ends[1]
  calls, chunk = [], streaming._chunk
  monkeypatch.setattr(streaming, "_chunk", lambda *args: calls.append(args[2]) or chunk(*args))
  pieces = list(stream(model, prompts, max_new_tokens=NEW, stop_tokens=stops, chunk=2))
  assert joined(pieces) == [row[:end] for row, end in zip(free, ends)]
  assert len(calls) == max(ends) // 2 + 1
  # Every call took over the buffers that it was given.
  assert all(leaf.is_deleted() for sampled in calls for leaf in jax.tree.leaves(sampled))
  # The first tokens may be the last.
  firsts = [row[0] for row in free]
  assert list(stream(model, prompts, max_new_tokens=NEW, stop_tokens=firsts, chunk=2)) == []


def test_text_of_a_stream_has_whole_characters_only():
  byte_level = tokenizers.pre_tokenizers.ByteLevel
  vocab = {c: i for i, c in enumerate(sorted(byte_level.alphabet()))}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
  tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  decoder = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
  pieces = [decoder.step(tokenizer, t) for t in tokenizer.encode("né 語").ids]
  assert pieces == ["n", None, "é", " ", None, None, "語"]


@pytest.mark.parametrize(
  "options, message",
  [
    ({"chunk": 0}, "chunk=0"),
    ({"prompts": [[1], []]}, "at least one token"),
    ({"prompts": [[64]]}, "tokenizer"),
    ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ({"max_new_tokens": 31}, "33 positions; the model has 32"),
    ({"stop_tokens": [-2]}, r"stop_tokens=\[-2\]"),
  ],
)
def test_bad_input_is_a_user_error_at_the_call(options, message):
  model = random_decoder(ARCHITECTURES["opt"])
  with pytest.raises(UserError, match=message):
    stream(model, **{"prompts": [[1, 2]], "max_new_tokens": 2} | options)


def test_sampling_needs_a_key():
  with pytest.raises(ValueError, match="key"):
    stream(decoder(), PROMPTS, max_new_tokens=2, sampling=Sampling(temperature=1.0))
