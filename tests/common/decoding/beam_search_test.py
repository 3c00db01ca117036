"""Beam search against transformers, against all texts there are, and against greedy generation."""

import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.checkpoints.huggingface import Checkpoint
from common.decoding import beam_search as module
from common.decoding.beam_search import beam_search
from common.decoding.generation import generate
from common.errors import UserError
from common.models.decoder import DecoderConfig
from tests.common.models.small_decoders import (
  ARCHITECTURES,
  random_decoder,
  random_encoder_decoder,
)

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
PROMPTS = [[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [9]]
# All texts of 4 tokens are 81, of which 27 beams hold every one of 3 tokens.
VOCAB, NEW, BEAMS = 3, 4, 27
EARLY_STOPPING = (False, True, "never")  # As the vectors' third axis counts.
TINY = {"vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 16, "num_heads": 2}


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_equals_transformers(name):
  golden = np.load(GOLDEN / "beam_search" / f"{name}.npz")
  model = Checkpoint(GOLDEN / "hf_checkpoints" / name).load_model()
  norm = model.final_norm if name == "llama" else model.decoder.final_norm
  norm.scale[...] = norm.scale[...] * golden["gain"]
  prompts = [row[row >= 0].tolist() for row in golden["prompts"]]
  num_beams, max_new_tokens = golden["tokens"].shape[-2:]
  compiled = module._beam_search._cache_size()
  for case in itertools.product(*map(range, golden["tokens"].shape[:3])):
    stops = golden["stops"][case[0]].tolist()
    rows = beam_search(
      model,
      prompts,
      max_new_tokens=max_new_tokens,
      num_beams=num_beams,
      length_penalty=golden["penalties"][case[1]],
      early_stopping=EARLY_STOPPING[case[2]],
      stop_tokens=stops,
      num_return=num_beams,
    )
    expected = [
      [[t for t in text if t >= 0 and t not in stops] for text in row]
      for row in golden["tokens"][case].tolist()
    ]
    assert [[h.tokens for h in row] for row in rows] == expected
    scores = [[h.score for h in row] for row in rows]
    np.testing.assert_allclose(scores, golden["scores"][case], rtol=1e-4, atol=1e-6)
  # One for each kind of early stopping: penalties and stop tokens are data.
  assert module._beam_search._cache_size() == compiled + 3


def test_the_vectors_tell_the_kinds_of_early_stopping_apart():
  tokens = np.load(GOLDEN / "beam_search" / "llama.npz")["tokens"]
  for one, other in itertools.combinations(range(len(EARLY_STOPPING)), 2):
    assert (tokens[:, :, one] != tokens[:, :, other]).any()


@pytest.mark.parametrize(
  "early_stopping, length_penalty, done",
  [
    (False, 1.0, True),  # At the present length of 2: -3 / 2 is below -1.2,
    ("never", 1.0, False),  # at 4 tokens -3 / 4 is not.
    ("never", 0.0, True),  # -3 is a bound,
    ("never", -1.0, True),  # and so is -3 * 2: longer texts score less.
    (True, 1.0, True),
  ],
)
def test_a_row_is_done_when_its_running_beam_cannot_become_better(
  early_stopping, length_penalty, done
):
  empty = jnp.zeros((1, 1, 4), jnp.int32)
  pool = jnp.full((1, 1), -1.2)
  beams = module.Beams(empty, jnp.full((1, 1), -3.0), empty, pool, jnp.zeros(1, bool))
  logits = jnp.array([[-99.0, 0.0, -99.0]])  # One token for certain, which does not end the text.
  norms = jnp.arange(1, 5) ** length_penalty
  beams, _ = module._extend(beams, logits, 1, jnp.array([2]), norms, early_stopping)
  assert beams.done.tolist() == [done]


def all_texts(prompt_log_probs, stop):
  """{text: sum(log p)} of all texts of up to NEW tokens, from (text) -> log p [VOCAB]."""
  texts, open_texts = {}, {(): 0.0}
  for length in range(1, NEW + 1):
    longer = {}
    for text, total in open_texts.items():
      for token, log_p in enumerate(prompt_log_probs(text)):
        ends = token == stop or length == NEW
        (texts if ends else longer)[*text, token] = total + float(log_p)
    open_texts = longer
  return texts


def decoder_log_probs(prompt):
  config = DecoderConfig(
    **TINY, num_layers=1, num_kv_heads=2, head_dim=4, max_position_embeddings=32
  )
  model = random_decoder(config, seed=3)
  run = nnx.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)[0]))

  def log_probs(text):
    tokens = [*prompt, *text]
    padded = jnp.array([tokens + [0] * (8 - len(tokens))])
    return np.asarray(run(model, padded)[0, len(tokens) - 1])

  return model, log_probs


def seq2seq_log_probs(source):
  model = random_encoder_decoder(3, **TINY, head_dim=4, eos_token_id=1)
  run = nnx.jit(lambda model, *tokens: jax.nn.log_softmax(model(*tokens)))

  def log_probs(text):
    target = jnp.array([[0, *text] + [0] * (NEW - len(text))])
    return np.asarray(run(model, jnp.array([source]), target)[0, len(text)])

  return model, log_probs


@pytest.mark.parametrize("make", [decoder_log_probs, seq2seq_log_probs])
def test_enough_beams_find_the_best_of_all_texts(make):
  prompt = [2, 0, 1]
  model, log_probs = make(prompt)
  # The penalties are those for which no text can overtake a full pool: it ends with the best.
  for length_penalty in (0.0, -0.5):
    texts = all_texts(log_probs, stop=1)
    scored = {t: total / len(t) ** length_penalty for t, total in texts.items()}
    best = sorted(scored, key=scored.get, reverse=True)[:5]
    found = beam_search(
      model,
      [prompt],
      max_new_tokens=NEW,
      num_beams=BEAMS,
      num_return=5,
      length_penalty=length_penalty,
      stop_tokens=1,
    )[0]
    assert [h.tokens for h in found] == [[t for t in text if t != 1] for text in best]
    np.testing.assert_allclose([h.score for h in found], [scored[t] for t in best], rtol=1e-4)


def test_fewer_texts_than_beams():
  model, _ = decoder_log_probs([2])
  found = beam_search(model, [[2]], max_new_tokens=1, num_beams=5, num_return=5)[0]
  assert sorted(h.tokens for h in found) == [[0], [1], [2]]
  assert math.isclose(sum(math.exp(h.score) for h in found), 1.0, rel_tol=1e-5)


@pytest.mark.parametrize(
  "make", [lambda: random_decoder(ARCHITECTURES["llama"]), random_encoder_decoder]
)
def test_one_beam_is_greedy(make):
  model = make()
  greedy = generate(model, PROMPTS, max_new_tokens=8, stop_tokens=[])
  stop = greedy[0][2]
  for stops in ([], stop):
    rows = beam_search(model, PROMPTS, max_new_tokens=8, num_beams=1, stop_tokens=stops)
    assert [[h.tokens for h in row] for row in rows] == [[tokens] for tokens in greedy]
    greedy = [row[: row.index(stop)] if stop in row else row for row in greedy]


@pytest.mark.parametrize("architecture", ["bloom", "opt"])
def test_a_row_depends_on_itself_alone(architecture):
  model = random_decoder(ARCHITECTURES[architecture])
  stops = list(range(20, 28))
  search = lambda prompts: beam_search(
    model, prompts, max_new_tokens=6, num_beams=3, num_return=3, stop_tokens=stops
  )
  batch = search(PROMPTS)
  assert len({len(h.tokens) for row in batch for h in row}) > 1
  # The same shape, and hence compilation, without the other prompts.
  for prompt, row in zip(PROMPTS, batch):
    for alone in search([prompt] * 3):
      assert [h.tokens for h in row] == [h.tokens for h in alone]
      np.testing.assert_allclose([h.score for h in row], [h.score for h in alone], rtol=1e-4)
    assert not {*stops}.intersection(*(h.tokens for h in row))


def test_beams_run_on_however_many_stop_tokens_are_likely():
  empty = jnp.zeros((1, 2, 4), jnp.int32)
  missing = jnp.full((1, 2), -jnp.inf)
  beams = module.Beams(empty, jnp.zeros((1, 2)), empty, missing, jnp.zeros(1, bool))
  logits = jnp.array([[5.0, 6.0, 7.0, -9.0, 2.0], [4.0, 4.0, 4.0, -9.0, 3.0]])
  stop, norms = jnp.array([0, 1, 2]), jnp.ones(4)
  beams, rows = module._extend(beams, logits, 1, stop, norms, False)
  assert rows.tolist() == [1, 0] and beams.tokens[0, :, 1].tolist() == [4, 4]
  np.testing.assert_allclose(beams.scores[0], jax.nn.log_softmax(logits)[::-1, 4], rtol=1e-6)


def test_one_compilation_per_bucket():
  model = random_decoder(ARCHITECTURES["llama"])
  search = lambda *prompts, **options: beam_search(
    model, prompts, max_new_tokens=4, num_beams=2, **options
  )
  search([1, 2], [3])
  before = module._beam_search._cache_size()
  search([4, 5, 6, 7], [8], length_penalty=0.3, stop_tokens=5, num_return=2)
  assert module._beam_search._cache_size() == before
  search([4] * 40, [8])
  assert module._beam_search._cache_size() == before + 1


@pytest.mark.parametrize(
  "options, message",
  [
    ({"num_beams": 0}, "num_beams=0"),
    ({"num_return": 0}, "num_return=0"),
    ({"num_return": 3}, "num_return=3"),
    ({"early_stopping": "always"}, "early_stopping='always'"),
    ({"length_penalty": math.nan}, "length_penalty=nan"),
    ({"length_penalty": -200.0}, "length_penalty=-200"),
    ({"prompts": [[1], []]}, "at least one token"),
    ({"prompts": [[64]]}, "tokenizer"),
    ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ({"max_new_tokens": 31}, "33 positions; the model has 32"),
    ({"stop_tokens": [3, 64]}, r"stop_tokens=\[3, 64\]"),
  ],
)
def test_bad_input_is_a_user_error(options, message):
  model = random_decoder(ARCHITECTURES["opt"])
  with pytest.raises(UserError, match=message):
    beam_search(
      model, **{"prompts": [[1, 2]], "max_new_tokens": 2, "num_beams": 2, "num_return": 1} | options
    )
