import json
import os
import subprocess
import sys
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from common.data import pipelines
from common.data.pipelines import (
  calibration_samples,
  evaluation_windows,
  token_batches,
  token_windows,
)
from common.data.sources import load_documents
from common.data.tokenizer import encode_documents
from common.errors import UserError

EOS = 2
PACKINGS = ("first_fit", "concat")


@pytest.fixture(autouse=True)
def own_token_cache(tokenizer, monkeypatch, tmp_path_factory):
  """Encodings of this test's own; the corpora and the tokenizer stay in the shared cache."""
  folder = tmp_path_factory.mktemp("cache")
  monkeypatch.setattr(pipelines, "cache_dir", lambda name: folder)
  return folder


@pytest.fixture
def source(write_jsonl):
  rng = np.random.default_rng(0)
  return write_jsonl([f"{i}: " + "word " * rng.integers(1, 60) for i in range(120)])


def segments(batches):
  """Returns the token lists of all segments, in order, having checked the layout of every row."""
  found = []
  for batch in batches:
    assert set(batch) == {"tokens", "segment_ids", "positions"}
    assert {v.dtype for v in batch.values()} == {np.dtype(np.int32)}
    assert len({v.shape for v in batch.values()}) == 1
    for tokens, ids, positions in zip(*(batch[k] for k in ("tokens", "segment_ids", "positions"))):
      used = int((ids > 0).sum())
      assert (
        (ids[used:] == 0).all() and (tokens[used:] == 0).all() and (positions[used:] == 0).all()
      )
      assert used == 0 or (ids[0] == 1 and set(np.diff(ids[:used])) <= {0, 1})
      for i in range(1, ids.max() + 1):
        found.append(tokens[ids == i].tolist())
        assert positions[ids == i].tolist() == list(range(len(found[-1])))
  return found


def batches_of(texts, tokenizer, **kwargs):
  documents = [{"name": str(i), "text": text} for i, text in enumerate(texts)]
  with mock.patch.object(pipelines, "load_documents", lambda source, split: documents):
    return token_batches("mock", tokenizer, split="train", **kwargs)


def expected_pieces(texts, tokenizer, seq_len):
  tokens, _, offsets = encode_documents(tokenizer, [{"text": t} for t in texts], add_eos=True)
  documents = [tokens[a:b].tolist() for a, b in zip(offsets, offsets[1:])]
  return [d[i : i + seq_len] for d in documents for i in range(0, len(d), seq_len)]


corpora_of_texts = st.lists(st.text("ab c", max_size=40), min_size=3, max_size=12)


@hypothesis.given(
  st.booleans(), corpora_of_texts, st.integers(1, 12), st.integers(1, 5), st.integers(1, 3)
)
@hypothesis.settings(deadline=None, derandomize=True, max_examples=30)
def test_first_fit_has_every_piece_once_over_all_shards(
  tokenizer, shuffle, texts, seq_len, batch_size, shard_count
):
  found = []
  for index in range(shard_count):
    batches = list(
      batches_of(
        texts,
        tokenizer,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=0,
        shuffle=shuffle,
        num_epochs=1,
        shard_index=index,
        shard_count=shard_count,
      )
    )
    assert all(batch["tokens"].shape == (batch_size, seq_len) for batch in batches)
    found += segments(batches)
  assert sorted(found) == sorted(expected_pieces(texts, tokenizer, seq_len))


@hypothesis.given(corpora_of_texts, st.integers(1, 12), st.integers(1, 5))
@hypothesis.settings(deadline=None, derandomize=True, max_examples=30)
def test_concat_is_the_whole_stream_in_order(tokenizer, texts, seq_len, batch_size):
  kwargs = {"seq_len": seq_len, "batch_size": batch_size, "seed": 0, "num_epochs": 1}
  batches = list(batches_of(texts, tokenizer, packing="concat", shuffle=False, **kwargs))
  stream = sum(segments(batches), [])
  assert stream == sum(expected_pieces(texts, tokenizer, 10_000), [])
  ids = np.concatenate([batch["segment_ids"] for batch in batches]).ravel()
  assert (ids[: len(stream)] > 0).all()  # No padding but at the end.


@pytest.mark.parametrize("packing", PACKINGS)
def test_shards_are_disjoint_and_complete(tokenizer, source, packing):
  kwargs = {"split": "train", "seq_len": 16, "batch_size": 4, "seed": 3, "packing": packing}

  def shard(index, count):
    batches = token_batches(
      source, tokenizer, num_epochs=1, shard_index=index, shard_count=count, **kwargs
    )
    return sum(segments(batches), [])

  documents = load_documents(source, "train")
  tokens = encode_documents(tokenizer, documents, add_eos=True).tokens
  shards = [shard(i, 4) for i in range(4)]
  assert sorted(sum(shards, [])) == sorted(shard(0, 1)) == sorted(tokens.tolist())
  assert min(map(len, shards)) > 0.1 * len(tokens)


@pytest.mark.parametrize("packing", PACKINGS)
def test_epochs_differ_in_order_only(tokenizer, source, packing):
  def tokens(seed, num_epochs):
    kwargs = {"split": "train", "seq_len": 32, "batch_size": 8, "packing": packing}
    return sum(
      segments(token_batches(source, tokenizer, seed=seed, num_epochs=num_epochs, **kwargs)), []
    )

  one, two, other = tokens(0, 1), tokens(0, 2), tokens(1, 1)
  assert tokens(0, 1) == one
  assert one != other and sorted(one) == sorted(other)
  assert sorted(two) == sorted(one + one)
  assert two[: len(one)] != two[-len(one) :]


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_restored_iterator_continues_exactly_after_every_step(tokenizer, write_jsonl, packing):
  rng = np.random.default_rng(0)
  # 31 bytes and eos are 32 tokens: documents that end with a row, too.
  source = write_jsonl([f"{i:02}" + "\x01" * int(n) for i, n in enumerate([29] * 6 + [61, 5, 130])])

  def iterate():
    kwargs = {"seq_len": 16, "batch_size": 2, "seed": 5, "packing": packing, "num_epochs": 2}
    return iter(token_batches(source, tokenizer, split="train", **kwargs))

  iterator, states, batches = iterate(), [], []
  while True:
    states.append(json.dumps(iterator.get_state()))  # As Grain's checkpoints keep it.
    try:
      batches.append(next(iterator))
    except StopIteration:
      break
  assert len(batches) > 20
  restored = iterate()
  for step in rng.permutation(len(states)):
    restored.set_state(json.loads(states[step]))
    assert json.dumps(restored.get_state()) == states[step]
    for expected in batches[step : step + 4]:
      for name, array in next(restored).items():
        np.testing.assert_array_equal(array, expected[name])
    if step + 4 > len(batches):
      with pytest.raises(StopIteration):
        next(restored)


def test_without_num_epochs_it_never_ends(tokenizer, source):
  iterator = iter(token_batches(source, tokenizer, split="test", seq_len=64, batch_size=8, seed=0))
  assert all(next(iterator)["segment_ids"].any(1).all() for _ in range(30))


def test_first_fit_pads_little(tokenizer):
  batches = token_batches(
    "embedded:prose", tokenizer, split="test", seq_len=128, batch_size=8, seed=0, num_epochs=1
  )
  full = list(batches)[:-8]  # The last rows of an epoch are what is left.
  assert np.mean([batch["segment_ids"] > 0 for batch in full]) > 0.95


# Run in this process and in a fresh one.
DIGEST = """
import hashlib
from common.data import pipelines, tokenizer
batches = iter(pipelines.token_batches(
  "embedded:code,embedded:prose", tokenizer.load_tokenizer("embedded-512"), split="test",
  seq_len=64, batch_size=8, seed=1))
data = b"".join(array.tobytes() for _ in range(5) for array in next(batches).values())
digest = hashlib.sha256(data + tokenizer._train(512).to_str().encode()).hexdigest()
"""


def test_a_fresh_process_gives_the_same_batches_and_tokenizer(tokenizer):
  here = {}
  exec(DIGEST, here)
  env = os.environ | {"PYTHONHASHSEED": "1", "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-c", DIGEST + "print(digest)"]
  run = subprocess.run(command, env=env, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  assert run.stdout.strip() == here["digest"]


def test_encodings_are_kept_by_content(tokenizer, own_token_cache, write_jsonl):
  def windows(texts):
    return token_windows(write_jsonl(texts), tokenizer, split="train", seq_len=2).tokens.tolist()

  first = windows(["some text"])
  with mock.patch.object(pipelines, "encode_documents", side_effect=AssertionError):
    assert windows(["some text"]) == first
  assert windows(["other text"]) != first
  assert len(list(own_token_cache.iterdir())) == 2


def test_windows_are_the_text_in_order(tokenizer):
  documents = load_documents("embedded:prose", "test")
  stream = encode_documents(tokenizer, documents, add_eos=True).tokens
  tokens, num_bytes = token_windows("embedded:prose", tokenizer, split="test", seq_len=100)
  assert tokens.dtype == np.int32 and tokens.shape == (len(stream) // 100, 100)
  np.testing.assert_array_equal(tokens.ravel(), stream[: tokens.size])
  assert 99 * 3 > num_bytes.mean() > 100
  text = "".join(d["text"] for d in documents).encode()
  assert num_bytes.shape == (len(tokens),)
  # Short of the dropped part and of the windows' first tokens, which are not predicted.
  assert 0 < len(text) - num_bytes.sum() < 100 * 20 + 20 * len(tokens)
  # Exactly the bytes that the predicted tokens decode to, where no character is cut in two.
  for window, size in zip(tokens[:50], num_bytes[:50]):
    decoded = tokenizer.decode(window[1:].tolist())
    assert "\ufffd" in decoded or len(decoded.encode()) == size


def test_windows_stop_at_the_limit(tokenizer):
  kwargs = {"split": "test", "seq_len": 50}
  every = token_windows("embedded:prose", tokenizer, **kwargs)
  some = token_windows("embedded:prose", tokenizer, limit=7, **kwargs)
  np.testing.assert_array_equal(some.tokens, every.tokens[:7])
  assert len(some.num_bytes) == 7


def test_calibration_samples(tokenizer, source):
  kwargs = {"num_samples": 6, "seq_len": 20, "max_document_tokens": 60}
  blocks = calibration_samples(source, tokenizer, seed=0, **kwargs)
  assert blocks.dtype == np.int32 and blocks.shape == (6, 20)
  np.testing.assert_array_equal(blocks, calibration_samples(source, tokenizer, seed=0, **kwargs))
  assert (blocks != calibration_samples(source, tokenizer, seed=1, **kwargs)).any()
  # Shuffled, stripped, the long ones left out, joined without anything between.
  documents = load_documents(source, "train")
  order = np.random.default_rng(0).permutation(len(documents))
  encoded = [tokenizer.encode(documents[i]["text"].strip()).ids for i in order]
  assert any(len(ids) > 60 for ids in encoded[:10])
  joined = sum((ids for ids in encoded if len(ids) <= 60), [])
  assert blocks.ravel().tolist() == joined[:120]
  assert EOS not in blocks


def test_calibration_without_a_limit_cuts_long_documents(tokenizer, source):
  blocks = calibration_samples(source, tokenizer, num_samples=6, seq_len=20, seed=0)
  first = load_documents(source, "train")[int(np.random.default_rng(0).permutation(108)[0])]
  ids = tokenizer.encode(first["text"].strip()).ids[:120]
  assert blocks.ravel()[: len(ids)].tolist() == ids


def test_too_little_text(tokenizer, source, write_jsonl):
  with pytest.raises(UserError, match=r"has \d+ tokens: \d+ samples of 512, not 1000"):
    calibration_samples(source, tokenizer, num_samples=1000, seq_len=512, seed=0)
  with pytest.raises(UserError, match="0 tokens in documents of up to 1: 0 samples of 8, not 1"):
    calibration_samples(source, tokenizer, num_samples=1, seq_len=8, seed=0, max_document_tokens=1)
  with pytest.raises(UserError, match=r"the train split of .* tokens, less than one window of 999"):
    token_windows(write_jsonl(["short"]), tokenizer, split="train", seq_len=999)


def test_bad_arguments(tokenizer, source):
  kwargs = {"split": "train", "seq_len": 8, "batch_size": 2, "seed": 0}
  with pytest.raises(UserError, match="unknown packing 'best'; there are first_fit, concat"):
    token_batches(source, tokenizer, packing="best", **kwargs)
  with pytest.raises(UserError, match="has 108 documents for 1000 shards"):
    token_batches(source, tokenizer, packing="concat", shard_index=0, shard_count=1000, **kwargs)
  with pytest.raises(UserError, match="unknown split 'dev'"):
    token_batches(source, tokenizer, **{**kwargs, "split": "dev"})
  for bad in ({"seq_len": 0}, {"batch_size": 0}, {"shard_index": 2, "shard_count": 2}):
    with pytest.raises(ValueError):
      token_batches(source, tokenizer, **{**kwargs, **bad})


def test_evaluation_windows_are_spread_over_the_source(source, tokenizer):
  every = token_windows(source, tokenizer, split="test", seq_len=16).tokens
  last = len(every) - 1
  assert last > 4
  few = evaluation_windows([source], tokenizer, seq_len=16, per_source=3)
  np.testing.assert_array_equal(few[source], every[[0, last // 2, last]])
  for enough in (None, 0, last + 1, last + 9):
    whole = evaluation_windows([source], tokenizer, seq_len=16, per_source=enough)
    np.testing.assert_array_equal(whole[source], every)
