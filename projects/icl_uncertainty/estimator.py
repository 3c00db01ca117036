"""The Transformer on NumPy arrays: a context of labelled points, the mean and sd of new ones."""

import dataclasses
import functools
import hashlib
import json

import jax
import numpy as np
from flax import nnx

from common.checkpoints.orbax import load_params, save_params
from common.errors import UserError
from common.paths import cache_dir
from projects.icl_uncertainty import config as configs
from projects.icl_uncertainty.experiment import distribution, fit, models, predict
from projects.icl_uncertainty.icl_uncertainty import init_states
from projects.icl_uncertainty.tables import FRESH, META


class InContextRegressor:
  """A Transformer trained on random linear regressions; a context replaces fitting.

  It knows the tasks it was trained on: y = w'x + noise without an intercept, w ~ N(0, I), x about
  standard normal, the noise's sd within [noise_low, noise_high] of the config.

  Args:
    config: of `config.get_config`; by default the default preset's. `dim` and `length` say how
      many covariates and labels a prompt has.
    meta_trained: train on covariates of many scales.

  The trained model is kept in FLAXWORKS_CACHE: only the first call trains.
  """

  def __init__(self, config=None, *, meta_trained: bool = False):
    config = configs.get_config() if config is None else config.copy_and_resolve_references()
    config.seeds = 1
    self._config, self._name = config, META if meta_trained else FRESH

  def fit(self) -> "InContextRegressor":
    """Trains the model, or loads it when it was trained before."""
    model = models(self._config)[self._name]
    prompts = distribution(self._config, 0, **model.prompts)
    settings = [dataclasses.asdict(part) for part in (model.architecture, model.training)]
    settings += [model.prompts, self._config.seed, type(prompts.noise).__name__]
    settings += [np.asarray(leaf).tolist() for leaf in prompts.noise]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    path = cache_dir("icl_uncertainty") / digest
    if not path.exists():
      trained = fit(self._config, {self._name: model})[self._name]
      save_params(path, nnx.to_pure_dict(trained), {"settings": settings})
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    states = jax.eval_shape(
      functools.partial(init_states, model.architecture, model.training), keys
    )
    pure, _ = load_params(path, nnx.to_pure_dict(states.params))
    nnx.replace_by_pure_dict(states.params, pure)
    self._params = states.params
    self._architecture = model.architecture
    return self

  def predict(
    self, x_context: np.ndarray, y_context: np.ndarray, x_query: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sd of the labels of new points, each asked by itself after the same context.

    Args:
      x_context: [n, d], n < T, in an order that the model sees; n = 0 asks the prior.
      y_context: [n].
      x_query: [m, d].

    Returns:
      mean [m] and sd [m] of the label, noise included; float32.

    Raises:
      UserError: `fit` was not called, shapes do not fit, values are not finite, or the context is
        longer than the training's.
    """
    if not hasattr(self, "_params"):
      raise UserError("the model is not trained: call fit() first")
    x, y, query = (np.asarray(a, np.float32) for a in (x_context, y_context, x_query))
    dim, length = self._config.dim, self._config.length
    if x.ndim != 2 or y.shape != x.shape[:1] or query.ndim != 2:
      raise UserError(
        "expected x_context [n, d], y_context [n] and x_query [m, d], got "
        f"{list(x.shape)}, {list(y.shape)} and {list(query.shape)}"
      )
    if x.shape[1] != dim or query.shape[1] != dim:
      raise UserError(
        f"the model has {dim} covariates, got {x.shape[1]} in the context and {query.shape[1]} in "
        "the query; set dim in the config and fit again"
      )
    if len(x) >= length:
      raise UserError(
        f"the context has {len(x)} labels, but the model was trained on fewer than {length}; "
        "leave some out, or set length in the config and fit again"
      )
    if not all(np.isfinite(a).all() for a in (x, y, query)):
      raise UserError("missing or infinite values: leave those rows out")
    # Every query ends its own prompt; what follows it is not seen.
    prompts = np.zeros((1, len(query), length, dim), np.float32)
    prompts[:, :, : len(x)], prompts[:, :, len(x)] = x, query
    labels = np.zeros(prompts.shape[:-1], np.float32)
    labels[:, :, : len(y)] = y
    mean, sd = predict(self._architecture, self._params, prompts, labels)
    return np.asarray(mean)[0, :, len(x)], np.asarray(sd)[0, :, len(x)]
