"""Chats as prompts: the chat templates that Hugging Face checkpoints bring along.

A template is a Jinja program of unknown origin: it runs in Jinja's sandbox, which lets it read what
it is given and nothing else.
"""

import datetime
import json
import pathlib
from collections.abc import Callable, Sequence

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from apps.serving.protocol import Message
from common.errors import UserError

# (messages) -> the prompt, which begins the assistant's answer.
ChatTemplate = Callable[[Sequence[Message]], str]


def find_template(model: pathlib.Path, file: str | None) -> ChatTemplate | None:
  """The chat template in a file, or else of a checkpoint (chat_template.jinja, or a field of
  tokenizer_config.json); None if it has none.

  Raises:
    UserError: the file cannot be read, or is no template.
  """
  tokens = {}
  settings = _settings(model / "tokenizer_config.json")
  for name in ("bos_token", "eos_token"):
    token = settings.get(name)
    tokens[name] = token.get("content", "") if isinstance(token, dict) else token or ""
  if file is not None:
    return compile_template(_read(pathlib.Path(file)), tokens)
  if (model / "chat_template.jinja").is_file():
    return compile_template(_read(model / "chat_template.jinja"), tokens)
  source = settings.get("chat_template")
  if isinstance(source, list):  # Several, by name.
    source = next((t.get("template") for t in source if t.get("name") == "default"), None)
  return None if not isinstance(source, str) else compile_template(source, tokens)


def compile_template(source: str, tokens: dict[str, str]) -> ChatTemplate:
  """Args:
    source: a Jinja template over `messages` and `add_generation_prompt`.
    tokens: more variables: bos_token, eos_token.

  Raises:
    UserError: it is no Jinja; or, when it is used, it refuses the messages.
  """
  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
  )
  environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)

  def refuse(message):
    raise jinja2.TemplateError(message)

  environment.globals["raise_exception"] = refuse
  environment.globals["strftime_now"] = lambda text: datetime.datetime.now().strftime(text)
  try:
    template = environment.from_string(source)
  except jinja2.TemplateError as error:
    raise UserError(f"the chat template cannot be read: {error}") from None

  def render(messages: Sequence[Message]) -> str:
    listed = [{"role": m.role, "content": m.text} for m in messages]
    try:
      return template.render(messages=listed, add_generation_prompt=True, **tokens)
    except (jinja2.TemplateError, TypeError) as error:
      raise UserError(f"the model's chat template refuses the messages: {error}") from None

  return render


def _settings(path: pathlib.Path) -> dict:
  if not path.is_file():
    return {}
  try:
    found = json.loads(path.read_text())
  except ValueError as error:
    raise UserError(f"{path} is no JSON: {error}") from None
  return found if isinstance(found, dict) else {}


def _read(path: pathlib.Path) -> str:
  try:
    return path.read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"cannot read the chat template {path}: {error}") from None
