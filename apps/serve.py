"""usage: ./run.sh serve --model=DIR [flags]

Serves a model over HTTP, with OpenAI's interface: POST /v1/completions and /v1/chat/completions
(streams too), GET /v1/models, /health and /metrics (Prometheus). Requests are decoded together, each
in a slot of one batch; prompts that wait are read packed, in one pass. Point any OpenAI client to

  http://127.0.0.1:8000/v1

  --model=DIR           a Hugging Face checkpoint, full precision or of `./run.sh quantize`; or a
                        base model (lm-tiny, lm-small)
  --name=NAME           what clients call it (default: the last part of --model)
  --draft=DIR           a smaller model with the same tokenizer: speculative decoding
  --num_drafts=4        tokens that it proposes in a round, at most
  --acceptance_head=FILE
                        trained by ./run.sh specdec_pp (head_SEED.safetensors in its workdir) for this
                        draft: SpecDec++ ends a round of drafts when one is likely to be rejected
  --rejection_threshold=0.7
                        how likely, by the head
  --draft_confidence=0  ends a round behind a token that the draft gave less than this probability
  --prompt_tokens=FILE  trained by ./run.sh ppd (prompts_SEED.safetensors in its workdir) for this model:
                        parallel-prompt decoding
  --key_pruning=0       share of the key cache's channels to drop (ThinK; the paper's is 0.4)
  --prompt_budget=0     tokens of a prompt that its cache keeps (SnapKV); 0 keeps all
  --max_new_tokens=0    of a text at most; 0: no limit, or half of --max_length with the two above
  --integer_products    layers whose weights and inputs both have symmetric codes of 4, 6 or 8 bits
                        multiply integers (default: where there is an accelerator)
  --mesh=tensor=4       sizes of the mesh axes data, fsdp, tensor: cuts the models and their caches over
                        the devices of this machine; tensor=-1 takes all (default: one device)
  --packed_prefill      --nopacked_prefill reads every prompt in a row of its own
  --slots=8             requests that are decoded at the same time
  --max_length=1024     tokens of a prompt and its text together
  --max_queue=256       requests that may wait; more are refused (429)
  --prefill_tokens=8192 of the prompts that are read in one pass
  --chat_template=FILE  Jinja template for chats (default: the checkpoint's own)
  --host=127.0.0.1      address to listen on; others than loopback are open to the network
  --port=8000           0 takes any free port
  --grace_seconds=30    that running requests get to end after SIGTERM or Ctrl-C

Texts end at the tokens that the checkpoint's generation_config.json lists, or else at the tokenizer's.
Besides OpenAI's parameters a request may have `top_k`; `grammar`, EBNF that the text must follow;
and `grammar_aligned`, which samples a grammar's texts as the model itself would (ASAp) where masks
distort it.

All of this can be combined, but prompt tokens with neither a draft model nor pruned caches. Texts
with a format, a grammar or penalties take no drafts, as what their next token may be depends on the
one before; others in the batch go on taking theirs. The draft model's cache is never pruned. Models with
ALiBi or a sliding window have no pruned caches; log-probabilities are always the model's own.
"""

import ctypes
import pathlib
import sys

from absl import flags

from common import cli
from common.errors import UserError

_MODEL = flags.DEFINE_string("model", None, "checkpoint or base model", required=True)
_NAME = flags.DEFINE_string("name", None, "what clients call it")
_DRAFT = flags.DEFINE_string("draft", None, "draft model")
_NUM_DRAFTS = flags.DEFINE_integer("num_drafts", 4, "tokens of a round", lower_bound=1)
_ACCEPTANCE_HEAD = flags.DEFINE_string("acceptance_head", None, "of the draft model")
_REJECTION_THRESHOLD = flags.DEFINE_float("rejection_threshold", 0.7, "of the head", 0, 1)
_DRAFT_CONFIDENCE = flags.DEFINE_float("draft_confidence", 0, "probability", 0, 1)
_PROMPT_TOKENS = flags.DEFINE_string("prompt_tokens", None, "of parallel-prompt decoding")
_KEY_PRUNING = flags.DEFINE_float("key_pruning", 0, "share of channels", 0, 0.95)
_PROMPT_BUDGET = flags.DEFINE_integer("prompt_budget", 0, "tokens kept", lower_bound=0)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 0, "of a text", lower_bound=0)
_INTEGER_PRODUCTS = flags.DEFINE_bool("integer_products", None, "of quantized inputs")
_MESH = flags.DEFINE_list("mesh", None, "sizes of the mesh axes")
_PACKED_PREFILL = flags.DEFINE_bool("packed_prefill", True, "prompts share rows")
_SLOTS = flags.DEFINE_integer("slots", 8, "requests at the same time", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer("max_length", 1024, "tokens of a text", lower_bound=2)
_MAX_QUEUE = flags.DEFINE_integer("max_queue", 256, "requests that may wait", lower_bound=1)
_PREFILL_TOKENS = flags.DEFINE_integer("prefill_tokens", 8192, "of a pass", lower_bound=1)
_CHAT_TEMPLATE = flags.DEFINE_string("chat_template", None, "Jinja template for chats")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen on")
_PORT = flags.DEFINE_integer("port", 8000, "port", lower_bound=0, upper_bound=65535)
_GRACE_SECONDS = flags.DEFINE_integer("grace_seconds", 30, "to end requests", lower_bound=0)

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise UserError(f"unexpected argument {argv[1]!r}; flags are --name=value")
  _use_few_arenas()
  cli.prepare_jax()
  with cli.on_mesh(_MESH.value):
    serve()


def serve() -> None:
  """Loads the models that the flags name, and serves until a signal ends it."""
  import socket

  import uvicorn

  from apps.serving.chat import find_template
  from apps.serving.constraints import Constraints
  from apps.serving.engine import Engine
  from apps.serving.server import Settings, make_app
  from common.decoding.generation import stop_tokens_of
  from common.decoding.prompt_tokens import PromptTokens
  from common.decoding.prompt_tree import load_prompts
  from common.models.base import base_model

  if _ACCEPTANCE_HEAD.value and _DRAFT_CONFIDENCE.value:
    raise UserError("--acceptance_head and --draft_confidence both end a round of drafts: give one")
  if (_ACCEPTANCE_HEAD.value or _DRAFT_CONFIDENCE.value) and not _DRAFT.value:
    raise UserError(
      "--acceptance_head and --draft_confidence say when a draft model stops: give --draft=DIR too"
    )
  path = pathlib.Path(_MODEL.value).expanduser()
  template = find_template(path, _CHAT_TEMPLATE.value)
  # Before the model: an address that is taken is known at once.
  listener = _listen(_HOST.value, _PORT.value)
  model = base_model(_MODEL.value)
  draft = base_model(_DRAFT.value) if _DRAFT.value else None
  for loaded in (model,) if draft is None else (model, draft):
    _use_integer_products(loaded.model)
  if draft is not None and draft.tokenizer.get_vocab() != model.tokenizer.get_vocab():
    raise UserError(f"--draft={_DRAFT.value} has another tokenizer than --model={_MODEL.value}")
  prompts = {}
  if _PROMPT_TOKENS.value:
    fields, prompts["trees"] = load_prompts(_PROMPT_TOKENS.value)
    prompts["prompt_tokens"] = PromptTokens(**fields)
  stop_tokens = stop_tokens_of(path, model.tokenizer)
  engine = Engine(
    model.model,
    model.tokenizer,
    slots=_SLOTS.value,
    max_length=_MAX_LENGTH.value,
    max_queue=_MAX_QUEUE.value,
    prefill_tokens=_PREFILL_TOKENS.value,
    stop_tokens=stop_tokens,
    draft=None if draft is None else draft.model,
    num_drafts=_NUM_DRAFTS.value,
    policy=None if draft is None else _policy(draft.model.config.hidden_size),
    compression=_compression(),
    max_new_tokens=_MAX_NEW_TOKENS.value or None,
    pack_prompts=_PACKED_PREFILL.value,
    **prompts,
  )
  for done, total in engine.warm_up():
    print(f"\rcompiling {done}/{total}", end="\n" if done == total else "", file=sys.stderr)
  settings = Settings(
    name=_NAME.value or path.name,
    tokenizer=model.tokenizer,
    chat_template=template,
    constrain=Constraints(model.tokenizer, engine.vocab_size, stop_tokens),
    hosts=_LOOPBACK if _HOST.value in _LOOPBACK else (),
  )
  server = uvicorn.Server(
    uvicorn.Config(
      make_app(engine, settings),
      log_level="warning",
      access_log=False,
      timeout_graceful_shutdown=_GRACE_SECONDS.value,
    )
  )
  host, port = listener.getsockname()[:2]
  address = f"[{host}]" if listener.family == socket.AF_INET6 else host
  listener.listen()  # Who reads the next line may connect at once.
  print(f"{settings.name} is at http://{address}:{port}/v1", flush=True)
  server.run(sockets=[listener])


def _use_few_arenas() -> None:
  """Tells glibc to share its heaps: one for every thread, none given back, would grow for hours."""
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
  if mallopt is not None:
    arena_max = -8  # Name of malloc.h.
    mallopt(arena_max, 2)


def _use_integer_products(model) -> None:
  """In the model's blocks, as the flag says, in place."""
  import jax

  from common.quantization.activations import integer_linears
  from common.quantization.online_transforms import integer_transformed_linears

  wanted = _INTEGER_PRODUCTS.value
  if wanted is None:
    # XLA's integer products on a CPU are slower than those of floating point.
    wanted = jax.default_backend() != "cpu"
  for block in model.blocks if wanted else ():
    integer_transformed_linears(block)
    integer_linears(block)


def _compression():
  """Of the prompts' caches, as the flags say, or None."""
  from common.decoding.eviction import snapkv_scores
  from common.decoding.pruned_cache import Compression
  from projects.think.think import query_driven_scores

  if not (_KEY_PRUNING.value or _PROMPT_BUDGET.value):
    return None
  return Compression(
    query_driven_scores,
    ratio=_KEY_PRUNING.value,
    evict=snapkv_scores if _PROMPT_BUDGET.value else None,
    **({"capacity": _PROMPT_BUDGET.value} if _PROMPT_BUDGET.value else {}),
  )


def _policy(width: int):
  """When a draft model of this width ends a round, as the flags say, or None. Raises UserError."""
  if _DRAFT_CONFIDENCE.value:
    from projects.specdec_pp.policies import confidence

    return confidence(_DRAFT_CONFIDENCE.value)
  if _ACCEPTANCE_HEAD.value:
    from projects.specdec_pp.head_training import load_head
    from projects.specdec_pp.specdec_pp import threshold_policy

    return threshold_policy(
      load_head(_ACCEPTANCE_HEAD.value, width),
      _REJECTION_THRESHOLD.value,
      batch=_SLOTS.value,
      shortest=min(2, _NUM_DRAFTS.value),
      longest=_NUM_DRAFTS.value,
    )
  return None


def _listen(host: str, port: int):
  """A bound socket. Raises UserError."""
  import socket

  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  listener = socket.socket(family)
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((host, port))
  except OSError as error:
    raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
  return listener


if __name__ == "__main__":
  cli.run_app(main)
