"""What clients may send, after OpenAI's HTTP interface, and what they get back.

Parameters of that interface that would change the result and that we do not have are refused, not
ignored. Ours beyond it: `top_k`, `grammar` and `grammar_aligned`.
"""

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic
import tokenizers
from pydantic import Field

from apps.serving.jobs import TOP, Score


class _Strict(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra="forbid")


class TextFormat(_Strict):
  type: Literal["text"]


class JsonFormat(_Strict):
  type: Literal["json_object"]


class JsonSchema(_Strict):
  name: str = ""
  description: str = ""
  strict: bool | None = None
  # `schema` is a method of pydantic's models.
  schema_: dict[str, Any] = Field(alias="schema")


class JsonSchemaFormat(_Strict):
  type: Literal["json_schema"]
  json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonFormat | JsonSchemaFormat, Field(discriminator="type")]


class StreamOptions(_Strict):
  include_usage: bool = False


class _Request(_Strict):
  """What completions and chats share.

  Attributes:
    top_k: sample among the k most likely tokens; 0 for all.
    grammar: EBNF that the text must follow; see `common/decoding/grammar`.
    grammar_aligned: sample from the model's own distribution over the grammar's texts (ASAp), which
      equal requests come closer to one after another, rather than mask each token.
  """

  model: str
  temperature: float = Field(1.0, ge=0, le=2)
  top_p: float = Field(1.0, gt=0, le=1)
  top_k: int = Field(0, ge=0)
  n: int = Field(1, ge=1, le=128)
  stream: bool = False
  stream_options: StreamOptions | None = None
  stop: str | Annotated[list[str], Field(max_length=4)] | None = None
  seed: int | None = Field(None, ge=-(2**63), lt=2**63)
  logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
  presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
  frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
  response_format: ResponseFormat | None = None
  grammar: str | None = None
  grammar_aligned: bool = False
  user: str | None = None

  @pydantic.model_validator(mode="after")
  def _consistent(self):
    formatted = self.response_format is not None and self.response_format.type != "text"
    if formatted and self.grammar is not None:
      raise ValueError("response_format and grammar both say what the text must be like: send one")
    if self.grammar_aligned and not (formatted or self.grammar is not None):
      raise ValueError("grammar_aligned needs a grammar or a response_format")
    if self.stream_options is not None and not self.stream:
      raise ValueError("stream_options needs stream=true")
    return self

  @property
  def stop_strings(self) -> list[str]:
    return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(_Request):
  """POST /v1/completions."""

  prompt: str | list[int] | list[str] | list[list[int]] = Field(min_length=1)
  max_tokens: int = Field(16, ge=1)
  logprobs: int | None = Field(None, ge=0, le=5)
  echo: bool | None = None
  suffix: None = None
  best_of: Literal[1] | None = None

  @pydantic.model_validator(mode="after")
  def _echo(self):
    if self.echo and self.logprobs is not None:
      raise ValueError("echo with logprobs needs those of the prompt, which are not computed here")
    return self

  @property
  def prompts(self) -> list[str] | list[list[int]]:
    """One or more."""
    if isinstance(self.prompt, str):
      return [self.prompt]
    return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt

  @property
  def top(self) -> int:
    return self.logprobs or 0


class TextPart(_Strict):
  type: Literal["text"]
  text: str


class Message(_Strict):
  role: Literal["system", "developer", "user", "assistant"]
  content: str | list[TextPart]
  name: str | None = None

  @property
  def text(self) -> str:
    """All of its parts."""
    return self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)


class ChatRequest(_Request):
  """POST /v1/chat/completions. Without a limit the text may take all the room that is left."""

  messages: list[Message] = Field(min_length=1)
  max_tokens: int | None = Field(None, ge=1)
  max_completion_tokens: int | None = Field(None, ge=1)
  logprobs: bool | None = None
  top_logprobs: int | None = Field(None, ge=0, le=TOP)

  @pydantic.model_validator(mode="after")
  def _scores(self):
    if self.top_logprobs and not self.logprobs:
      raise ValueError("top_logprobs needs logprobs=true")
    return self

  @property
  def top(self) -> int:
    return self.top_logprobs or 0


def explain(error: pydantic.ValidationError) -> str:
  """One line: where, what was wrong, what was expected."""
  lines = []
  for part in error.errors():
    where = ".".join(str(at) for at in part["loc"] if not str(at).startswith("function-"))
    message = part["msg"].removeprefix("Value error, ")
    if part["type"] == "extra_forbidden":
      message = "unknown parameter; this server does not have it"
    lines.append(f"{where}: {message}" if where else message)
  return "; ".join(dict.fromkeys(lines))


class Writer:
  """Makes the bodies of the replies to one request."""

  def __init__(self, kind: Literal["completion", "chat"], model: str, tokenizer, scored: bool):
    """scored: whether log-probabilities were asked for."""
    self.kind, self._scored = kind, scored
    self._tokenizer: tokenizers.Tokenizer = tokenizer
    prefix = "cmpl" if kind == "completion" else "chatcmpl"
    self._head = {
      "id": f"{prefix}-{uuid.uuid4().hex}",
      "created": int(time.time()),
      "model": model,
    }

  def chunk(
    self, index: int, text: str, scores: Sequence[Score], reason: str | None, first: bool
  ) -> dict:
    """One event of a stream; `scores` are of the tokens that came with the text."""
    choice = {"index": index, "finish_reason": reason, "logprobs": self._logprobs(scores)}
    if self.kind == "completion":
      return self._body("text_completion", [choice | {"text": text}])
    delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
    return self._body("chat.completion.chunk", [choice | {"delta": delta}])

  def whole(self, texts: Sequence[tuple[str, Sequence[Score], str]], usage: dict) -> dict:
    """The reply without a stream: of each choice its text, its tokens, and why it ended."""
    choices = []
    for index, (text, scores, reason) in enumerate(texts):
      choice = {"index": index, "finish_reason": reason, "logprobs": self._logprobs(scores)}
      message = {"role": "assistant", "content": text, "refusal": None}
      choices.append(
        choice | ({"text": text} if self.kind == "completion" else {"message": message})
      )
    kind = "text_completion" if self.kind == "completion" else "chat.completion"
    return self._body(kind, choices) | {"usage": usage}

  def usage_chunk(self, usage: dict) -> dict:
    """The last event of a stream that was asked to say what it took."""
    kind = "text_completion" if self.kind == "completion" else "chat.completion.chunk"
    return self._body(kind, []) | {"usage": usage}

  def _body(self, kind: str, choices: list[dict]) -> dict:
    return self._head | {"object": kind, "choices": choices}

  def _logprobs(self, scores: Sequence[Score]) -> dict | None:
    if not self._scored:
      return None
    if self.kind == "completion":
      return {
        "tokens": [self._text(score.token) for score in scores],
        "token_logprobs": [score.log_prob for score in scores],
        "top_logprobs": [{self._text(t): p for t, p in score.top} for score in scores],
      }
    one = lambda token, log_prob: {
      "token": self._text(token),
      "logprob": log_prob,
      "bytes": list(self._text(token).encode()),
    }
    return {
      "content": [
        one(score.token, score.log_prob) | {"top_logprobs": [one(t, p) for t, p in score.top]}
        for score in scores
      ],
      "refusal": None,
    }

  def _text(self, token: int) -> str:
    return self._tokenizer.decode([token], skip_special_tokens=False)
