"""SpecDec++ beside fixed lengths, schedules and the oracle: tables and claims."""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track
from sklearn.metrics import roc_auc_score

from common.data.tokenizer import eos_id
from common.decoding.generation import Sampling
from common.decoding.speculative import Policy, Statistics, constant
from common.models.base import base_model
from common.models.decoder import Decoder
from common.reporting.report import Report
from projects.specdec_pp import tables
from projects.specdec_pp.draft_model import train_draft
from projects.specdec_pp.frontier import Rates, modelled_speedup, rates
from projects.specdec_pp.head_training import (
  Divergence,
  HeadQuality,
  HeadSettings,
  head_quality,
  label_divergence,
  load_head,
  save_head,
  train_head,
)
from projects.specdec_pp.policies import confidence, current_token, heuristic, random_length
from projects.specdec_pp.prompts import load_prompts
from projects.specdec_pp.replay import (
  DecisionLog,
  decision_log,
  draft_confidence,
  oracle,
  replay,
  scored_drafts,
)
from projects.specdec_pp.settings import check_config, check_models
from projects.specdec_pp.specdec_pp import AcceptanceHead, threshold_policy
from projects.specdec_pp.timing import engine_statistics, measured_costs, timed_decoding
from projects.specdec_pp.training_data import (
  DraftLabels,
  HeadData,
  Texts,
  continue_prompts,
  head_data,
  label_drafts,
)


class Models(NamedTuple):
  """Target and draft, with one vocabulary; stop_token None lets texts go on."""

  target: Decoder
  draft: Decoder
  stop_token: int | None


class SeedResult(NamedTuple):
  """What one seed measured.

  Attributes:
    statistics: of each kind of policy, [policies, rows]; rows are prompts, source by source.
    quality: of the head, on the decisions of the test texts.
    confidence_auroc: of the draft's own probability on them; None without a log.
    divergence: on dev data.
    variance: of A between positions, per source of the head's training.
  """

  statistics: dict[str, Statistics]
  quality: HeadQuality
  confidence_auroc: float | None
  divergence: Divergence
  variance: dict[str, float]


class Seed(NamedTuple):
  """What the policies of a seed, and the ablations, are measured on.

  Attributes:
    head_texts: texts for training and dev, source by source.
    drafted: Y and A of them.
    is_dev: which of them are not trained on, bool [rows].
    mixed: the same at the config's mixing, with the draft's states.
    test_prompts: token ids.
    log: decisions of the test texts; None if the engine measures.
  """

  head_texts: Texts
  drafted: DraftLabels
  is_dev: np.ndarray
  mixed: HeadData
  test_prompts: list[list[int]]
  log: DecisionLog | None


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Trains a head for every seed and measures every policy."""
  check_config(config)
  target = base_model(config.model)
  prompts = {seed: draw_prompts(config, target.tokenizer, seed) for seed in config.seeds}
  draft = base_model(config.draft).model if config.draft else None
  if draft is None:
    draft = train_draft(config, target.model, target.tokenizer)
  check_models(target.model, draft)
  stop_token = eos_id(target.tokenizer) if config.instructions else None
  models = Models(target.model, draft, stop_token)
  results, seeds, heads = {}, {}, {}
  for seed in track(config.seeds, "SpecDec++", console=Console(stderr=True)):
    seeds[seed] = prepare_seed(config, models, prompts[seed], seed)
    mixed = seeds[seed].mixed
    heads[seed] = head_of(config, models, seeds[seed], mixed, settings_of(config), seed)
    save_head(workdir / f"head_{seed}.safetensors", heads[seed])
    results[seed] = measure_seed(config, models, seeds[seed], heads[seed], seed)
  first = config.seeds[0]
  ablated = [] if config.head else ablations(config, models, seeds[first], results[first], first)
  report = Report(tables=[], figures=[], claims=[])
  costs = measured_costs(models.target, models.draft, config)
  tables.report_results(config, results, costs, workdir, report)
  tables.report_head(config, results, ablated, workdir, report)
  tables.report_mdp(config, report)
  if config.timed_prompts:
    timed = timed_decoding(
      config,
      models.target,
      models.draft,
      seeds[first].test_prompts,
      heads[first],
      int(best_constant(config, results[first])),
      models.stop_token,
    )
    tables.report_timing(timed, report)
  return report


def sampling_of(config: ConfigDict) -> Sampling:
  return Sampling(config.temperature, top_p=config.top_p)


def settings_of(config: ConfigDict, **changes) -> HeadSettings:
  """The head's settings, with changes for an ablation."""
  return HeadSettings(**{name: config[name] for name in HeadSettings._fields})._replace(**changes)


def draw_prompts(config: ConfigDict, tokenizer, seed: int) -> tuple[list, list]:
  """Prompts of the head and of the test, source by source."""

  def load(sources, split, count):
    options = {"prompt_length": config.prompt_length, "instructions": config.instructions}
    return [
      prompt
      for source in sources
      for prompt in load_prompts(source, tokenizer, split=split, count=count, seed=seed, **options)
    ]

  # Instructions come as one file: its train split is for the head.
  split = "train" if config.instructions else "validation"
  head = load(config.head_sources, split, config.head_prompts)
  return head, load(config.test_sources, "test", config.test_prompts)


def prepare_seed(config: ConfigDict, models: Models, prompts, seed: int) -> Seed:
  """Texts of the target and what the draft makes of them."""
  keys = jax.random.split(jax.random.key(seed), 5)
  sampling = sampling_of(config)
  head_prompts, test_prompts = prompts
  drawn = {"new_tokens": config.new_tokens, "sampling": sampling}
  write = lambda prompts, key: continue_prompts(
    models.target, prompts, key=key, stop_token=models.stop_token, **drawn
  )
  texts = write(head_prompts, keys[0])
  drafted = label_drafts(models.target, models.draft, texts, key=keys[1], **drawn)
  is_dev = np.arange(len(head_prompts)) % config.head_prompts < (
    config.dev_fraction * config.head_prompts
  )
  mixed = head_data(models.draft, texts, drafted, mixing=config.mixing, key=keys[2])
  log = None
  if not config.engine:
    log = decision_log(
      models.target,
      models.draft,
      write(test_prompts, keys[3]),
      max_drafts=config.max_drafts,
      key=keys[4],
      **drawn,
    )
  return Seed(texts, drafted, is_dev, mixed, test_prompts, log)


def rows_of_data(data: HeadData, rows: np.ndarray) -> HeadData:
  """Some texts. rows: bool [rows]."""
  return HeadData(*(x[rows] for x in data))


def head_of(
  config: ConfigDict, models: Models, data: Seed, mixed: HeadData, settings: HeadSettings, seed: int
) -> AcceptanceHead:
  """Trains a head on the mixed texts that are not dev texts, or reads the config's."""
  if config.head:
    return load_head(config.head, models.draft.config.hidden_size)
  return train_head(rows_of_data(mixed, ~data.is_dev), settings, seed)


def policies(
  config: ConfigDict, head: AcceptanceHead, rows: int, stop_token: int | None, seed: int
) -> dict[str, list[Policy]]:
  """Every kind of policy; those of a kind differ in numbers only."""
  key = jax.random.fold_in(jax.random.key(seed), 2)
  return {
    "constant": [constant(length) for length in config.constants],
    "SpecDec++": threshold_policies(config, head, rows, stop_token),
    "heuristic": [heuristic(rows)],
    "current token": [current_token(head)],
    "confidence": [confidence(threshold) for threshold in config.confidences],
    "random": [
      random_length(jax.random.fold_in(key, longest), rows, longest)
      for longest in config.random_lengths
    ],
  }


def threshold_policies(
  config: ConfigDict, head: AcceptanceHead, rows: int, stop_token: int | None
) -> list[Policy]:
  return [
    threshold_policy(
      head,
      threshold,
      batch=rows,
      shortest=config.min_drafts,
      longest=config.max_drafts,
      stop_token=-1 if stop_token is None else stop_token,
    )
    for threshold in config.thresholds
  ]


def measure_seed(
  config: ConfigDict, models: Models, data: Seed, head: AcceptanceHead, seed: int
) -> SeedResult:
  """Statistics of every policy, and the quality of the head."""
  kinds = policies(config, head, rows_of(config, data), models.stop_token, seed)
  statistics = {
    name: measure(config, models, data, members, seed) for name, members in kinds.items() if members
  }
  confidence_auroc = None
  if data.log is not None:
    known = oracle(data.log, max_drafts=config.max_drafts)
    statistics["oracle"] = jax.tree.map(lambda x: x[None], known)
    sure = np.asarray(draft_confidence(data.log, sampling=sampling_of(config)))
    rejected = ~np.asarray(scored_drafts(data.log)[1])
    confidence_auroc = float(roc_auc_score(rejected.reshape(-1), 1 - sure.reshape(-1)))
  sources = np.arange(len(data.is_dev)) // config.head_prompts
  variance = {
    source: float(data.drafted.labels[(sources == i)][data.drafted.labels[sources == i] >= 0].var())
    for i, source in enumerate(config.head_sources)
  }
  divergence = divergence_of(data, head, config.rejected_weight)
  quality = quality_of(data, head)
  return SeedResult(statistics, quality, confidence_auroc, divergence, variance)


def rows_of(config: ConfigDict, data: Seed) -> int:
  """Rows that a policy decides for at once."""
  return config.engine_batch if config.engine else len(data.test_prompts)


def measure(
  config: ConfigDict, models: Models, data: Seed, members: list[Policy], seed: int
) -> Statistics:
  """int32 [policies, rows] each, by replay or by decoding."""
  sampling = sampling_of(config)
  if data.log is not None:
    return replay(data.log, members, max_drafts=config.max_drafts, sampling=sampling)
  found = [
    engine_statistics(
      config,
      models.target,
      models.draft,
      data.test_prompts,
      policy,
      jax.random.key(seed),
      models.stop_token,
    )
    for policy in members
  ]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def quality_of(data: Seed, head: AcceptanceHead) -> HeadQuality:
  """On the decisions of the test texts; without a log on the labels of the dev texts."""
  if data.log is not None:
    return head_quality(head, *scored_drafts(data.log))
  dev = rows_of_data(data.mixed, data.is_dev)
  counted = dev.labels >= 0
  return head_quality(head, dev.hidden[counted], dev.labels[counted])


def divergence_of(data: Seed, head: AcceptanceHead, rejected_weight: float) -> Divergence:
  """On the dev texts at the config's mixing."""
  train_labels = data.mixed.labels[~data.is_dev]
  dev = rows_of_data(data.mixed, data.is_dev)
  return label_divergence(head, dev, train_labels, rejected_weight)


def best_constant(config: ConfigDict, result: SeedResult) -> int:
  """The length of the greatest modelled speed-up."""
  speed = modelled_speedup(rates(result.statistics["constant"]), config.cost_ratio)
  return config.constants[int(np.argmax(speed))]


class Ablation(NamedTuple):
  """A head trained otherwise, on the first seed; costs of its thresholds, [policies] each."""

  name: str
  divergence: Divergence
  quality: HeadQuality
  costs: Rates


def ablations(
  config: ConfigDict, models: Models, data: Seed, main: SeedResult, seed: int
) -> list[Ablation]:
  """Heads that differ from the main one in one setting."""
  described = f"r={config.mixing:g}, w={config.rejected_weight:g}, D={config.num_blocks}"
  done = [
    Ablation(
      f"main: {described}", main.divergence, main.quality, rates(main.statistics["SpecDec++"])
    )
  ]
  variants = [
    (f"r={value:g}", value, settings_of(config))
    for value in config.ablate_mixing
    if value != config.mixing
  ]
  for symbol, name in (("w", "rejected_weight"), ("D", "num_blocks")):
    variants += [
      (f"{symbol}={value:g}", config.mixing, settings_of(config, **{name: value}))
      for value in config[f"ablate_{name}"]
      if value != config[name]
    ]
  for name, mixing, settings in variants:
    mixed = data.mixed
    if mixing != config.mixing:
      key = jax.random.fold_in(jax.random.key(seed), 1)
      mixed = head_data(models.draft, data.head_texts, data.drafted, mixing=mixing, key=key)
    head = head_of(config, models, data, mixed, settings, seed)
    members = threshold_policies(config, head, rows_of(config, data), models.stop_token)
    costs = rates(measure(config, models, data, members, seed))
    done.append(
      Ablation(
        name, divergence_of(data, head, settings.rejected_weight), quality_of(data, head), costs
      )
    )
  return done
