"""Verbose images beside their baselines, ablations and defences: what is measured, and in which order."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from common.decoding.generation import Sampling
from common.errors import UserError
from common.reporting.report import Report
from projects.verbose_images import tables
from projects.verbose_images.attack import Attacked, Budget, attack, random_noise
from projects.verbose_images.defence_evaluation import accuracy_loss, run_defences, run_detectors
from projects.verbose_images.defences import NO_TRANSFORM, TRANSFORMS, Transform, transform
from projects.verbose_images.generation import beam_captions
from projects.verbose_images.measures import Protocol, measure
from projects.verbose_images.outcomes import (
  FULL,
  METHODS,
  PAIRS,
  Ablations,
  Defended,
  Found,
  SeedRun,
)
from projects.verbose_images.training import HardeningSettings, fit, hardening_step
from projects.verbose_images.verbose_images import VERBOSE, Objective
from projects.verbose_images.victims import (
  Victim,
  attributes_of,
  folder_files,
  training_settings,
  victims,
)


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Trains or loads the victims, attacks and defends them."""
  check(config)
  models = victims(config)
  console = Console(stderr=True)
  runs = [
    run_seed(config, victim, seed)
    for victim, seed in zip(track(models, "attacks", console=console), config.seeds)
  ]
  ablations = run_ablations(config, models[0], runs[0])
  transfer = run_transfer(config, models, runs)
  adaptive = run_adaptive(config, models[0], runs[0])
  return tables.report(config, runs, ablations, transfer, adaptive, workdir)


def check(config: ConfigDict) -> None:
  """Refuses what cannot be run, before any work.

  Raises:
    UserError: a value does not fit.
  """
  positive = ("images", "clean_images", "batch_images", "iterations", "samples", "cap", "eps")
  for name in (*positive, "step_size", "detector_tokens", "resamples"):
    if config[name] <= 0:
      raise UserError(f"{name}={config[name]} must be positive")
  for name in ("images", "clean_images"):
    if config[name] % config.batch_images:
      raise UserError(
        f"{name}={config[name]}: expected a multiple of batch_images={config.batch_images}"
      )
  for name in ("eps", "ablate_eps"):
    values = (config[name],) if name == "eps" else config[name]
    if not all(0 < value <= 255 for value in values):
      raise UserError(f"{name}={config[name]}: expected pixels of 255, more than 0")
  if config.variant not in ("paper", "code"):
    raise UserError(f"variant={config.variant!r}: expected paper or code")
  if not config.seeds or (config.data != "digits" and len(config.seeds) > 1):
    raise UserError(f"seeds={config.seeds}: expected at least one, and one only of a loaded model")
  for name, strength in config.transforms:
    if name not in TRANSFORMS or strength < 0:
      raise UserError(
        f"transforms: {name!r} with strength {strength}: expected one of {', '.join(TRANSFORMS)} and a "
        "strength of at least 0"
      )
  unknown = set(config.adaptive_transforms) - {name for name, _ in config.transforms}
  if unknown:
    raise UserError(f"adaptive_transforms: {', '.join(unknown)} is not among the transforms")
  window = max(config.monitor_window, config.monitor_ngram)
  if not 0 < window <= config.cap:
    raise UserError(f"monitor_window and monitor_ngram: expected 1 to cap={config.cap}")
  Sampling(temperature=config.temperature, top_p=config.top_p)
  if config.data == "digits":
    held_out = 397
    if config.images + 2 * config.clean_images > held_out:
      raise UserError(
        f"images + 2 clean_images = {config.images + 2 * config.clean_images}: there are {held_out} "
        "held-out digits"
      )
    if config.image_size % config.patch_size or config.image_size % 8:
      raise UserError(
        f"image_size={config.image_size}: expected a multiple of 8 and of patch_size="
        f"{config.patch_size}"
      )
    training_settings(config).optimizer()
  else:
    folder_files(config.data, config.images + 2 * config.clean_images)


def width_of(config: ConfigDict) -> int:
  """Tokens that arrays have room for: one program serves all caps."""
  return max((config.cap, *config.ablate_cap))


def protocol_of(config: ConfigDict, **changes) -> Protocol:
  """How everything is measured; keys are the same for all conditions."""
  protocol = Protocol(
    key=jax.random.key(1000),
    samples=config.samples,
    sampling=Sampling(temperature=config.temperature, top_p=config.top_p),
    cap=config.cap,
    width=width_of(config),
  )
  return protocol._replace(**changes)


def attack_images(
  config: ConfigDict,
  victim: Victim,
  objective: Objective,
  *,
  eps: float | None = None,
  cap: int | None = None,
  through: Transform = NO_TRANSFORM,
) -> Found:
  """Attacks all images, in batches, and measures what is selected with fresh keys.

  Args:
    config: the setting.
    victim: the model and its images.
    objective: of the attack.
    eps: in pixels of 255, cap: in tokens; the config's by default.
    through: a defence between attack and model, in the attack and in the measurement.
  """
  cap = cap or config.cap
  budget = Budget(
    eps=jnp.float32((eps or config.eps) / 255),
    step_size=jnp.float32(config.step_size / 255),
    cap=jnp.int32(cap),
  )
  parts: list[Attacked] = []
  for start in range(0, len(victim.images.pixels), victim.batch):
    part = attack(
      victim.model,
      jnp.asarray(victim.images.pixels[start : start + victim.batch]),
      jax.random.key(start),
      jax.tree.map(jnp.float32, objective),
      budget,
      width=width_of(config),
      iterations=config.iterations,
      samples=config.samples,
      sampling=Sampling(temperature=config.temperature, top_p=config.top_p),
      transform=Transform(jnp.int32(through.index), jnp.float32(through.strength)),
      variant=config.variant,
    )
    parts.append(jax.tree.map(np.asarray, part))
  images = np.concatenate([p.images for p in parts])
  best = [np.maximum(np.maximum.accumulate(p.lengths), p.clean_length) for p in parts]
  return Found(
    images=images,
    selected=np.concatenate([p.length for p in parts]),
    history=np.concatenate(best, axis=1),
    measured=measure(
      victim,
      images,
      protocol_of(config, cap=cap),
      attributes=attributes_of(victim.images),
      transform=through,
    ),
  )


def run_seed(config: ConfigDict, victim: Victim, seed: int) -> SeedRun:
  """The main table of a seed, and its defences."""
  protocol = protocol_of(config)
  attributes = attributes_of(victim.images)
  originals = victim.images.pixels
  noise_images = np.asarray(
    random_noise(jnp.asarray(originals), jax.random.key(seed), config.eps / 255)
  )
  # The first call compiles: it is not timed.
  measure(victim, originals, protocol)
  look = lambda images: measure(victim, images, protocol, attributes=attributes)
  methods = METHODS if config.ablate_losses else {FULL: VERBOSE}
  found = {name: attack_images(config, victim, objective) for name, objective in methods.items()}
  clean_attributes = attributes_of(victim.clean)
  clean = measure(victim, victim.clean.pixels, protocol, attributes=clean_attributes)
  greedy = protocol._replace(sampling=Sampling())
  verbose = found[FULL]
  defences = run_defences(config, victim, protocol, verbose, clean)
  return SeedRun(
    original=look(originals),
    noise=look(noise_images),
    clean=clean,
    clean_greedy=measure(victim, victim.clean.pixels, greedy, attributes=clean_attributes),
    found=found,
    noise_images=noise_images,
    images=originals,
    decodings=run_decodings(config, victim, verbose.images),
    defences=defences,
    detectors=run_detectors(config, victim, verbose, clean),
  )


def run_decodings(config: ConfigDict, victim: Victim, verbose: np.ndarray) -> dict:
  """Lengths [images] of originals and verbose images under other decoding methods."""
  samplings = {
    "greedy": Sampling(),
    f"top-k {config.top_k}": Sampling(temperature=1.0, top_k=config.top_k),
    f"nucleus {config.top_p}": Sampling(temperature=1.0, top_p=config.top_p),
  }
  both = victim.images.pixels, verbose
  lengths = {
    name: tuple(
      measure(victim, images, protocol_of(config, sampling=sampling)).length for images in both
    )
    for name, sampling in samplings.items()
  }
  if config.num_beams:
    options = {"max_new_tokens": config.cap, "num_beams": config.num_beams}

    def beam_lengths(images):
      starts = range(0, len(images), victim.batch)
      parts = [beam_captions(victim.model, images[i : i + victim.batch], **options) for i in starts]
      return np.array([len(h.tokens) for part in parts for h in part], float)

    lengths[f"beam {config.num_beams}"] = tuple(map(beam_lengths, both))
  return lengths


def run_ablations(config: ConfigDict, victim: Victim, run: SeedRun) -> Ablations:
  pairs = PAIRS if config.ablate_losses else {}
  main = run.found[FULL]
  eps = {e: attack_images(config, victim, VERBOSE, eps=e) for e in config.ablate_eps}
  cap = {c: attack_images(config, victim, VERBOSE, cap=c) for c in config.ablate_cap}
  return Ablations(
    losses={name: attack_images(config, victim, objective) for name, objective in pairs.items()},
    eps=dict(sorted({**eps, config.eps: main}.items())),
    cap=dict(sorted({**cap, config.cap: main}.items())),
  )


def run_transfer(config: ConfigDict, models: list[Victim], runs: list[SeedRun]) -> list[tuple]:
  """(from, to, original, verbose): lengths [images] of model `to` on images made for `from`."""
  pairs = [(i, (i + 1) % len(models)) for i in range(len(models))] if len(models) > 1 else []
  look = lambda model, images: measure(model, images, protocol_of(config)).length
  return [
    (config.seeds[i], config.seeds[j], look(models[j], runs[i].images))
    + (look(models[j], runs[i].found[FULL].images),)
    for i, j in pairs
  ]


def run_adaptive(config: ConfigDict, victim: Victim, run: SeedRun) -> dict[str, Defended]:
  """The attack again, through the defence, on the first seed."""
  strengths = dict(config.transforms)
  results = {}
  for name in config.adaptive_transforms:
    through = transform(name, strengths[name])
    found = attack_images(config, victim, VERBOSE, through=through)
    unaware = run.defences[name]
    results[name] = unaware._replace(attacked=found.measured.length)
  if not config.hardening_steps or victim.training is None:
    return results
  settings = dataclasses.replace(
    training_settings(config),
    num_steps=config.hardening_steps,
    learning_rate=config.hardening_learning_rate,
  )
  hardening = HardeningSettings(
    eps=config.eps / 255,
    inner_steps=config.hardening_inner_steps,
    eos_weight=config.hardening_eos_weight,
  )
  step = hardening_step(nnx.split(victim.model)[0], settings, hardening)
  model = fit(
    victim.model, step, victim.training, settings, seed=config.seeds[0], description="hardening"
  )
  hardened = victim._replace(model=model)
  clean = measure(
    hardened, victim.clean.pixels, protocol_of(config), attributes=attributes_of(victim.clean)
  )
  found = attack_images(config, hardened, VERBOSE)
  results["adversarial fine-tuning"] = Defended(
    found.measured.length, clean.length, accuracy_loss(run.clean, clean)
  )
  return results
