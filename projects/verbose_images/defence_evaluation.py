"""Defences against images that do not know of them: calibrated on clean images, then measured."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from sklearn.linear_model import Ridge

from projects.verbose_images.defences import (
  Detection,
  detection,
  graceful_lengths,
  monitored_lengths,
  transform,
)
from projects.verbose_images.generation import EosBias
from projects.verbose_images.measures import (
  Measured,
  Protocol,
  caption_means,
  effective_rank,
  mean_of_first,
  measure,
)
from projects.verbose_images.outcomes import Defended, Found
from projects.verbose_images.victims import Victim, attributes_of


class Calibration(NamedTuple):
  """From clean images: expected length by Ridge over the prefix, and limits.

  Attributes:
    ridge: of the mean length of an image's captions.
    low, high: of the expected lengths that are believed.
    sigma: standard deviation of one caption around it.
    entropy_limit: 99th percentile of the largest window mean of a caption.
  """

  ridge: Ridge
  low: float
  high: float
  sigma: float
  entropy_limit: float


def prefix_features(victim: Victim, images: np.ndarray) -> np.ndarray:
  """The prefix of each image as one vector, [images, features]."""
  starts = range(0, len(images), victim.batch)
  parts = [victim.model.encode(jnp.asarray(images[i : i + victim.batch]))[0] for i in starts]
  return np.concatenate([np.asarray(p).reshape(len(p), -1) for p in parts])


def calibrate(config: ConfigDict, victim: Victim, protocol: Protocol) -> Calibration:
  """Expected lengths and limits, from clean images that nothing else uses."""
  images = victim.calibration.pixels
  measured = measure(victim, images, protocol)
  features = prefix_features(victim, images)
  # As strong as there are features: there are fewer images than these.
  ridge = Ridge(alpha=float(features.shape[1])).fit(features, measured.length)
  expected = ridge.predict(features)
  residual = measured.captions.lengths - expected[:, None]
  window = config.monitor_window
  entropy = measured.captions.entropy
  means = np.lib.stride_tricks.sliding_window_view(entropy, window, axis=-1).mean(axis=-1)
  return Calibration(
    ridge=ridge,
    low=float(measured.length.min()),
    high=float(measured.length.max()),
    sigma=float(residual.std()),
    entropy_limit=float(np.quantile(means.max(axis=-1), 0.99)),
  )


def run_defences(
  config: ConfigDict, victim: Victim, protocol: Protocol, verbose: Found, clean: Measured
) -> dict[str, Defended]:
  """Every defence on verbose images that do not know of it, and on the clean ones."""
  attributes = attributes_of(victim.clean)

  def defended(**defence) -> Defended:
    attacked = measure(victim, verbose.images, protocol, **defence)
    harmed = measure(victim, victim.clean.pixels, protocol, attributes=attributes, **defence)
    return Defended(attacked.length, harmed.length, accuracy_loss(clean, harmed))

  results = {
    name: defended(transform=transform(name, strength)) for name, strength in config.transforms
  }
  limits = calibrate(config, victim, protocol)
  start = (limits.low + limits.high) / 2 + limits.sigma
  results["EOS bias schedule"] = defended(bias=EosBias(config.eos_slope, start))

  def cut(lengths_of) -> Defended:
    """A defence that cuts captions: what is left of attacked and clean ones."""
    attacked = lengths_of(victim.images.pixels.shape, verbose.images, verbose.measured)
    kept = lengths_of(victim.clean.pixels.shape, victim.clean.pixels, clean)
    shortened = clean.captions._replace(lengths=kept)
    quality = caption_means(shortened, attributes)
    loss = None if quality is None else clean.quality.accuracy - quality.accuracy
    return Defended(attacked.mean(axis=1), kept.mean(axis=1), loss)

  def budgeted(shape, images, measured: Measured):
    expected = np.clip(
      limits.ridge.predict(prefix_features(victim, images)), limits.low, limits.high
    )
    budget = np.ceil(expected + config.budget_deviations * limits.sigma).astype(int)
    rows = np.repeat(np.minimum(budget, config.cap), config.samples)
    tokens = measured.captions.tokens.reshape(len(rows), -1)
    lengths = measured.captions.lengths.ravel()
    return graceful_lengths(tokens, lengths, rows, victim.separator).reshape(shape[0], -1)

  def monitored(shape, images, measured: Measured):
    captions = measured.captions
    flat = lambda x: x.reshape(shape[0] * config.samples, -1)
    return monitored_lengths(
      flat(captions.tokens),
      captions.lengths.ravel(),
      flat(captions.entropy),
      entropy_limit=limits.entropy_limit,
      window=config.monitor_window,
      ngram=config.monitor_ngram,
      repeats=config.monitor_repeats,
    ).reshape(shape[0], -1)

  results["token budget"] = cut(budgeted)
  results["repetition and entropy monitor"] = cut(monitored)
  return results


def accuracy_loss(clean: Measured, harmed: Measured) -> float | None:
  if clean.quality is None:
    return None
  return clean.quality.accuracy - harmed.quality.accuracy


def run_detectors(
  config: ConfigDict, victim: Victim, verbose: Found, clean: Measured
) -> dict[str, Detection]:
  """Scores of captions of verbose images that reached the cap, against those of clean images."""
  capped = verbose.measured.capped
  if not capped.any():
    return {}
  results = {}
  spans = ((config.detector_tokens, f"first {config.detector_tokens} tokens"),)
  for first, span in (*spans, (config.cap, "whole caption")):
    scores = {}
    for name, field in (("perplexity", "surprise"), ("entropy", "entropy")):
      scores[name] = tuple(
        mean_of_first(getattr(m.captions, field), m.captions.steps, first)
        for m in (verbose.measured, clean)
      )
    scores["effective rank"] = (
      effective_rank(victim, verbose.images, verbose.measured, first),
      effective_rank(victim, victim.clean.pixels, clean, first),
    )
    for name, (attacked, normal) in scores.items():
      results[f"{name}, {span}"] = detection(normal.ravel(), attacked[capped])
  return results
