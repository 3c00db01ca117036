"""Every method, width and seed on the digits, from one teacher."""

import concurrent.futures
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from common.models.vit import VisionTransformer
from common.reporting.measurements import Measurements
from projects.ofq import digits
from projects.ofq.methods import CGA, DAMPENING, FREEZING, METHODS, training_settings
from projects.ofq.ofq import QATSettings, calibrate, quantize

HISTOGRAM_BINS = 25


class Run(NamedTuple):
  """One method, bits and seed. Epochs are those of training and of annealing.

  Attributes:
    accuracy: on the test images after each of the last epochs, [annealing epochs].
    oscillating: {path: share of its weights that oscillate after each epoch [epochs]}.
    scales: {path: mean scale of its channels [epochs]}.
    sizes: {path: number of weights}.
    histogram: see `threshold_histogram`.
    near_threshold: share of weights within 0.005 of a threshold.
    params: nested dict, of the quantized model after the last epoch.
  """

  accuracy: np.ndarray
  oscillating: dict[str, np.ndarray]
  scales: dict[str, np.ndarray]
  sizes: dict[str, int]
  histogram: np.ndarray
  near_threshold: float
  params: dict

  def oscillating_share(self, of: tuple[str, ...] = ("",)) -> np.ndarray:
    """Share of the weights that oscillate, over the layers whose path ends so, [epochs]."""
    paths = [path for path in self.sizes if path.endswith(of)]
    total = sum(self.sizes[path] for path in paths)
    return sum(self.sizes[path] * self.oscillating[path] for path in paths) / total


class Teacher(NamedTuple):
  """The data, the full-precision model and its accuracy."""

  data: digits.Digits
  model: VisionTransformer
  accuracy: float


def pretrain(config: ConfigDict, measurements: Measurements) -> Teacher:
  """The full-precision model that every run starts from and learns from."""
  data = digits.load(0)
  vit = digits.vit_config(
    config.hidden_size, config.num_layers, config.num_heads, config.patch_size
  )

  def train():
    model, accuracy = digits.pretrain(
      vit,
      data,
      0,
      epochs=config.pretraining_epochs,
      batch_size=config.batch_size,
      learning_rate=config.pretraining_learning_rate,
    )
    return nnx.to_pure_dict(nnx.state(model)), accuracy

  trained, accuracy = measurements.get("full precision", train)
  graphdef, params = nnx.split(nnx.eval_shape(lambda: VisionTransformer(vit, rngs=nnx.Rngs(0))))
  nnx.replace_by_pure_dict(params, jax.device_put(trained))
  return Teacher(data, nnx.merge(graphdef, params), accuracy)


def trained_model(
  config: ConfigDict, teacher: Teacher, settings: QATSettings, run: Run
) -> VisionTransformer:
  """The model that a run ended with; `settings` are its quantizers'."""
  graphdef, params = nnx.split(start_model(config, teacher, settings))
  nnx.replace_by_pure_dict(params, run.params)
  return nnx.merge(graphdef, params)


def start_model(config: ConfigDict, teacher: Teacher, settings: QATSettings) -> VisionTransformer:
  """The teacher with quantizers, calibrated on a batch of images."""
  model = quantize(teacher.model, settings)
  calibrate(model, teacher.data.shifted[4, : config.batch_size])
  return model


def train_all(
  config: ConfigDict, teacher: Teacher, work, measurements: Measurements
) -> dict[tuple, dict[str, Run]]:
  """{(methods, bits, seed): what `train_methods` gives} of the jobs, in their order.

  Steps this small, and the compiler, leave a core idle: two threads. The jobs of one program go to
  one of them, so that it is compiled once.
  """
  programs: dict[tuple, list] = {}
  for methods, bits, seed in work:
    programs.setdefault((bits, *METHODS[methods[0]].items()), []).append((methods, bits, seed))
  # The longest first: the threads end at about the same time.
  longest_first = sorted(programs.values(), key=len, reverse=True)
  train = functools.partial(train_program, config, teacher, measurements)
  with concurrent.futures.ThreadPoolExecutor(2) as threads:
    done = threads.map(train, longest_first)
    done = track(done, "training", len(programs), console=Console(stderr=True))
    found = {job: of_job for of_jobs in done for job, of_job in of_jobs.items()}
  return {job: found[job] for job in work}


def train_program(
  config: ConfigDict, teacher: Teacher, measurements: Measurements, jobs
) -> dict[tuple, dict[str, Run]]:
  """As `train_all`, for jobs (methods, bits, seed) that quantize the same way."""
  methods, bits, _ = jobs[0]
  settings = QATSettings(weight_bits=bits, activation_bits=bits, **METHODS[methods[0]])
  start = functools.cache(lambda: start_model(config, teacher, settings))
  dampens = any(DAMPENING in methods for methods, _, _ in jobs)

  def train(methods: tuple[str, ...], seed: int) -> dict[str, Run]:
    strength = jnp.float32(config.dampening if DAMPENING in methods else 0.0)
    return train_methods(
      config,
      teacher,
      start(),
      methods=methods,
      dampening=strength if dampens else None,
      seed=seed,
    )

  found = {}
  for job in jobs:
    methods, _, seed = job
    name = f"{', '.join(methods)}, {bits} bits, seed {seed}"
    found[job] = measurements.get(name, functools.partial(train, methods, seed))
  return found


def train_methods(
  config: ConfigDict,
  teacher: Teacher,
  model: VisionTransformer,
  *,
  methods: tuple[str, ...],
  dampening: jax.Array | None,
  seed: int,
) -> dict[str, Run]:
  """Quantization-aware training, then each method's last epochs from the state it gave.

  Args:
    config, teacher: of the experiment.
    model: quantized and calibrated, for all seeds.
    methods: they have their training but for the last epochs in common.
    dampening: final weight of the dampening loss, float32 [], or None without it.
    seed: of the order of images and shifts.
  """
  graphdef, params = nnx.split(model)
  teacher_graphdef, teacher_params = nnx.split(teacher.model)
  data = teacher.data
  options = training_settings(config, methods[0], len(data.labels) // config.batch_size)
  epoch, optimizer = digits.make_epoch(graphdef, teacher_graphdef, options, config.batch_size)
  state = digits.start_training(params, optimizer, jax.random.key(seed))
  if methods[0] == FREEZING:
    state = dataclasses.replace(
      state, opt_state=optax.tree.set(state.opt_state, freezing=jnp.array(True))
    )

  def epochs(epoch, state, count, evaluates=False):
    metrics, accuracy = [], []
    for _ in range(count):
      state, metric = epoch(state, data, teacher_params, dampening)
      metrics.append(metric)
      if evaluates:
        accuracy.append(digits.evaluate(graphdef, state.params, data)[1])
    return state, metrics, accuracy

  trunk, before, _ = epochs(epoch, state, config.epochs)
  runs = {}
  for method in methods:
    # What oscillates is counted anew: flips from before the last epochs must not count in them.
    start = dataclasses.replace(trunk, opt_state=forget_oscillation(trunk.opt_state))
    tail = epoch
    if method == CGA:
      start = dataclasses.replace(
        start, opt_state=optax.tree.set(start.opt_state, annealing=jnp.array(True))
      )
      if config.cga_qk == "mask":
        tail = masked_product_epoch(config, graphdef, trunk.params, teacher_graphdef, options)
    state, after, accuracy = epochs(tail, start, config.annealing_epochs, evaluates=True)
    histogram, near = digits.threshold_histogram(graphdef, state.params, HISTOGRAM_BINS)
    sizes = {path: o.codes.size for path, o in state.opt_state.oscillation.items()}
    stacked = jax.tree.map(lambda *x: np.asarray(x), *jax.device_get(before + after))
    runs[method] = Run(
      np.array(jax.device_get(accuracy)), stacked.oscillating, stacked.scales, sizes, np.asarray(histogram),
      float(near), nnx.to_pure_dict(state.params),
    )  # fmt: skip
  return runs


def masked_product_epoch(config, graphdef, params, teacher_graphdef, options):
  """The epoch in which annealing masks the gradient of W_Q W_K^T as well (cga_qk="mask")."""
  model = nnx.merge(graphdef, params)
  model.set_attributes(boundary_range=config.boundary_range)
  return digits.make_epoch(nnx.split(model)[0], teacher_graphdef, options, config.batch_size)[0]


@jax.jit
def forget_oscillation(opt_state):
  """The tracker's state with frequencies of 0."""
  zero = lambda o: o._replace(frequency=jnp.zeros_like(o.frequency))
  return opt_state._replace(oscillation={p: zero(o) for p, o in opt_state.oscillation.items()})
