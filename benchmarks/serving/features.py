"""What each part of the server adds, one by one and all together.

  ./run.sh ppd --workdir=runs/ppd-default
  .venv/bin/python -m benchmarks.serving.features --prompt_tokens=runs/ppd-default/prompts_0.safetensors

Every row is a server of its own (`./run.sh serve`), which answers the same prompts, pieces of
held-out documents, of heavy-tailed lengths, greedily, for some clients at once, twice: the second time
is measured. lm-small serves, in 4 bits by `./run.sh quantize` where it says so, and the draft
of SpecDec++'s default preset, a block of width 64 pretrained here, drafts.
Written to benchmarks/serving/features.json and, as a table, features.md.

The text of a row is compared with that of the first row whose model and cache are the same: packing,
drafts and the company in a batch must change nothing. "Same as plain" is the share of all texts that
equal the full-precision model's over a whole cache.
"""

import asyncio
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from benchmarks.serving import measured_server
from common.data.sources import load_documents
from common.reporting.report import environment

_PROMPT_TOKENS = flags.DEFINE_string("prompt_tokens", None, "of lm-small", required=True)

OUT = pathlib.Path("benchmarks/serving")
PROMPTS, CLIENTS, NEW_TOKENS, SLOTS = 64, 16, 32, 16
PRUNING = ("--key_pruning=0.4", f"--max_new_tokens={NEW_TOKENS}")
DRAFT = ("--num_drafts=3",)
# {name: (quantized weights, flags)}; files that are made or given are added.
ROWS = {
  "plain": (False, ("--nopacked_prefill",)),
  "packed prefill": (False, ()),
  "4-bit weights": (True, ()),
  "ThinK, 0.4": (False, PRUNING),
  "drafts": (False, DRAFT),
  "prompt tokens": (False, ()),
  "all": (True, (*PRUNING, *DRAFT)),
  "all, without drafts": (True, PRUNING),
}
# Rows that must give the same text.
SAME = (("plain", "packed prefill", "drafts", "prompt tokens"), ("all", "all, without drafts"))


def prompts() -> list[str]:
  """Pieces of documents: many are short."""
  rng = np.random.default_rng(0)
  documents = load_documents("embedded:science,embedded:code", "test")
  pieces = [d["text"][i:] for d in documents for i in range(0, len(d["text"]) - 1200, 2400)]
  texts = [pieces[i] for i in rng.permutation(len(pieces))[:PROMPTS]]
  return [text[: int(min(40 * (1 + rng.pareto(1.0)), 1200))] for text in texts]


async def ask(url: str, texts: list[str]) -> tuple[list[str], float, list[float]]:
  """Answers, seconds, and seconds to each first token."""
  answers, first = [""] * len(texts), [0.0] * len(texts)
  waiting = list(enumerate(texts))

  async def client(api) -> None:
    while waiting:
      index, text = waiting.pop(0)
      begun = time.perf_counter()
      stream = await api.completions.create(
        model="model", prompt=text, max_tokens=NEW_TOKENS, temperature=0, stream=True
      )
      async for chunk in stream:
        first[index] = first[index] or time.perf_counter() - begun
        answers[index] += chunk.choices[0].text

  start = time.perf_counter()
  async with measured_server.client(url) as api:
    await asyncio.gather(*(client(api) for _ in range(CLIENTS)))
  return answers, time.perf_counter() - start, first


async def measure(url: str, texts: list[str]) -> dict:
  await ask(url, texts)
  before = await measured_server.metrics(url)
  answers, seconds, first = await ask(url, texts)
  after = await measured_server.metrics(url)
  count = lambda name: after[f"flaxworks_{name}_total"] - before[f"flaxworks_{name}_total"]
  drafted = count("drafted")
  return {
    "texts": answers,
    "seconds": seconds,
    "tokens_per_second": count("new_tokens") / seconds,
    "first_token_seconds": float(np.median(first)),
    "prefill_slots_per_token": count("prefill_slots") / count("prompt_tokens"),
    "tokens_per_row_and_pass": count("new_tokens") / count("row_passes"),
    "accepted": count("accepted") / drafted if drafted else None,
    "cache_megabytes": after["flaxworks_cache_bytes"] / 2**20,
  }


def save(model, tokenizer, folder: pathlib.Path) -> None:
  from common.checkpoints.huggingface import save_model

  save_model(model, folder)
  tokenizer.save(str(folder / "tokenizer.json"))


def quantize(folder: pathlib.Path) -> pathlib.Path:
  """lm-small in 4 bits, groups of 32, by AWQ; beside it lm-small itself and a draft for it."""
  from common.models.base import base_model
  from projects.specdec_pp.config import get_config
  from projects.specdec_pp.draft_model import train_draft

  base = base_model("lm-small")
  save(base.model, base.tokenizer, folder / "model")
  draft = train_draft(get_config("default"), base.model, base.tokenizer)
  save(draft, base.tokenizer, folder / "draft")
  command = [sys.executable, "-m", "apps.quantize", f"--model={folder / 'model'}"]
  command += [f"--out={folder / 'quantized'}", "--group_size=32", "--num_samples=32"]
  subprocess.run([*command, "--seq_len=128"], check=True, stdout=subprocess.DEVNULL)
  return folder / "quantized"


def main(_) -> None:
  measured_server.quiet()
  texts, results = prompts(), {}
  with tempfile.TemporaryDirectory() as folder:
    quantized = quantize(pathlib.Path(folder))
    size = lambda path: sum(f.stat().st_size for f in path.glob("*.safetensors")) / 2**20
    sizes = {False: size(quantized.parent / "model"), True: size(quantized)}
    for name, (is_quantized, options) in ROWS.items():
      model = quantized if is_quantized else "lm-small"
      if DRAFT[0] in options:
        options = (*options, f"--draft={quantized.parent / 'draft'}")
      if name == "prompt tokens":
        options = (f"--prompt_tokens={_PROMPT_TOKENS.value}",)
      options = (f"--model={model}", f"--slots={SLOTS}", "--max_length=512", *options)
      with measured_server.start(*options) as (url, _):
        results[name] = asyncio.run(measure(url, texts))
      results[name]["weights_megabytes"] = sizes[is_quantized]
      print(f"{name}: {results[name]['tokens_per_second']:.0f} tokens/s", flush=True)
  for names in SAME:
    for name in names[1:]:
      if results[name]["texts"] != results[names[0]]["texts"]:
        raise SystemExit(f"{name} and {names[0]} give different texts")
  plain = results["plain"]["texts"]
  for row in results.values():
    row["same_as_plain"] = float(np.mean([a == b for a, b in zip(row.pop("texts"), plain)]))
  text = json.dumps({"rows": results, "environment": environment()}, indent=1)
  (OUT / "features.json").write_text(text + "\n")
  (OUT / "features.md").write_text(table(results))
  print(table(results))


def table(results: dict[str, dict]) -> str:
  """Markdown."""
  columns = {
    "tokens/s": ("tokens_per_second", ".0f"),
    "first token, ms": ("first_token_seconds", ".0f"),
    "prefill slots per prompt token": ("prefill_slots_per_token", ".2f"),
    "tokens per row and pass": ("tokens_per_row_and_pass", ".2f"),
    "drafts accepted": ("accepted", ".2f"),
    "cache, MB": ("cache_megabytes", ".1f"),
    "weights, MB": ("weights_megabytes", ".2f"),
    "same as plain": ("same_as_plain", ".2f"),
  }

  def cell(row, key, spec):
    value = row[key]
    value = value * 1000 if value is not None and key == "first_token_seconds" else value
    return "–" if value is None else format(value, spec)

  lines = ["| server | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
  for name, row in results.items():
    cells = [cell(row, *column) for column in columns.values()]
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  app.run(main)
