"""ICN beside the plain ranking, sampling and beams: a measurement of keys, and three tasks."""

import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import tokenizers
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from common.decoding.generation import Sampling
from common.errors import UserError
from common.models.base import BaseModel, base_model
from common.models.decoder import Decoder
from common.reporting.report import Report
from projects.icn.baselines import diverse_beam_answers, sample_answers
from projects.icn.clusters import (
  browse,
  inside_effect,
  key_clusters,
  split_by_main_clusters,
)
from projects.icn.cot import TASKS, WAY_ENDS, CotResult, load_cot_problems, self_consistency
from projects.icn.icn import Navigation, Probed, Prober, list_prompt, navigate, token_groups
from projects.icn.judge import Judge
from projects.icn.knowledge import (
  Question,
  corpus_lines,
  line_instruction,
  module_questions,
  synthetic_questions,
  train_tokenizer,
  training_lists,
)
from projects.icn.lm_training import lm_training_step, train_lm
from projects.icn.metrics import distinct_n, new_and_correct, self_bleu, zero_gen_accuracy
from projects.icn.query_shift import query_shift
from projects.icn.tables import (
  ICN,
  ICN_FREE,
  PLAIN,
  SAMPLING,
  WRONG,
  ClusterRow,
  Probing,
  SeedResult,
  Texts,
  report,
)

METRICS = ("euclidean", "cosine")


class Subject(NamedTuple):
  """A model, and what it is asked.

  Attributes:
    model, tokenizer: the language model.
    questions: by kind, with gold answers or judged by a file.
  """

  model: Decoder
  tokenizer: tokenizers.Tokenizer
  questions: dict[str, list[Question]]


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Measures every seed."""
  check_config(config)
  judge = Judge(config.judge)
  problems = {t: load_cot_problems(t, config.cot_problems or None) for t in config.cot_tasks}
  loaded = base_model(config.model) if config.model else None
  step = None if loaded else lm_training_step(config)
  results = []
  for seed in track(config.seeds, "seeds", console=Console(stderr=True)):
    subject = trained(config, step, seed, workdir) if step else given(config, loaded)
    results.append(measure(config, subject, judge, problems, seed, first=not results))
  judge.require_verdicts(workdir)
  return report(config, results, workdir)


def check_config(config: ConfigDict) -> None:
  """Refuses what cannot be run, before any work.

  Raises:
    UserError: a value does not fit.
  """
  if unknown := set(config.cot_tasks) - set(TASKS):
    raise UserError(f"cot_tasks={sorted(unknown)}: expected some of {', '.join(TASKS)}")
  items = config.rounds * config.per_round
  if min(config.rounds, config.text_rounds) < 2:
    raise UserError("rounds and text_rounds: expected at least two, since the first shows nothing")
  if not config.top < config.ranks or items > config.ranks:
    raise UserError(
      f"top={config.top}, rounds x per_round={items}, ranks={config.ranks}: expected top < ranks, "
      "and no more completions than ranks"
    )
  if any(items % n for n in (*config.beam_groups, *config.ablate_per_round)):
    raise UserError(
      f"beam_groups={tuple(config.beam_groups)} and "
      f"ablate_per_round={tuple(config.ablate_per_round)} must divide rounds x per_round={items}"
    )
  if not config.model and not 2 <= config.probed <= config.questions:
    raise UserError(
      f"probed={config.probed}: expected 2 to questions={config.questions}, the model's own"
    )
  if not config.seeds or not config.temperatures:
    raise UserError("expected at least one seed and one temperature")
  if config.model and config.instructions and not config.judge:
    print("no judge file: the answers will be written to be judged", file=sys.stderr)
  if config.model and not (config.instructions or config.modules):
    raise UserError("a model of your own needs instructions or modules to be asked")


def trained(config: ConfigDict, step, seed: int, workdir: pathlib.Path) -> Subject:
  """A small model of the seed's world."""
  questions, names = synthetic_questions(count=config.questions, answers=config.answers, seed=seed)
  modules = module_questions(config.modules)
  members = [name for question in modules for name in question.answers]
  lines = corpus_lines(config.domains, "train", 20 * config.held_out_lines)
  line_questions = [
    Question(line_instruction(domain), tuple(found), (1.0,) * len(found))
    for domain, found in lines.items()
  ]
  draw = functools.partial(training_lists, seed=seed)
  named = {"longest": config.longest, "mistakes": config.mistakes}
  texts = [
    *draw(
      questions,
      names,
      count=config.synthetic_lists,
      zipf_exponent=config.zipf_exponent,
      **named,
    ),
    *draw(modules, members, count=config.module_lists, **named),
  ]
  # Without the lines, whose commoner letters would leave no token for a topic or a stem.
  tokenizer = train_tokenizer(texts, config.vocab_size)
  texts += draw(
    line_questions, [], count=config.line_lists, longest=config.longest_lines, mistakes=0.0
  )
  model = train_lm(config, step, tokenizer, texts, seed=seed, workdir=workdir)
  return Subject(model, tokenizer, {"synthetic": questions[-config.probed :], "modules": modules})


def given(config: ConfigDict, loaded: BaseModel) -> Subject:
  """A model of the user's."""
  questions = {"instructions": [Question(i, ()) for i in config.instructions]}
  if config.modules:
    questions["modules"] = module_questions(config.modules)
  return Subject(loaded.model, loaded.tokenizer, {k: q for k, q in questions.items() if q})


def measure(config, subject: Subject, judge: Judge, problems, seed: int, *, first: bool):
  """All tasks of one seed; the ablations of the first only."""
  vocab = subject.model.config.vocab_size
  groups = token_groups(subject.tokenizer, vocab, merge_spaces=config.merge_spaces)
  make = functools.partial(
    Prober,
    subject.model,
    subject.tokenizer,
    prompt_batch=config.prompt_batch,
    branch_batch=config.branch_batch,
    prompt_lengths=config.prompt_lengths,
  )
  prober = make(max_new_tokens=config.max_new_tokens)
  keys = np.asarray(subject.model.head_kernel, np.float32).T
  labels = {m: key_clusters(keys, config.clusters, metric=m, seed=seed) for m in METRICS}
  # All kinds together: every program has one shape.
  questions = [q for of_kind in subject.questions.values() for q in of_kind]
  plain = probe(prober, groups, questions, Navigation(1, config.ranks, "none"))
  tokens = np.stack([p.first_tokens for p in plain])
  answers, navigated = compare_probing(config, prober, groups, questions, plain, seed, first)
  probing, clusters, shifts, begin = {}, {}, {}, 0
  for kind, of_kind in subject.questions.items():
    rows = slice(begin, begin := begin + len(of_kind))
    correct = judged(judge, of_kind, [p.answers for p in plain[rows]])
    clusters[kind] = cluster_rows(config, tokens[rows], correct, labels, seed)
    probing[kind] = {name: scored(judge, of_kind, found[rows]) for name, found in answers.items()}
    shifts[kind] = query_shift(navigated[rows], keys.T)
  main = labels["euclidean"]
  sizes = np.bincount(main)
  largest = np.argsort(-sizes)[:2]
  top = dict.fromkeys(main[tokens[0, : config.top]].tolist())
  writer = make(max_new_tokens=config.text_tokens)
  return SeedResult(
    clusters=clusters,
    browsed=browse(main, subject.tokenizer, clusters=[*top, *largest], show=12),
    probing=probing,
    shifts=shifts,
    texts=open_ended(config, writer, groups, seed) if config.domains else {},
    cot=chains(config, make, groups, problems),
    completed=prober.completed,
    hits=prober.hits,
  )


def probe(prober, groups, questions: Sequence[Question], how: Navigation) -> list[Probed]:
  prompt = lambda i, explored: list_prompt(questions[i].instruction, explored)
  return navigate(prober, prompt, len(questions), how, groups)


def judged(judge: Judge, questions, answers) -> np.ndarray:
  """bool [questions, items]."""
  return np.stack([judge.correct(q, row) for q, row in zip(questions, answers)])


def scored(judge: Judge, questions: Sequence[Question], answers: list[list[str]]) -> Probing:
  correct = judged(judge, questions, answers)
  new = [new_and_correct(row, right) for row, right in zip(answers, correct)]
  repeated = np.mean([1 - len(set(row)) / len(row) for row in answers])
  return Probing(np.stack(new), float(repeated), np.array([len(q.answers) for q in questions]))


def cluster_rows(config, tokens, correct, labels, seed: int) -> list[ClusterRow]:
  """The split under every clustering, without its largest clusters, and under shuffled labels."""
  shuffled = np.random.default_rng(seed).permutation(labels["euclidean"])
  largest = int(config.largest_share * len(shuffled))
  variants = {
    "k-means, Euclidean": (labels["euclidean"], None),
    "k-means, cosine": (labels["cosine"], None),
    "Euclidean, large clusters left out": (labels["euclidean"], largest),
    "shuffled labels": (shuffled, None),
  }
  rows = []
  for name, (of_tokens, limit) in variants.items():
    split = split_by_main_clusters(tokens, correct, of_tokens, config.top, largest=limit)
    rows.append(
      ClusterRow(name, split, inside_effect(split, resamples=config.resamples, seed=seed))
    )
  return rows


def compare_probing(config, prober, groups, questions, plain, seed: int, first: bool):
  """Answers of every method at an equal number of completions, and what ICN probed."""
  rounds, per_round = config.rounds, config.per_round
  items = rounds * per_round
  go = functools.partial(probe, prober, groups, questions)
  variants = {
    ICN: Navigation(rounds, per_round),
    ICN_FREE: Navigation(rounds, per_round, regularized=False),
    WRONG: Navigation(rounds, per_round, context="next"),
  }
  for strength in config.key_penalties:
    variants[f"explored keys subtracted, {strength:g}"] = Navigation(
      rounds, per_round, "none", key_penalty=strength
    )
  for count in config.ablate_per_round if first else ():
    variants[f"ICN, {count} a round"] = Navigation(items // count, count)
  probed = {name: go(how) for name, how in variants.items()}
  answers = {PLAIN: [p.answers[:items] for p in plain]}
  answers |= {name: [p.answers for p in found] for name, found in probed.items()}
  prompts = [list_prompt(q.instruction, []) for q in questions]
  named, key = samplings(config), jax.random.key(seed)
  sampled = sample_answers(prober, prompts, items, [*named.values()], key, config.branch_batch)
  answers |= dict(zip(named, sampled))
  for count in config.beam_groups:
    name = f"diverse beam search, {count} groups" if count > 1 else "beam search"
    answers[name] = diverse_beam_answers(
      prober, prompts, groups=count, beams=items // count, penalty=config.beam_penalty
    )
  return answers, probed[ICN]


def samplings(config: ConfigDict) -> dict[str, Sampling]:
  found = {f"{SAMPLING}, temperature {t:g}": Sampling(t) for t in config.temperatures}
  if config.top_p < 1:
    found[f"{SAMPLING}, top-p {config.top_p:g}"] = Sampling(1.0, top_p=config.top_p)
  if config.top_k:
    found[f"{SAMPLING}, top-k {config.top_k}"] = Sampling(1.0, top_k=config.top_k)
  return found


def open_ended(config: ConfigDict, writer: Prober, groups, seed: int) -> dict[str, Texts]:
  """Lines of every domain: how diverse they are, and what a classifier learns from them."""
  domains = list(config.domains)
  prompt = lambda i, explored: list_prompt(line_instruction(domains[i]), explored)
  rounds, per_round = config.text_rounds, config.text_per_round
  items = rounds * per_round
  variants = {
    PLAIN: Navigation(1, items, "none"),
    ICN: Navigation(rounds, per_round),
    ICN_FREE: Navigation(rounds, per_round, regularized=False),
  }
  found = {
    name: [p.answers for p in navigate(writer, prompt, len(domains), how, groups)]
    for name, how in variants.items()
  }
  named, prompts = samplings(config), [prompt(i, []) for i in range(len(domains))]
  sampled = sample_answers(
    writer, prompts, items, [*named.values()], jax.random.key(seed), config.branch_batch
  )
  found |= dict(zip(named, sampled))
  held_out = corpus_lines(domains, "test", config.held_out_lines)
  return {name: text_metrics(dict(zip(domains, texts)), held_out) for name, texts in found.items()}


def text_metrics(generated: dict[str, list[str]], held_out: dict[str, list[str]]) -> Texts:
  mean = lambda metric: float(np.mean([metric(texts) for texts in generated.values()]))
  return Texts(
    mean(lambda texts: distinct_n(texts, 1)),
    mean(lambda texts: distinct_n(texts, 2)),
    mean(self_bleu),
    zero_gen_accuracy(generated, held_out),
  )


def chains(config: ConfigDict, make, groups, problems) -> dict[str, dict[str, CotResult]]:
  """Self-consistency of every task, with navigation and without."""
  if not problems:
    return {}
  solver = make(max_new_tokens=config.cot_tokens, ends=WAY_ENDS)
  solve = functools.partial(self_consistency, solver, ways=config.cot_ways, groups=groups)
  return {
    task: {
      name: solve(problems=found, navigates=navigates)
      for name, navigates in ((ICN, True), (PLAIN, False))
    }
    for task, found in problems.items()
  }
