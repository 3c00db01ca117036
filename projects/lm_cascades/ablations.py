"""Ablations on one seed of a task: quantiles, training-set size, embedding layer, target, beams."""

import functools
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from common.decoding.beam_search import beam_search
from common.reporting.measurements import Measurements
from common.reporting.report import Column, Table
from projects.lm_cascades import deferral, outputs, post_hoc, rules, tasks
from projects.lm_cascades.rules import Measured, Split

BEAM_RULES = (rules.SUM, rules.AVERAGE, *map(rules.quantile_name, (0.0, 0.1, 0.2)))


def tables(
  task: Callable[[], tasks.Task],
  measured: Measured,
  parts: Split,
  config: ConfigDict,
  seed: int,
  measurements: Measurements,
) -> list[Table]:
  """The ablations that the config asks for; all numbers are percent of AUC-DC over random."""
  small, large = (x[parts.test] for x in measured.labels[:2])

  @functools.cache
  def features(layers: int) -> dict[str, np.ndarray]:
    intermediate = rules.embed_2(task(), config, layers)
    return rules.feature_sets(measured, intermediate, config.num_quantiles)

  def learned(setting: str, rule: str, phi_of, parts: Split = parts, target=None) -> list:
    def gain() -> list:
      phi = phi_of()
      fit = {"hidden": rules.hidden_units(rule, config), "target": target}
      scorer = rules.fit_rule(phi, measured.labels, parts, config, seed, **fit)
      scores = post_hoc.predict(scorer, phi[parts.test])
      gains = [float(deferral.percent_gain(score, small, large)) for score in scores]
      return [np.mean(gains), np.std(gains, ddof=1) if len(gains) > 1 else None]

    return [setting, rule, *measurements.get(f"ablation, {setting}, {rule}", gain)]

  found = []
  for count in config.ablate_quantiles:
    phi_of = functools.partial(
      post_hoc.quantile_features, measured.small.log_probs, measured.mask, count
    )
    found.append(learned(f"{count} quantiles", rules.QUANTILE, phi_of))
  for layers in config.ablate_layers:
    setting = f"large model's decoder layer {layers}"
    found.append(
      learned(setting, rules.EMBED_12, lambda layers=layers: features(layers)[rules.EMBED_12])
    )
  full = {
    rule: lambda rule=rule: features(config.embed_layers)[rule]
    for rule in (rules.QUANTILE, rules.EMBED_12)
  }
  for size in config.ablate_sizes:
    if size > len(parts.train):
      continue
    # As many steps as with all inputs: the few are repeated.
    fewer = parts._replace(train=np.resize(parts.train[:size], len(parts.train)))
    for rule, phi_of in full.items():
      found.append(learned(f"{size} training inputs", rule, phi_of, fewer))
  for target in post_hoc.TARGETS if config.ablate_targets else ():
    for rule, phi_of in full.items():
      found.append(learned(f"target {target}", rule, phi_of, target=target))
  result = [
    Table(
      "Ablations of the learned rules (first task, first seed)",
      ["setting", "rule", Column("over random, %", "+.2f"), Column("sd over runs", ".2f")],
      found,
    )
  ]
  if config.num_beams:
    rows = measurements.get(
      f"ablation, {config.num_beams} beams", lambda: beam_rows(task(), measured, parts, config)
    )
    result.append(
      Table(
        "Greedy and beam-search outputs of the small model (first task, first seed)",
        [
          "outputs",
          Column("small model's quality", ".4f"),
          *[Column(rule, "+.2f") for rule in BEAM_RULES],
        ],
        rows,
        note="Percent of AUC-DC over random.",
      )
    )
  return result


def beam_rows(task: tasks.Task, measured: Measured, parts: Split, config: ConfigDict) -> list[list]:
  """Rules on the small model's greedy and beam-search outputs; the large model's stay greedy."""
  prompts = [task.prompts[i] for i in parts.test]
  hypotheses = beam_search(
    task.small,
    prompts,
    max_new_tokens=task.max_new_tokens,
    num_beams=config.num_beams,
    stop_tokens=task.stop_token,
  )
  tokens = np.full((len(prompts), task.max_new_tokens), task.stop_token, np.int32)
  lengths = np.array([len(row[0].tokens) for row in hypotheses])
  for i, row in enumerate(hypotheses):
    tokens[i, : lengths[i]] = row[0].tokens
  mask = np.arange(task.max_new_tokens) <= lengths[:, None]  # With the stop token, if it came.
  unscored = outputs.Outputs(tokens, np.zeros(tokens.shape), np.zeros(tokens.shape), mask)
  beams, embedding = outputs.rescore(
    task.small,
    prompts,
    unscored,
    stop_token=task.stop_token,
    batch_size=config.decode_batch,
  )
  large = measured.large.take(parts.test)
  tested = task._replace(prompts=prompts, references=[task.references[i] for i in parts.test])
  searched = Measured(
    beams,
    large,
    outputs.scored_mask(beams, task.stop_token, include_eos=config.include_eos),
    rules.label(tested, beams, large, config.copy_and_resolve_references()),
    embedding,
    measured.prompt_tokens[parts.test],
  )
  greedy = Measured(
    measured.small.take(parts.test),
    large,
    measured.mask[parts.test],
    measured.labels.take(parts.test),
    measured.embed_1[parts.test],
    measured.prompt_tokens[parts.test],
  )
  rows = []
  for name, outcome in (("greedy", greedy), (f"{config.num_beams} beams", searched)):
    qualities = outcome.labels.small, outcome.labels.large
    scores = rules.fixed_scores(outcome)
    row = [name, float(qualities[0].mean())]
    for rule in BEAM_RULES:
      row.append(float(deferral.percent_gain(scores[rule], *qualities)))
    rows.append(row)
  return rows
