"""The HTTP side of the server: requests to jobs, jobs' pieces to replies and streams of events."""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

import prometheus_client
import pydantic
import tokenizers
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from apps.serving.chat import ChatTemplate
from apps.serving.engine import Engine
from apps.serving.jobs import Busy, End, Job, Piece, Score
from apps.serving.protocol import (
  ChatRequest,
  CompletionRequest,
  Writer,
  explain,
)
from common.decoding.constrained import Constraint
from common.decoding.generation import Sampling
from common.errors import UserError

# (request, prompt's tokens, new tokens at most) -> what its text must be like; raises UserError.
MakeConstraint = Callable[[CompletionRequest | ChatRequest, Sequence[int], int], Constraint]


class Settings(NamedTuple):
  """What the replies depend on besides the engine.

  Attributes:
    name: of the model.
    tokenizer: the model's.
    chat_template: None if the model has none.
    constrain: makes the constraints of requests that have a format or a grammar.
    hosts: names under which the server may be addressed; none for any. On a loopback address this
      keeps web pages from reaching it by a name of their own (DNS rebinding).
    max_body: bytes of a request.
  """

  name: str
  tokenizer: tokenizers.Tokenizer
  chat_template: ChatTemplate | None
  constrain: MakeConstraint
  hosts: Sequence[str] = ()
  max_body: int = 1 << 20


class _Refused(Exception):
  """A reply that says what is wrong."""

  def __init__(self, status: int, message: str, code: str | None = None):
    super().__init__(message)
    self.status, self.message, self.code = status, message, code

  @property
  def response(self) -> JSONResponse:
    kind = "invalid_request_error" if self.status < 500 else "server_error"
    error = {"message": self.message, "type": kind, "param": None, "code": self.code}
    headers = {"Retry-After": "1"} if self.status in (429, 503) else None
    return JSONResponse({"error": error}, self.status, headers)


class _Metrics:
  """Prometheus metrics; what the engine counts is read when it is asked for."""

  def __init__(self, engine: Engine):
    self.registry = prometheus_client.CollectorRegistry()
    self._engine = engine
    self.registry.register(self)
    self.requests = prometheus_client.Counter(
      "flaxworks_requests",
      "Requests, by path and status.",
      ("path", "status"),
      registry=self.registry,
    )
    seconds = lambda name, text: prometheus_client.Histogram(
      name, text, registry=self.registry, buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
    )
    self.first_token = seconds(
      "flaxworks_first_token_seconds", "From a request to its first token."
    )
    self.duration = seconds("flaxworks_request_seconds", "From a request to its end.")

  def collect(self):
    engine, counts = self._engine, self._engine.counts
    gauge = lambda name, text, value: GaugeMetricFamily(f"flaxworks_{name}", text, value=value)
    counter = lambda name, text, value: CounterMetricFamily(f"flaxworks_{name}", text, value=value)
    yield gauge("queued", "Texts that wait for a slot.", engine.queued)
    yield gauge("active_slots", "Slots that are taken.", engine.active)
    yield gauge("slots", "Slots.", engine.slots)
    yield gauge("cache_bytes", "Size of the caches.", engine.cache_bytes)
    yield counter("prompt_tokens", "Prompt tokens read.", counts.prompt_tokens)
    yield counter("prefill_slots", "Slots computed for them, padding too.", counts.prefill_slots)
    yield counter("new_tokens", "Tokens generated.", counts.new_tokens)
    yield counter("steps", "Steps of the batch.", counts.steps)
    yield counter("occupied_slots", "Slots taken, summed over the steps.", counts.occupied_slots)
    yield counter("row_passes", "Passes of the model, summed over slots.", counts.row_passes)
    yield counter("drafted", "Tokens drafted.", counts.drafted)
    yield counter("accepted", "Drafts accepted.", counts.accepted)
    ended = CounterMetricFamily(
      "flaxworks_texts", "Texts that ended, by reason.", labels=["reason"]
    )
    for reason in ("stop", "length", "cancelled", "error"):
      ended.add_metric([reason], getattr(counts, reason))
    yield ended


def make_app(engine: Engine, settings: Settings) -> Starlette:
  """The application. The engine is started and closed with it."""
  metrics = _Metrics(engine)

  @contextlib.asynccontextmanager
  async def lifespan(app):
    engine.start()
    yield
    await run_in_threadpool(engine.close)

  def reply_to(model_of_request, kind: str):
    async def endpoint(request: Request) -> Response:
      start = time.perf_counter()
      try:
        response = await _generate(
          request, model_of_request, kind, engine, settings, metrics, start
        )
      except _Refused as refused:
        response = refused.response
      except ClientDisconnect:
        response = Response(status_code=499)
      metrics.requests.labels(request.url.path, response.status_code).inc()
      return response

    return endpoint

  async def models(request: Request) -> Response:
    model = {"id": settings.name, "object": "model", "created": 0, "owned_by": "flaxworks"}
    if name := request.path_params.get("name"):
      if name != settings.name:
        return _no_model(name, settings).response
      return JSONResponse(model)
    return JSONResponse({"object": "list", "data": [model]})

  async def health(request: Request) -> Response:
    return Response(status_code=200 if engine.healthy else 503)

  async def measured(request: Request) -> Response:
    return Response(
      prometheus_client.generate_latest(metrics.registry),
      media_type=prometheus_client.CONTENT_TYPE_LATEST,
    )

  async def refused(request: Request, error: HTTPException) -> Response:
    return _Refused(
      error.status_code, f"{request.method} {request.url.path}: {error.detail}"
    ).response

  hosts = [Middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts))]
  return Starlette(
    routes=[
      Route("/v1/completions", reply_to(CompletionRequest, "completion"), methods=["POST"]),
      Route("/v1/chat/completions", reply_to(ChatRequest, "chat"), methods=["POST"]),
      Route("/v1/models", models),
      Route("/v1/models/{name:path}", models),
      Route("/health", health),
      Route("/metrics", measured),
    ],
    middleware=hosts if settings.hosts else [],
    exception_handlers={HTTPException: refused},
    lifespan=lifespan,
  )


async def _generate(
  request: Request,
  model_of_request: type,
  kind: str,
  engine: Engine,
  settings: Settings,
  metrics: _Metrics,
  start: float,
) -> Response:
  """Checks a request, queues its jobs, and replies with all of their text or with a stream."""
  wanted = await _parse(request, model_of_request, settings)
  events: asyncio.Queue[tuple[int, Piece | End]] = asyncio.Queue()
  loop = asyncio.get_running_loop()
  try:
    # Tokenizers and grammars may take a while: the other clients' streams go on.
    prompts = await run_in_threadpool(_prompts, wanted, settings)
    echoes = _echoes(wanted, prompts, settings)
    jobs = await run_in_threadpool(_jobs, wanted, prompts, engine, settings, loop, events)
    engine.submit(*jobs)
  except UserError as error:
    raise _Refused(400, str(error)) from None
  except Busy as error:
    raise _Refused(429 if engine.healthy else 503, str(error)) from None
  texts = _Texts(engine, jobs, events, metrics, start)
  writer = Writer(kind, settings.name, settings.tokenizer, _scored(wanted))
  prompt_tokens = sum(len(prompt) for prompt in prompts)
  if wanted.stream:
    with_usage = bool(wanted.stream_options and wanted.stream_options.include_usage)
    return _EventStream(texts, _stream(texts, writer, echoes, prompt_tokens, with_usage))
  gathering = asyncio.create_task(_gather(texts, writer, echoes, prompt_tokens))
  leaving = asyncio.create_task(_disconnected(request))
  try:
    await asyncio.wait((gathering, leaving), return_when=asyncio.FIRST_COMPLETED)
    if not gathering.done():
      raise ClientDisconnect
    return JSONResponse(gathering.result())
  finally:
    texts.release()
    for task in (gathering, leaving):
      task.cancel()
    await asyncio.gather(gathering, leaving, return_exceptions=True)


class _Texts:
  """The texts of one request while they come: (index of the text, its next event)."""

  def __init__(self, engine: Engine, jobs: list[Job], events, metrics: _Metrics, start: float):
    self.count = len(jobs)
    self._engine, self._events, self._metrics, self._start = engine, events, metrics, start
    self._running = dict(enumerate(jobs))
    self._begun = False

  def __aiter__(self):
    return self

  async def __anext__(self) -> tuple[int, Piece | End]:
    if not self._running:
      self._metrics.duration.observe(time.perf_counter() - self._start)
      raise StopAsyncIteration
    index, event = await self._events.get()
    if isinstance(event, End):
      del self._running[index]
    elif not self._begun:
      self._begun = True
      self._metrics.first_token.observe(time.perf_counter() - self._start)
    return index, event

  def release(self) -> None:
    """Frees the slots of the texts that have not ended."""
    if self._running:
      self._engine.cancel(*self._running.values())


class _EventStream(StreamingResponse):
  """A stream that frees its slots however it ends, even before it began."""

  def __init__(self, texts: _Texts, content: AsyncIterator[str]):
    super().__init__(content, media_type="text/event-stream")
    self._texts = texts

  async def __call__(self, scope, receive, send) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:
      self._texts.release()


async def _parse(request: Request, model_of_request: type, settings: Settings) -> Any:
  """The checked request.

  Raises:
    _Refused: it is too large, no JSON, not what it must be, or for another model.
  """
  kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
  if kind != "application/json":
    # Browsers send other types to any address without asking.
    raise _Refused(415, f"Content-Type is {kind or 'missing'}: expected application/json")
  body = bytearray()
  async for part in request.stream():
    body += part
    if len(body) > settings.max_body:
      raise _Refused(413, f"the request has more than {settings.max_body} bytes")
  try:
    wanted = model_of_request.model_validate_json(bytes(body))
  except pydantic.ValidationError as error:
    raise _Refused(400, explain(error)) from None
  if wanted.model != settings.name:
    raise _no_model(wanted.model, settings)
  return wanted


def _no_model(name: str, settings: Settings) -> _Refused:
  message = f"there is no model {name!r}: this server has {settings.name!r}"
  return _Refused(404, message, "model_not_found")


def _prompts(wanted: CompletionRequest | ChatRequest, settings: Settings) -> list[list[int]]:
  """Token ids of every prompt. Raises UserError."""
  encode = lambda text, special: settings.tokenizer.encode(text, add_special_tokens=special).ids
  if isinstance(wanted, CompletionRequest):
    return [encode(p, True) if isinstance(p, str) else list(p) for p in wanted.prompts]
  if settings.chat_template is None:
    raise UserError(
      "the model has no chat template: use /v1/completions, or start the server with "
      "--chat_template=FILE"
    )
  # Templates write special tokens themselves.
  return [encode(settings.chat_template(wanted.messages), False)]


def _echoes(
  wanted: CompletionRequest | ChatRequest, prompts: list[list[int]], settings: Settings
) -> list[str]:
  """What each text begins with: its prompt, if that was asked for."""
  if not getattr(wanted, "echo", None):
    return [""] * (len(prompts) * wanted.n)
  given = wanted.prompts
  decode = settings.tokenizer.decode
  texts = [p if isinstance(p, str) else decode(ids) for p, ids in zip(given, prompts)]
  return [text for text in texts for _ in range(wanted.n)]


def _jobs(
  wanted: CompletionRequest | ChatRequest,
  prompts: list[list[int]],
  engine: Engine,
  settings: Settings,
  loop: asyncio.AbstractEventLoop,
  events: asyncio.Queue,
) -> list[Job]:
  """n jobs for every prompt. Raises UserError."""
  if wanted.logit_bias and not all(0 <= t < engine.vocab_size for t in wanted.logit_bias):
    raise UserError(f"logit_bias: tokens must be 0 to {engine.vocab_size - 1}")
  formatted = wanted.response_format is not None and wanted.response_format.type != "text"
  seed = random.getrandbits(32) if wanted.seed is None else wanted.seed
  jobs = []
  for prompt in prompts:
    if isinstance(wanted, ChatRequest):
      room = engine.room(len(prompt))
      limit = wanted.max_completion_tokens or wanted.max_tokens or max(room, 1)
    else:
      limit = wanted.max_tokens
    for choice in range(wanted.n):
      index = len(jobs)

      def emit(event, index=index):
        # Nobody listens once the server's loop has ended.
        with contextlib.suppress(RuntimeError):
          loop.call_soon_threadsafe(events.put_nowait, (index, event))

      constrained = formatted or wanted.grammar is not None
      constraint = settings.constrain(wanted, prompt, limit) if constrained else None
      jobs.append(
        Job(
          prompt=prompt,
          max_new_tokens=limit,
          sampling=Sampling(wanted.temperature, wanted.top_k, wanted.top_p),
          # Choices of one prompt differ; the first is that of a request for one.
          seed=(seed + choice) % 2**32,
          stop=wanted.stop_strings,
          bias=wanted.logit_bias or {},
          presence_penalty=wanted.presence_penalty or 0.0,
          frequency_penalty=wanted.frequency_penalty or 0.0,
          constraint=constraint,
          finish=getattr(constraint, "finish", None),
          top=wanted.top,
          emit=emit,
        )
      )
  return jobs


def _scored(wanted: CompletionRequest | ChatRequest) -> bool:
  return wanted.logprobs is not None and wanted.logprobs is not False


def _usage(prompt_tokens: int, new_tokens: int) -> dict:
  return {
    "prompt_tokens": prompt_tokens,
    "completion_tokens": new_tokens,
    "total_tokens": prompt_tokens + new_tokens,
  }


async def _stream(
  texts: _Texts, writer: Writer, echoes: list[str], prompt_tokens: int, with_usage: bool
) -> AsyncIterator[str]:
  """Server-sent events."""
  new_tokens, begun, waiting = 0, set(), {}
  async for index, event in texts:
    scores: list[Score] = waiting.pop(index, [])
    reason = None
    if isinstance(event, End):
      if event.reason in ("error", "cancelled"):
        yield _event(_failure(event))
        return
      reason = event.reason
    else:
      new_tokens += 1
      scores = [*scores, event.score]
      if not event.text:  # Its text comes with a later token.
        waiting[index] = scores
        continue
    first = index not in begun
    text = echoes[index] + event.text if first else event.text
    yield _event(writer.chunk(index, text, scores, reason, first))
    begun.add(index)
  if with_usage:
    yield _event(writer.usage_chunk(_usage(prompt_tokens, new_tokens)))
  yield "data: [DONE]\n\n"


def _event(body: dict) -> str:
  return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _failure(event: End) -> dict:
  message = event.message or "the server is shutting down"
  return {"error": {"message": message, "type": "server_error", "param": None, "code": None}}


async def _gather(texts: _Texts, writer: Writer, echoes: list[str], prompt_tokens: int) -> dict:
  """The whole reply. Raises _Refused where a text failed."""
  scores, reasons = ([[] for _ in range(texts.count)] for _ in range(2))
  parts = [[echo] for echo in echoes]
  async for index, event in texts:
    parts[index].append(event.text)
    if isinstance(event, Piece):
      scores[index].append(event.score)
    elif event.reason == "error":
      raise _Refused(500, event.message)
    elif event.reason == "cancelled":
      raise _Refused(503, "the server is shutting down")
    else:
      reasons[index] = event.reason
  usage = _usage(prompt_tokens, sum(map(len, scores)))
  return writer.whole(list(zip(map("".join, parts), scores, reasons)), usage)


async def _disconnected(request: Request) -> None:
  """Returns when the client has gone."""
  while not await request.is_disconnected():
    await asyncio.sleep(0.1)
