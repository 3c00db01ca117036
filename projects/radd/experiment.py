"""RADD beside SEDD and an autoregressive model: perplexity, and sampling with and without cache."""

import functools
import pathlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import tokenizers
from flax import nnx
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track
from scipy.stats import entropy

from common.data.pipelines import evaluation_windows, token_batches
from common.data.tokenizer import load_tokenizer
from common.decoding.generation import Sampling
from common.errors import UserError
from common.evaluation.perplexity import window_losses
from common.models.base import base_model
from common.models.decoder import Decoder, DecoderConfig
from common.reporting.report import Report
from projects.radd import exact, tables
from projects.radd.likelihood import bound, check_tokens, ordered_nll
from projects.radd.network import Denoiser, autoregressive, decoder_config
from projects.radd.radd import LOSSES, SCHEDULES, check_choice
from projects.radd.sampling import (
  Samples,
  all_masked,
  infilling,
  make_steps,
  random_orders,
  sample,
  sample_any_order,
)
from projects.radd.tables import AO, AR, LAMBDA, SEDD, Run, Sampled, Setting
from projects.radd.training import (
  TrainSettings,
  make_step,
  num_parameters,
  train_model,
  train_settings,
  with_start,
)

# What every model is trained with; None is next-token prediction.
TRAINING_LOSS = {LAMBDA: "lambda_dce", AO: "k_dce", SEDD: "t_dse", AR: None}


class Material(NamedTuple):
  """What every seed shares.

  Attributes:
    tokenizer: of all models.
    config: their sizes.
    windows: test windows of every source, int32 [windows, seq].
    judge: an external decoder that judges samples, or None.
    steps: the jitted training step of every model.
    settings: of training.
  """

  tokenizer: tokenizers.Tokenizer
  config: DecoderConfig
  windows: dict[str, np.ndarray]
  judge: Decoder | None
  steps: dict
  settings: TrainSettings


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Trains every model for every seed, evaluates and samples."""
  check(config)
  material = prepare(config)
  seeds = track(config.seeds, "seeds", console=Console(stderr=True))
  runs = [run_seed(config, material, seed, workdir) for seed in seeds]
  chains = run_chains(config) if config.chain_steps else []
  return tables.report(config, runs, chains, workdir)


def check(config: ConfigDict) -> None:
  """Refuses what cannot be run, before any work.

  Raises:
    UserError: a value does not fit.
  """
  check_choice("schedule", config.schedule, SCHEDULES)
  check_choice("compute_dtype", config.compute_dtype, ("float32", "bfloat16"))
  if config.hidden_size % (2 * config.num_heads):
    raise UserError(
      f"hidden_size={config.hidden_size}, num_heads={config.num_heads}: expected heads of an even "
      "width, for rotary positions"
    )
  if config.compared_steps not in config.sampling_steps or len(config.sampling_steps) < 2:
    raise UserError(
      f"compared_steps={config.compared_steps}: expected one of at least two "
      f"sampling_steps={tuple(config.sampling_steps)}"
    )
  if not config.seeds or not config.evaluation_sources or config.bound_draws < 2:
    raise UserError("expected at least one seed, one evaluation source and two bound_draws")
  if config.batch_size % config.accumulate_steps:
    raise UserError(
      f"accumulate_steps={config.accumulate_steps} must divide batch_size={config.batch_size}"
    )
  Sampling(temperature=1.0, top_p=config.top_p)


def build(config: ConfigDict, sizes: DecoderConfig, name: str, seed: int) -> nnx.Module:
  """A model before training."""
  if name == AR:
    return autoregressive(sizes, nnx.Rngs(seed))
  return Denoiser(
    sizes, dropout_rate=config.dropout, time_conditioned=name == SEDD, rngs=nnx.Rngs(seed)
  )


def prepare(config: ConfigDict) -> Material:
  tokenizer = load_tokenizer(config.tokenizer)
  vocab_size = tokenizer.get_vocab_size()
  judge = base_model(config.judge).model if config.judge else None
  if judge is not None and judge.config.vocab_size < vocab_size:
    raise UserError(
      f"judge={config.judge} has {judge.config.vocab_size} tokens and the tokenizer {vocab_size}: "
      "expected a judge with the same tokenizer"
    )
  windows = evaluation_windows(
    config.evaluation_sources, tokenizer, seq_len=config.seq_len, per_source=config.eval_windows
  )
  for tokens in windows.values():
    check_tokens(tokens, vocab_size)
  # One more position: the autoregressive model's beginning.
  sizes = decoder_config(
    vocab_size, config.hidden_size, config.num_layers, config.num_heads, config.seq_len + 1
  )
  settings = train_settings(config)
  step = lambda name, loss: make_step(
    nnx.split(build(config, sizes, name, 0))[0], loss, vocab_size, settings
  )
  steps = {name: step(name, loss) for name, loss in TRAINING_LOSS.items()}
  return Material(tokenizer, sizes, windows, judge, steps, settings)


def run_seed(config: ConfigDict, material: Material, seed: int, workdir: pathlib.Path) -> Run:
  """Trains the four models on the same batches, and measures them."""
  models = {name: train_one(config, material, name, seed, workdir) for name in TRAINING_LOSS}
  mask_token = material.config.vocab_size - 1
  key = jax.random.key(seed)
  # The same masks for all, and the one loss that bounds every model's likelihood.
  estimate = functools.partial(bound, draws=config.bound_draws)
  bounds = {
    name: {
      source: estimate(models[name], windows, key, loss="t_dse", schedule=config.schedule)
      for source, windows in material.windows.items()
    }
    for name in (LAMBDA, AO, SEDD)
  }
  autoregressive_perplexity = {
    source: window_losses(models[AR], with_start(windows, mask_token)).perplexity
    for source, windows in material.windows.items()
  }
  first = next(iter(material.windows.values()))
  keys = jax.random.split(jax.random.fold_in(key, 1), len(LOSSES))
  losses = {
    loss: estimate(models[LAMBDA], first, k, loss=loss, schedule=config.schedule)
    for loss, k in zip(LOSSES, keys)
  }
  return Run(
    parameters={name: num_parameters(model) for name, model in models.items()},
    bounds=bounds,
    autoregressive=autoregressive_perplexity,
    losses=losses,
    orders=fixed_orders(models, first, seed),
    **sampling_study(config, material, models, first, seed),
  )


def train_one(config, material: Material, name: str, seed: int, workdir) -> nnx.Module:
  batches = token_batches(
    config.train_source,
    material.tokenizer,
    split="train",
    seq_len=config.seq_len,
    batch_size=config.batch_size // jax.process_count(),
    seed=seed,
    packing="concat",
  )
  save = config.save_every or None
  return train_model(
    build(config, material.config, name, seed),
    material.steps[name],
    batches,
    material.settings,
    seed=seed,
    workdir=workdir / f"{name.replace(' ', '_')}-{seed}" if save else None,
    save_every=save,
    description=name,
  )


def fixed_orders(models, windows: np.ndarray, seed: int) -> dict[str, dict[str, float]]:
  """Perplexity of the any-order models when text is read in one fixed order."""
  length = windows.shape[1]
  forward = np.arange(length)
  orders = {
    "forward": forward,
    "backward": forward[::-1],
    "random": np.random.default_rng(seed).permutation(length),
  }
  return {
    name: {
      label: float(np.exp(ordered_nll(models[name], windows, order).mean() / length))
      for label, order in orders.items()
    }
    for name in (LAMBDA, AO)
  }


def sampling_study(config, material: Material, models, text: np.ndarray, seed: int) -> dict:
  """Samples with and without cache for every T, other samplers at one T, and an infilling."""
  mask_token = material.config.vocab_size - 1
  start = all_masked(config.samples, config.seq_len, mask_token)
  key = jax.random.fold_in(jax.random.key(seed), 2)
  plan = functools.partial(
    make_steps, schedule=config.schedule, padded_to=max(config.sampling_steps)
  )
  judge = functools.partial(judged, material.judge, models[AR], mask_token)
  warm = plan(1)
  measured = {}
  for cached in (True, False):
    sample(models[LAMBDA], start, key, warm, cached=cached)  # Compiles; every T shares it.
    for count in config.sampling_steps:
      call = functools.partial(sample, models[LAMBDA], start, key, plan(count), cached=cached)
      measured[Setting(count, cached)] = judge(call)
  count = config.compared_steps
  top_p = Sampling(temperature=1.0, top_p=config.top_p)
  order = random_orders(key, config.samples, config.seq_len)
  calls = {
    "Tweedie": functools.partial(sample, models[LAMBDA], start, key, plan(count)),
    "Euler": functools.partial(sample, models[LAMBDA], start, key, plan(count, rule="euler")),
    f"Tweedie, top-p {config.top_p}": functools.partial(
      sample, models[LAMBDA], start, key, plan(count), sampling=top_p
    ),
    "any order": functools.partial(sample_any_order, models[LAMBDA], start, key, order),
    f"{AO}, Tweedie": functools.partial(sample, models[AO], start, key, plan(count)),
    f"{SEDD}, Tweedie": functools.partial(
      sample, models[SEDD], start, key, plan(count), cached=False
    ),
  }
  for call in calls.values():
    jax.block_until_ready(call())
  samplers = {name: judge(call) for name, call in calls.items()}
  held_out = judge(lambda: Samples(text, np.zeros(len(text), np.int32)))
  # The middle half of real windows is sampled again.
  places = np.arange(config.seq_len)
  known = (places < config.seq_len // 4) | (places >= config.seq_len - config.seq_len // 4)
  chosen = np.resize(text, (config.samples, config.seq_len))
  filled = sample(models[LAMBDA], infilling(chosen, known, mask_token), key, plan(count)).tokens
  return {
    "samples": measured,
    "samplers": samplers,
    "text": held_out,
    "infilled": [
      tuple(material.tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in pair)
      for pair in zip(chosen[:3], np.asarray(filled)[:3])
    ],
    "kept": float(np.mean(np.asarray(filled)[:, known] == chosen[:, known])),
  }


def judged(judge: Decoder | None, baseline: Decoder, mask_token: int, call) -> Sampled:
  """Runs a sampler and has the text judged.

  An external judge predicts all tokens but the first, as in the paper; the baseline all.
  """
  begin = time.perf_counter()
  samples = jax.block_until_ready(call())
  seconds = time.perf_counter() - begin
  tokens = np.asarray(samples.tokens)
  if judge is None:
    perplexity = window_losses(baseline, with_start(tokens, mask_token)).perplexity
  else:
    perplexity = window_losses(judge, tokens).perplexity
  unigrams = float(entropy(np.bincount(tokens.ravel(), minlength=mask_token)))
  return Sampled(tokens, np.asarray(samples.calls), seconds, perplexity, unigrams)


def run_chains(config: ConfigDict) -> list[tables.Chain]:
  """Trains on a Markov chain of known conditionals; the bound without Monte-Carlo error."""
  vocab_size, length = config.chain_vocab, config.chain_length
  sizes = decoder_config(vocab_size, config.chain_hidden, 1, 2, length)
  settings = TrainSettings(
    num_steps=config.chain_steps,
    learning_rate=config.learning_rate,
    warmup_steps=config.chain_steps // 10,
  )
  model = lambda seed: Denoiser(sizes, rngs=nnx.Rngs(seed))
  step = make_step(nnx.split(model(0))[0], "lambda_dce", vocab_size, settings)
  z = exact.partly_masked(vocab_size, length)
  chains = []
  for seed in config.seeds:
    rng = np.random.default_rng(seed)
    p = exact.markov_chain(vocab_size, length, rng)
    batches = chain_batches(p, config.chain_batch, rng)
    trained = train_model(model(seed), step, batches, settings, seed=seed)
    untrained, learned = (
      exact.expected_bound(p, np.asarray(log_c_of(*nnx.split(m), z), np.float64))
      for m in (model(seed), trained)
    )
    chains.append(tables.Chain(exact.entropy(p), untrained, learned))
  return chains


def chain_batches(p: np.ndarray, batch: int, rng: np.random.Generator) -> Iterator[dict]:
  """Sequences drawn from p."""
  while True:
    drawn = rng.choice(p.size, size=batch, p=p.ravel() / p.sum())
    yield {"tokens": np.stack(np.unravel_index(drawn, p.shape), axis=1).astype(np.int32)}


log_c_of = jax.jit(lambda graphdef, state, z: nnx.merge(graphdef, state)(z), static_argnums=0)
