"""A server under load: many streaming clients for minutes, some of which leave or send nonsense.

  .venv/bin/python -m benchmarks.serving.load

Starts `./run.sh serve` on a free port of this machine. Every client asks for one text after another,
with prompts of heavy-tailed lengths; every tenth request is left in the middle and every tenth is one
that must be refused. Written to benchmarks/serving/load.json: requests by how they ended, tokens per
second, time to the first token, and the server's memory every five seconds. It fails if a request
fails that should not, if one hangs, if a slot is not freed, or if memory grows by more than 5 %
after the first quarter.
"""

import asyncio
import json
import pathlib
import random
import time

import numpy as np
import openai
import psutil
from absl import app, flags

from benchmarks.serving import measured_server
from common.reporting.report import environment

_MODEL = flags.DEFINE_string("model", "lm-tiny", "a base model or a Hugging Face directory")
_CLIENTS = flags.DEFINE_integer("clients", 64, "at the same time", lower_bound=1)
_SECONDS = flags.DEFINE_integer("seconds", 120, "of load", lower_bound=1)
_SLOTS = flags.DEFINE_integer("slots", 32, "of the server", lower_bound=1)
_OUT = flags.DEFINE_string("out", "benchmarks/serving/load.json", "file of the result")

NEW_TOKENS = 48
# Longer than any request should take: one that takes longer hangs.
PATIENCE = 60
WORDS = "import numpy as np def class return self array shape of the input tensor".split()


class Outcomes:
  """What the clients saw."""

  def __init__(self):
    self.whole = self.left = self.refused = 0
    self.wrong: list[str] = []
    self.tokens = 0
    self.first_token: list[float] = []


def prompt(rng: random.Random) -> str:
  """A few words, and now and then a hundred of them."""
  return " ".join(rng.choices(WORDS, k=min(int(rng.paretovariate(0.8) * 4), 120)))


async def client(url: str, number: int, end: float, seen: Outcomes) -> None:
  rng = random.Random(number)
  async with measured_server.client(url, PATIENCE) as api:
    while time.monotonic() < end:
      kind = rng.random()
      try:
        if kind < 0.1:
          await _nonsense(api, rng, seen)
        else:
          await _text(api, rng, seen, leave=kind < 0.2)
      except Exception as error:
        seen.wrong.append(f"{type(error).__name__}: {error}"[:200])


async def _text(api, rng, seen: Outcomes, leave: bool) -> None:
  start = time.perf_counter()
  stream = await api.completions.create(
    model="model",
    prompt=prompt(rng),
    max_tokens=NEW_TOKENS,
    seed=rng.randrange(2**32),
    stream=True,
    stream_options={"include_usage": True},
  )
  count = 0
  async with stream:
    async for chunk in stream:
      if not count:
        seen.first_token.append(time.perf_counter() - start)
      count += 1
      if leave and count == 5:
        seen.left += 1
        return
      if chunk.usage:
        seen.tokens += chunk.usage.completion_tokens
  seen.whole += 1


async def _nonsense(api, rng, seen: Outcomes) -> None:
  bad = rng.choice(
    [
      {"prompt": "a " * 3000},
      {"prompt": "a", "temperature": -1},
      {"prompt": "a", "extra_body": {"unknown": 1}},
      {"prompt": "a", "extra_body": {"grammar": "root ::= nothing"}},
    ]
  )
  try:
    await api.completions.create(model="model", **bad)
  except openai.BadRequestError:
    seen.refused += 1


async def _watch(process: psutil.Process, memory: list, end: float) -> None:
  start = time.monotonic()
  while time.monotonic() < end:
    memory.append((round(time.monotonic() - start), process.memory_info().rss))
    await asyncio.sleep(5)


async def _load(url: str, process: psutil.Process) -> tuple[Outcomes, list]:
  seen, memory = Outcomes(), []
  end = time.monotonic() + _SECONDS.value
  tasks = [client(url, number, end, seen) for number in range(_CLIENTS.value)]
  await asyncio.gather(_watch(process, memory, end), *tasks)
  return seen, memory


async def _idle(url: str) -> dict[str, float]:
  """Metrics once no slot is taken."""
  for _ in range(100):
    metrics = await measured_server.metrics(url)
    if not metrics["flaxworks_active_slots"] and not metrics["flaxworks_queued"]:
      return metrics
    await asyncio.sleep(0.1)
  raise SystemExit("slots are not freed")


async def _run(url: str, process: psutil.Process) -> dict:
  # The first requests compile: that is not what is measured.
  warm_up = Outcomes()
  async with measured_server.client(url) as api:
    for rng in map(random.Random, range(8)):
      await asyncio.gather(*(_text(api, rng, warm_up, leave=False) for _ in range(_SLOTS.value)))
  before = await measured_server.metrics(url)
  seen, memory = await _load(url, process)
  after = await _idle(url)
  count = lambda name: after[f"flaxworks_{name}_total"] - before[f"flaxworks_{name}_total"]
  rss = np.array([bytes_ for _, bytes_ in memory], float)
  settled = rss[len(rss) // 4 :]
  first = np.percentile(seen.first_token, (50, 95, 99)).round(3).tolist()
  return {
    "settings": {
      "model": _MODEL.value,
      "clients": _CLIENTS.value,
      "seconds": _SECONDS.value,
      "slots": _SLOTS.value,
      "new_tokens": NEW_TOKENS,
    },
    "whole": seen.whole,
    "left": seen.left,
    "refused": seen.refused,
    "wrong": seen.wrong,
    "tokens_per_second": round(seen.tokens / _SECONDS.value, 1),
    "first_token_seconds": dict(zip(("p50", "p95", "p99"), first)),
    "occupied_slots": round(count("occupied_slots") / count("steps") / _SLOTS.value, 3),
    "prefill_padding": round(1 - count("prompt_tokens") / count("prefill_slots"), 3),
    "memory_megabytes": [round(x / 2**20, 1) for x in rss],
    "memory_growth": round(float(settled[-1] / settled[0] - 1), 4),
    "environment": environment(),
  }


def main(argv) -> None:
  del argv
  measured_server.quiet()
  flags = (f"--model={_MODEL.value}", f"--slots={_SLOTS.value}", "--max_length=512")
  with measured_server.start(*flags) as (url, pid):
    result = asyncio.run(_run(url, psutil.Process(pid)))
  path = pathlib.Path(_OUT.value)
  path.write_text(json.dumps(result, indent=2) + "\n")
  print(json.dumps({k: v for k, v in result.items() if k != "environment"}, indent=2))
  if result["wrong"] or result["memory_growth"] > 0.05:
    raise SystemExit("requests failed, or memory grew")


if __name__ == "__main__":
  app.run(main)
