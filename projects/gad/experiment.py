"""ASAp beside masks: toy languages with exact answers, and grammars under a language model."""

import pathlib

import numpy as np
from ml_collections import ConfigDict

from common.decoding.constrained import GrammarConstraint
from common.errors import UserError
from common.models.base import RECIPES, base_model
from common.models.decoder import Decoder
from common.reporting.report import Report
from projects.gad import tables, toy
from projects.gad.asap import AsapConstraint
from projects.gad.baselines import rejection_sample
from projects.gad.exact import conditional, future_grammaticality, text_probabilities
from projects.gad.rounds import (
  METHODS,
  PROPAGATION,
  make_rows,
  sample_rounds,
  sample_unconstrained,
  starting_tries,
)
from projects.gad.tasks import load_tasks
from projects.gad.trie import Trie


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Both studies."""
  check_config(config)
  tasks = load_tasks(config.tasks)
  base = base_model(config.model)
  if not isinstance(base.model, Decoder):
    raise UserError(f"model={config.model}: expected a decoder")
  rows = make_rows(config, tasks, base)
  tries = starting_tries(config, rows)
  report = Report(tables=[], figures=[], claims=[])
  for language in config.toy_languages:
    runs = [run_toy(config, language, seed) for seed in range(config.toy_seeds)]
    tables.report_toy(language, runs, report)
  sampled = sample_rounds(config, rows, base, tries, workdir)
  unconstrained = sample_unconstrained(config, rows, base)
  tables.report_tasks(config, rows, sampled, unconstrained, workdir, report)
  return report


def run_toy(config: ConfigDict, language: str, seed: int) -> dict[str, tables.ToyResult]:
  """Every sampler on one language and one random model."""
  rng = np.random.default_rng(seed)
  masks = toy.toy_masks(language)
  max_tokens = int(language[0]) + 1
  model = toy.random_model(max_tokens, rng)
  texts = text_probabilities(model, masks, max_tokens)
  q = dict(zip(texts, conditional(np.array([p.model for p in texts.values()]))))
  grammaticality = future_grammaticality(model, masks, max_tokens)[0][masks.start, 0]
  count = config.toy_samples
  found = {}
  for method in METHODS:
    trie = Trie(toy.EOS)
    samples = []
    for _ in range(count):
      if method == "GCD":
        constraint = GrammarConstraint(masks)
      else:
        constraint = AsapConstraint(masks, trie, PROPAGATION[method])
      samples.append(tuple(toy.sample_text(model, constraint, max_tokens, rng)))
      if method != "GCD":
        constraint.finish(complete=True)
    implied = text_probabilities(model, masks, max_tokens, trie)
    kl = sum(np.exp(p.sampler) * (p.sampler - np.log(q[text])) for text, p in implied.items())
    success = None if method == "GCD" else float(np.exp(trie.root.log_success))
    found[method] = tables.ToyResult(samples, q, float(kl), success, grammaticality, count)
  draw = toy.drawer(model, max_tokens, 2000, rng)
  accepted, drawn = rejection_sample(
    draw, lambda text: tuple(text) in q, count, config.toy_rejection_rounds
  )
  accepted = [tuple(text) for text in accepted]
  if len(accepted) < count:
    raise UserError(
      f"rejection sampling found {len(accepted)} of {count} texts in {drawn}: raise "
      "--config.toy_rejection_rounds"
    )
  found["rejection"] = tables.ToyResult(accepted, q, 0.0, None, grammaticality, drawn)
  return found


def check_config(config: ConfigDict) -> None:
  """Raises UserError for a value that cannot work."""
  checks = [
    (set(config.toy_languages) <= toy.LANGUAGES.keys(), "toy_languages", f"of {[*toy.LANGUAGES]}"),
    (config.toy_seeds > 0, "toy_seeds", "at least one"),
    (config.toy_samples >= 4, "toy_samples", "at least 4"),
    (config.samples >= 4, "samples", "at least 4"),
    (config.new_tokens >= 2, "new_tokens", "at least 2"),
    (config.temperature > 0, "temperature", "a positive number"),
    (len(config.seeds) > 0, "seeds", "at least one"),
    (
      {"GCD", "ASAp"} <= set(config.methods) <= set(METHODS),
      "methods",
      f"GCD, ASAp and of {METHODS[2:]}",
    ),
    (config.max_nodes > config.new_tokens, "max_nodes", "more than new_tokens"),
    (config.unconstrained_samples > 0, "unconstrained_samples", "at least one"),
    (not config.tries or pathlib.Path(config.tries).expanduser().is_dir(), "tries", "a folder"),
    (
      config.model in RECIPES or pathlib.Path(config.model).expanduser().is_dir(),
      "model",
      f"a checkpoint's folder, or one of {', '.join(RECIPES)}",
    ),
  ]
  for holds, name, expected in checks:
    if not holds:
      raise UserError(f"{name}={config[name]}: expected {expected}; set --config.{name}")
