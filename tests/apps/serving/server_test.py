"""The server, asked by OpenAI's own client."""

import contextlib
import dataclasses
import http.client
import json
import re
import socket
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
import uvicorn
from flax import nnx

from apps.serving.chat import compile_template
from apps.serving.constraints import Constraints
from apps.serving.engine import Engine
from apps.serving.jobs import End, Job
from apps.serving.server import Settings, make_app
from apps.serving.text import TextStream
from common.data.tokenizer import load_tokenizer
from common.decoding import continuous
from common.decoding.constrained import GrammarConstraint
from common.decoding.generation import generate
from common.decoding.grammar.ebnf import parse_ebnf
from common.decoding.grammar.token_mask import TokenMasks, Vocabulary
from common.decoding.prompt_tokens import PromptTokens
from common.decoding.prompt_tree import tree_tables
from common.decoding.pruned_cache import Compression
from common.errors import UserError
from common.quantization.calibration import rtn_block
from common.quantization.quantized_array import IntegerFormat
from projects.think.think import query_driven_scores
from tests.common.models.small_decoders import ARCHITECTURES, random_decoder

CONFIG = dataclasses.replace(ARCHITECTURES["llama"], vocab_size=512)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
SLOTS, MAX_LENGTH, MAX_QUEUE = 4, 96, 6


@pytest.fixture(scope="module")
def tokenizer():
  return load_tokenizer("embedded-512")


@pytest.fixture(scope="module")
def model():
  return random_decoder(CONFIG)


def wait_until(condition):
  end = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < end
    threading.Event().wait(0.01)


@contextlib.contextmanager
def serve(engine, tokenizer, template=TEMPLATE):
  """A running server's (host, port)."""
  settings = Settings(
    name="small",
    tokenizer=tokenizer,
    chat_template=template and compile_template(template, {}),
    constrain=Constraints(tokenizer, CONFIG.vocab_size, [2]),
    hosts=("127.0.0.1",),
    max_body=4096,
  )
  listener = socket.socket()
  listener.bind(("127.0.0.1", 0))
  config = uvicorn.Config(make_app(engine, settings), log_level="warning")
  server = uvicorn.Server(config)
  thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
  thread.start()
  try:
    wait_until(lambda: server.started)
    yield listener.getsockname()
  finally:
    server.should_exit = True
    thread.join()


def make_engine(model, tokenizer, **options):
  return Engine(
    model,
    tokenizer,
    slots=SLOTS,
    max_length=MAX_LENGTH,
    max_queue=MAX_QUEUE,
    stop_tokens=[2],
    **options,
  )


@pytest.fixture(scope="module")
def engine(model, tokenizer):
  return make_engine(model, tokenizer)


@pytest.fixture(scope="module")
def address(engine, tokenizer):
  with serve(engine, tokenizer) as address:
    yield address


@pytest.fixture(scope="module")
def client(address):
  with openai.OpenAI(
    base_url=f"http://127.0.0.1:{address[1]}/v1", api_key="none", max_retries=0
  ) as client:
    yield client


def greedy(model, tokenizer, prompt, count):
  ids = tokenizer.encode(prompt).ids
  (new,) = generate(model, [ids], max_new_tokens=count, stop_tokens=2)
  text = tokenizer.decode([*ids, *new])
  return text[len(tokenizer.decode(ids)) :]


def post(address, body, kind="application/json", path="/v1/completions", host=None):
  """Status and body of a raw request."""
  connection = http.client.HTTPConnection(*address, timeout=30)
  headers = {"Content-Type": kind} | ({"Host": host} if host else {})
  connection.request("POST", path, body, headers)
  reply = connection.getresponse()
  return reply.status, reply.read().decode()


PROMPTS = ["import os", "def f(x):", "The array", "x"]


def test_greedy_text_is_that_of_generate(client, model, tokenizer):
  expected = [greedy(model, tokenizer, prompt, 10) for prompt in PROMPTS]
  reply = client.completions.create(model="small", prompt=PROMPTS, max_tokens=10, temperature=0)
  assert [choice.text for choice in reply.choices] == expected
  assert {choice.finish_reason for choice in reply.choices} <= {"length", "stop"}
  assert reply.usage.prompt_tokens == sum(len(tokenizer.encode(p).ids) for p in PROMPTS)
  tokens = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
  again = client.completions.create(model="small", prompt=tokens, max_tokens=10, temperature=0)
  assert [choice.text for choice in again.choices] == expected


PENALTIES = {"presence_penalty": 1.0, "frequency_penalty": 0.5}


@pytest.fixture(scope="module")
def penalised(model, tokenizer):
  """(prompt, tokens) -> its greedy text with PENALTIES, from whole passes over it."""
  logits_of = jax.jit(lambda ids: model(ids)[0][0])

  def continuation(prompt, count):
    ids = tokenizer.encode(prompt).ids
    stream, counts = TextStream(tokenizer, ids), np.zeros(CONFIG.vocab_size)
    text = ""
    for _ in range(count):
      logits = np.asarray(logits_of(np.pad(ids, (0, 32 - len(ids)))[None])[len(ids) - 1])
      token = int(np.argmax(logits - 1.0 * (counts > 0) - 0.5 * counts))
      if token == 2:
        break
      counts[token] += 1
      ids.append(token)
      text += stream.add(token)
    return text

  return continuation


def test_penalties_are_taken_from_tokens_that_are_there(client, model, tokenizer, penalised):
  ask = {"model": "small", "prompt": PROMPTS, "max_tokens": 10, "temperature": 0}
  reply = client.completions.create(**ask, **PENALTIES)
  expected = [penalised(prompt, 10) for prompt in PROMPTS]
  assert [choice.text for choice in reply.choices] == expected
  assert expected != [greedy(model, tokenizer, prompt, 10) for prompt in PROMPTS]


def test_a_text_may_begin_with_its_prompt(client, model, tokenizer):
  ask = {"model": "small", "max_tokens": 6, "temperature": 0, "echo": True}
  expected = [p + greedy(model, tokenizer, p, 6) for p in PROMPTS[:2] for _ in range(2)]
  reply = client.completions.create(prompt=PROMPTS[:2], n=2, **ask)
  assert [choice.text for choice in reply.choices] == expected
  tokens = tokenizer.encode(PROMPTS[0]).ids
  stream = client.completions.create(prompt=tokens, stream=True, **ask)
  assert "".join(chunk.choices[0].text for chunk in stream) == expected[0]


def test_streams_give_the_same_text(client, model, tokenizer):
  stream = client.completions.create(
    model="small",
    prompt=PROMPTS[:2],
    max_tokens=10,
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
  )
  texts, reasons, usage = ["", ""], [None, None], None
  for chunk in stream:
    for choice in chunk.choices:
      texts[choice.index] += choice.text
      reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    usage = chunk.usage or usage
  assert texts == [greedy(model, tokenizer, prompt, 10) for prompt in PROMPTS[:2]]
  assert None not in reasons and usage.completion_tokens <= 20


def test_chats_go_through_the_template(client, model, tokenizer):
  messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
  ids = tokenizer.encode("user: hello\nassistant:", add_special_tokens=False).ids
  (new,) = generate(model, [ids], max_new_tokens=8, stop_tokens=2)
  expected = tokenizer.decode([*ids, *new])[len(tokenizer.decode(ids)) :]
  common = {"model": "small", "messages": messages, "temperature": 0, "max_completion_tokens": 8}
  reply = client.chat.completions.create(**common)
  assert reply.choices[0].message.content == expected
  chunks = list(client.chat.completions.create(**common, stream=True))
  assert chunks[0].choices[0].delta.role == "assistant"
  assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_samples_are_reproducible_and_those_of_one_request_differ(client):
  ask = lambda **options: [
    choice.text
    for choice in client.completions.create(
      model="small", prompt="def f(x):", max_tokens=12, seed=5, **options
    ).choices
  ]
  three = ask(n=3)
  assert len(set(three)) == 3
  assert ask(n=3) == three and ask() == three[:1]
  # One token is left to sample from.
  assert len(set(ask(n=3, extra_body={"top_k": 1}))) == 1


def test_log_probabilities_are_the_model_s(client, model, tokenizer):
  reply = client.completions.create(
    model="small", prompt="import os", max_tokens=3, temperature=0, logprobs=2
  )
  scores = reply.choices[0].logprobs
  assert len(scores.tokens) == len(scores.token_logprobs) == 3
  for log_prob, top in zip(scores.token_logprobs, scores.top_logprobs):
    assert log_prob == max(top.values()) and len(top) <= 2
  ids = tokenizer.encode("import os").ids
  logits = model(np.array([ids]))[0][0, -1]
  # Two programs round differently.
  assert abs(float(jax.nn.log_softmax(logits).max()) - scores.token_logprobs[0]) < 1e-4
  chat = client.chat.completions.create(
    model="small",
    messages=[{"role": "user", "content": "a"}],
    max_tokens=2,
    temperature=0,
    logprobs=True,
    top_logprobs=3,
  )
  first = chat.choices[0].logprobs.content[0]
  assert first.logprob == first.top_logprobs[0].logprob and len(first.top_logprobs) == 3


def test_texts_end_before_a_stop_string(client, model, tokenizer):
  text = greedy(model, tokenizer, "import os", 10)
  stop = text[4:7]
  expected = text[: text.index(stop)]
  options = {"model": "small", "prompt": "import os", "max_tokens": 10, "temperature": 0}
  reply = client.completions.create(**options, stop=["never there", stop])
  assert (reply.choices[0].text, reply.choices[0].finish_reason) == (expected, "stop")
  stream = client.completions.create(**options, stop=stop, stream=True)
  assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_a_bias_forbids_a_token(client, tokenizer):
  options = {"model": "small", "prompt": "import os", "max_tokens": 1, "temperature": 0}
  reply = client.completions.create(**options, logprobs=1)
  vocab = tokenizer.get_vocab_size()
  first = reply.choices[0].logprobs.tokens[0]
  same = [i for i in range(vocab) if tokenizer.decode([i], skip_special_tokens=False) == first]
  other = client.completions.create(**options, logprobs=1, logit_bias={i: -100 for i in same})
  assert other.choices[0].logprobs.tokens[0] != first


def test_texts_follow_a_grammar(client):
  grammar = 'root ::= [0-9]{2} ("," [0-9]{2}){1,3} "é"'
  options = {"model": "small", "prompt": ["numbers: ", "x"], "max_tokens": 24, "seed": 3}
  reply = client.completions.create(**options, extra_body={"grammar": grammar})
  for choice in reply.choices:
    assert re.fullmatch(r"\d\d(,\d\d){1,3}é", choice.text), choice.text
    assert choice.finish_reason == "stop"
  # Beside a text without one, and in a stream.
  stream = client.completions.create(**options, extra_body={"grammar": grammar}, stream=True)
  plain = client.completions.create(**options)
  texts = ["", ""]
  for chunk in stream:
    for choice in chunk.choices:
      texts[choice.index] += choice.text
  assert texts == [choice.text for choice in reply.choices]
  assert not re.fullmatch(r"\d\d(,\d\d){1,3}é", plain.choices[0].text)


def test_chats_answer_in_json(client):
  schema = {
    "type": "object",
    "properties": {"id": {"enum": ["a", "b"]}, "good": {"type": "boolean"}},
    "required": ["id", "good"],
  }
  reply = client.chat.completions.create(
    model="small",
    messages=[{"role": "user", "content": "hello"}],
    max_tokens=60,
    seed=0,
    response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
  )
  found = json.loads(reply.choices[0].message.content)
  assert found["id"] in ("a", "b") and isinstance(found["good"], bool)


@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_aligned_samples_come_closer_to_the_model(client, model, tokenizer, temperature):
  """A grammar whose masks distort: behind the first token, nearly all of the mass may be lost."""
  vocabulary = [tokenizer.decode([i]) for i in range(512)]
  first, second = vocabulary.index("a"), vocabulary.index("b")
  prompt = tokenizer.encode("x").ids
  # Two texts, "a" and "bc": P of the second is small, and masks alone give it as much as P("b").
  log_p = lambda ids, token: float(
    jax.nn.log_softmax(model(np.array([ids]))[0][0, -1] / temperature)[token]
  )
  third = vocabulary.index("c")
  a = log_p(prompt, first) + log_p([*prompt, first], 2)
  b = log_p(prompt, second) + log_p([*prompt, second], third)
  b += log_p([*prompt, second, third], 2)
  expected = 1 / (1 + np.exp(b - a))
  masked = 1 / (1 + np.exp(log_p(prompt, second) - log_p(prompt, first)))
  options = {"model": "small", "prompt": "x", "max_tokens": 4, "temperature": temperature}
  grammar = 'root ::= "a" | "bc"'
  texts = []
  for seed in range(40):
    body = {"grammar": grammar, "grammar_aligned": True}
    reply = client.completions.create(**options, seed=seed * 100, n=4, extra_body=body)
    texts += [choice.text for choice in reply.choices]
  assert set(texts) <= {"a", "bc"}
  share = np.mean([text == "a" for text in texts[8:]])
  spread = np.sqrt(expected * (1 - expected) / len(texts[8:]))
  assert abs(share - expected) < 4 * spread + 0.01
  # The test would see the difference.
  assert abs(masked - expected) > 8 * spread + 0.02, (masked, expected)


@pytest.mark.parametrize(
  "change, says",
  [
    ({"prompt": "x" * 300}, "both together 96"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, 512]}, "0 to 511"),
    ({"temperature": -1}, "temperature"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"echo": True, "logprobs": 1}, "echo with logprobs"),
    ({"best_off": 1}, "best_off: unknown parameter"),
    ({"stop": list("abcde")}, "stop"),
    ({"logit_bias": {"512": 1}}, "logit_bias"),
    ({"grammar": 'root ::= "a" b'}, "b"),
    ({"grammar": 'root ::= "a" root'}, "no text"),
    ({"grammar": "a", "response_format": {"type": "json_object"}}, "send one"),
    ({"grammar": 'root ::= "a"', "grammar_aligned": True, "top_k": 3}, "no top_k"),
    (
      {"grammar": 'root ::= "a"', "grammar_aligned": True, "temperature": 0},
      "positive temperature",
    ),
    (
      {
        "response_format": {
          "type": "json_schema",
          "json_schema": {"name": "x", "schema": {"type": "thing"}},
        }
      },
      "thing",
    ),
    ({"grammar_aligned": True}, "needs a grammar"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"n": 7}, "waiting"),
    ({"model": "large"}, "this server has 'small'"),
  ],
)
def test_bad_requests_are_told_what_is_wrong(client, address, change, says):
  body = {"model": "small", "prompt": "a", "max_tokens": 2} | change
  status, text = post(address, json.dumps(body))
  assert status == {"n": 429, "model": 404}.get(next(iter(change)), 400)
  assert says in json.loads(text)["error"]["message"]
  # The server lives on.
  assert client.completions.create(model="small", prompt="a", max_tokens=1).choices


def test_bad_http_is_refused(address):
  assert post(address, "{not json")[0] == 400
  assert post(address, "x" * 5000)[0] == 413
  assert post(address, "{}", kind="text/plain")[0] == 415
  assert post(address, "{}", path="/v1/nothing")[0] == 404
  assert post(address, "{}", path="/health")[0] == 405
  assert post(address, "{}", host="evil.example")[0] == 400


def test_clients_that_leave_free_their_slots(client, address, engine):
  """Of a stream and of a plain request, while they run and while they wait."""
  before = engine.counts.cancelled
  sockets = []
  for stream in [True, False] * 4:
    body = {
      "model": "small",
      "prompt": "a",
      "max_tokens": 90,
      "stream": stream,
      "logit_bias": {2: -100},
    }
    connection = http.client.HTTPConnection(*address, timeout=30)
    connection.request(
      "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    sockets.append(connection)
  wait_until(lambda: engine.active == SLOTS)
  for connection in sockets:
    connection.close()
  wait_until(lambda: not engine.active and not engine.queued)
  assert engine.counts.cancelled > before
  assert client.completions.create(model="small", prompt="a", max_tokens=1).choices


def test_health_models_and_metrics(client, address):
  assert [m.id for m in client.models.list()] == ["small"]
  assert client.models.retrieve("small").id == "small"
  with pytest.raises(openai.NotFoundError):
    client.models.retrieve("large")
  connection = http.client.HTTPConnection(*address, timeout=30)
  connection.request("GET", "/health")
  reply = connection.getresponse()
  assert reply.status == 200 and not reply.read()
  connection.request("GET", "/metrics")
  text = connection.getresponse().read().decode()
  assert 'flaxworks_requests_total{path="/v1/completions",status="200"}' in text
  assert "flaxworks_new_tokens_total" in text and "flaxworks_first_token_seconds_bucket" in text


def run_jobs(engine, ids, count, constraints):
  """Greedy texts behind one prompt, decoded together, one for each constraint or None."""
  events = [[] for _ in constraints]
  engine.submit(
    *(Job(ids, count, e.append, constraint=c) for e, c in zip(events, constraints, strict=True))
  )
  wait_until(lambda: all(e and isinstance(e[-1], End) for e in events))
  return ["".join(event.text for event in e) for e in events]


def test_with_a_draft_model_the_text_is_the_same(model, tokenizer, penalised):
  draft = random_decoder(dataclasses.replace(CONFIG, num_layers=1), seed=1)
  engine = make_engine(model, tokenizer, draft=draft, num_drafts=3)
  with serve(engine, tokenizer, None) as (_, port):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    with client:
      reply = client.completions.create(model="small", prompt=PROMPTS, max_tokens=10, temperature=0)
      expected = [greedy(model, tokenizer, prompt, 10) for prompt in PROMPTS]
      assert [choice.text for choice in reply.choices] == expected
      assert engine.counts.drafted > 0
      reply = client.completions.create(
        model="small", prompt=PROMPTS, max_tokens=10, temperature=0, **PENALTIES
      )
      assert [c.text for c in reply.choices] == [penalised(prompt, 10) for prompt in PROMPTS]
      # Beside a text that takes none, the other one goes on taking drafts.
      digits = TokenMasks(parse_ebnf("root ::= [0-9]{20}"), Vocabulary.of(tokenizer, 512))
      drafted, ids = engine.counts.drafted, tokenizer.encode(PROMPTS[0]).ids
      texts = run_jobs(engine, ids, 30, [GrammarConstraint(digits), None])
      assert re.fullmatch("[0-9]{20}", texts[0])
      assert texts[1] == greedy(model, tokenizer, PROMPTS[0], 30)
      assert engine.counts.drafted > drafted
      with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="small", messages=[{"role": "user", "content": "a"}])


def test_with_prompt_tokens_the_text_is_the_same(model, tokenizer, penalised):
  rng = np.random.default_rng(0)
  embeddings = jnp.asarray(rng.normal(size=(2, 1, CONFIG.hidden_size)), jnp.float32)
  prompt_tokens = PromptTokens(embeddings, jnp.zeros((2, 1)), jnp.zeros((2, CONFIG.hidden_size)))
  trees = tree_tables([{(): 2}] + [{(): 2} | {(r,): 2 for r in range(4)}] * 2)
  options = {"prompt_tokens": prompt_tokens, "trees": trees}
  engine = make_engine(model, tokenizer, **options)
  with serve(engine, tokenizer) as (_, port):
    url = f"http://127.0.0.1:{port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
      ask = {"model": "small", "prompt": PROMPTS, "max_tokens": 10, "temperature": 0, "logprobs": 1}
      reply = client.completions.create(**ask)
      for prompt, choice in zip(PROMPTS, reply.choices):
        assert choice.text == greedy(model, tokenizer, prompt, 10)
        assert choice.logprobs.token_logprobs == [
          max(t.values()) for t in choice.logprobs.top_logprobs
        ]
      formatted = client.completions.create(
        model="small", prompt="a", max_tokens=9, extra_body={"grammar": "root ::= [0-9]{3,5}"}
      )
      assert re.fullmatch("[0-9]{3,5}", formatted.choices[0].text)
      less = client.completions.create(
        model="small", prompt=PROMPTS, max_tokens=10, temperature=0, **PENALTIES
      )
      assert [c.text for c in less.choices] == [penalised(prompt, 10) for prompt in PROMPTS]
  assert engine.counts.drafted > 0
  with pytest.raises(UserError, match="alone"):
    make_engine(model, tokenizer, draft=model, **options)


def test_everything_together(model, tokenizer):
  """Quantized weights, packed prompts, a pruned cache, drafts and a grammar: the text is that of the
  quantized model over its pruned cache, whatever drafts it."""
  quantized = nnx.clone(model)
  quantized.blocks = nnx.List([rtn_block(b, IntegerFormat(4, group_size=16)) for b in model.blocks])
  compression = Compression(query_driven_scores, ratio=0.5, recent=4, window=4)
  options = {"compression": compression, "max_new_tokens": 32}
  texts = []
  for draft in (None, model):
    engine = make_engine(quantized, tokenizer, draft=draft, num_drafts=2, **options)
    with serve(engine, tokenizer) as (_, port):
      url = f"http://127.0.0.1:{port}/v1"
      with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        ask = {"model": "small", "max_tokens": 12, "temperature": 0}
        plain = client.completions.create(prompt=[p * 5 for p in PROMPTS], **ask)
        formatted = client.completions.create(
          prompt=PROMPTS[0], **ask, extra_body={"grammar": "root ::= [0-9]{3,5}"}
        )
        assert re.fullmatch("[0-9]{3,5}", formatted.choices[0].text)
        with pytest.raises(openai.BadRequestError, match="a text 32"):
          client.completions.create(model="small", prompt="a", max_tokens=33)
        texts.append([choice.text for choice in (*plain.choices, *formatted.choices)])
    if draft is not None:
      assert engine.counts.accepted > 0
  assert texts[0] == texts[1]


def test_a_server_that_shuts_down_tells_its_clients(model, tokenizer):
  engine = make_engine(model, tokenizer)
  with serve(engine, tokenizer) as (host, port):
    engine.close()
    status, text = post((host, port), json.dumps({"model": "small", "prompt": "a"}))
    assert status == 503 and "shutting down" in text
    assert not engine.healthy


def test_an_engine_that_fails_says_so(model, tokenizer, monkeypatch):
  engine = make_engine(model, tokenizer)

  def fail():
    raise RuntimeError("out of memory")

  monkeypatch.setattr(engine, "_step", fail)
  with serve(engine, tokenizer) as address:
    status, text = post(address, json.dumps({"model": "small", "prompt": "a"}))
    assert status == 500 and "RuntimeError" in text
    assert post(address, json.dumps({"model": "small", "prompt": "a"}))[0] == 503


def test_after_the_warm_up_nothing_compiles(model, tokenizer):
  engine = make_engine(model, tokenizer, prefill_tokens=100)
  progress = list(engine.warm_up())
  assert progress[-1] == (len(progress), len(progress))
  compiled = continuous.admit._cache_size(), continuous.decode._cache_size()
  with serve(engine, tokenizer) as (_, port):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    with client:
      # Rows of 32 and of 96 tokens, one and several, and prompts of one token.
      for lengths in ([1], [1, 5, 20, 30], [40, 60, 2], [90, 90, 90, 90], [31, 32, 33]):
        prompts = [[7] * n for n in lengths]
        reply = client.completions.create(model="small", prompt=prompts, max_tokens=5)
        assert len(reply.choices) == len(lengths)
  assert (continuous.admit._cache_size(), continuous.decode._cache_size()) == compiled


def test_a_text_that_fails_leaves_the_others_alone(model, tokenizer, monkeypatch):
  engine = make_engine(model, tokenizer)
  add = TextStream.add

  def fail_once(stream, token):
    if stream.stop == ["fail"]:
      raise RuntimeError("invalid prefix")
    return add(stream, token)

  monkeypatch.setattr(TextStream, "add", fail_once)
  with serve(engine, tokenizer) as address:
    body = {"model": "small", "prompt": "a", "temperature": 0, "max_tokens": 4}
    status, text = post(address, json.dumps(body | {"stop": "fail"}))
    assert status == 500 and "could not be decoded" in text
    assert post(address, json.dumps(body))[0] == 200


def test_engines_that_cannot_work(model, tokenizer):
  other = random_decoder(dataclasses.replace(CONFIG, vocab_size=256))
  with pytest.raises(UserError, match="one vocabulary"):
    make_engine(model, tokenizer, draft=other)
  with pytest.raises(UserError, match=r"stop tokens \[2, 512\]: the model has tokens 0 to 511"):
    Engine(model, tokenizer, slots=1, max_length=8, max_queue=1, stop_tokens=[2, 512])
  opt = random_decoder(ARCHITECTURES["opt"])
  with pytest.raises(UserError, match="lower max_length"):
    Engine(opt, tokenizer, slots=1, max_length=10**6, max_queue=1, stop_tokens=[])


def test_templates_are_sandboxed():
  for source in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"):
    with pytest.raises(UserError, match="refuses"):
      print(compile_template(source, {})([]))
  with pytest.raises(UserError, match="cannot be read"):
    compile_template("{% for %}", {})
  with pytest.raises(UserError, match="no system"):
    compile_template("{{ raise_exception('no system') }}", {})([])
