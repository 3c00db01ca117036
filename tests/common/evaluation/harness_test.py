"""The adapter beside the harness itself, where it is installed."""

import importlib.util
import types

import pytest

from common.data.tokenizer import load_tokenizer
from common.decoding.generation import Sampling
from common.errors import UserError
from common.evaluation.harness import generation, harness_model
from common.evaluation.text_model import Generation, TextModel
from common.models.decoder import DecoderConfig
from tests.common.models.small_decoders import random_decoder

PAIRS = [("def f", "(x):"), ("a b ", "c"), ("", "import os"), ("return", " self")]


@pytest.fixture(scope="module")
def tokenizer():
  return load_tokenizer("embedded-512")


@pytest.fixture(scope="module")
def model():
  return random_decoder(DecoderConfig(512, 32, 64, 2, 4, 4, 8, 40))


def test_generation_options():
  assert generation({"until": "\n"}) == Generation(("\n",), 256, Sampling())
  assert generation({"max_new_tokens": 5, "temperature": 0.5, "top_k": 3, "top_p": 0.9}) == (
    Generation((), 5, Sampling(0.5, 3, 0.9))
  )
  assert generation({"do_sample": True}).sampling == Sampling(1.0)
  assert generation({"do_sample": False, "temperature": 0.7}).sampling == Sampling()
  assert generation({"num_beams": 1}).sampling == Sampling()
  with pytest.raises(UserError, match="num_beams"):
    generation({"num_beams": 4})


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_the_harness_the_error_says_what_to_install(model, tokenizer):
  with pytest.raises(UserError, match="pip install lm-eval=="):
    harness_model(model, tokenizer)


def test_in_the_harness(model, tokenizer):
  pytest.importorskip("lm_eval")
  text_model = TextModel(model, tokenizer, batch_size=4)
  lm = harness_model(model, tokenizer, batch_size=4)
  request = lambda *args: types.SimpleNamespace(args=args)
  assert lm.loglikelihood([request(*p) for p in PAIRS]) == text_model.log_likelihoods(PAIRS)
  rolling = lm.loglikelihood_rolling([request("some text")])
  assert rolling == text_model.rolling_log_likelihoods(["some text"])
  options = {"until": ["\n"], "max_gen_toks": 6}
  assert lm.generate_until([request("a", options)]) == (
    text_model.generate_until([("a", generation(options))])
  )
