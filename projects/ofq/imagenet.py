"""The paper's own run: a ViT, DeiT or Swin checkpoint, images in folders or a TFDS set."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.data.augmentation import RepeatedAugmentation
from common.data.images import Preprocessing, augment, load_preprocessing
from common.errors import UserError
from common.evaluation.image_classification import accuracy, open_classifier
from common.models.sharding import batch_sharding
from common.models.swin import Swin, SwinConfig
from common.models.vit import VisionTransformer, VisionTransformerConfig
from common.reporting.report import Column, Report, Table
from common.training.loop import train
from common.training.mesh import make_mesh
from common.training.train_step import init_train_state
from projects.ofq.integer_model import exportable, save_integer, to_integer
from projects.ofq.methods import CGA, DAMPENING, FREEZING, METHODS, training_settings
from projects.ofq.ofq import QATSettings, calibrate, quantize
from projects.ofq.oscillation import oscillating_share
from projects.ofq.training import TrainingSettings, dampening_weight, make_qat_step


def training_batches(
  images, config: ConfigDict, size: tuple[int, int], preprocessing: Preprocessing, seed: int
):
  """Endless shuffled batches of this process's share of the images."""
  mine = grain.MapDataset.source(images).seed(seed).shuffle()
  mine = mine[jax.process_index() :: jax.process_count()]
  mine = RepeatedAugmentation(mine, config.repeated_augmentation).repeat()
  mine = mine.random_map(
    functools.partial(
      augment,
      size=size,
      preprocessing=preprocessing,
      magnitude=config.rand_augment,
      random_erasing=config.random_erasing,
    )
  )
  rows = config.batch_size // jax.process_count()
  # Images are read ahead, two batches of them: Grain's own buffer would hold 500 batches.
  ahead = grain.ReadOptions(num_threads=16, prefetch_buffer_size=max(16, 2 * rows))
  return iter(mine.to_iter_dataset(ahead).batch(rows, drop_remainder=True))


def train_method(
  model: VisionTransformer | Swin,
  batches: Iterator[Mapping[str, np.ndarray]],
  settings: QATSettings,
  options: TrainingSettings,
  config: ConfigDict,
  *,
  anneals: bool,
  freezes: bool,
  dampening: float,
  annealing_steps: int,
  seed: int,
  workdir: pathlib.Path,
):
  """Quantization-aware training and the last epochs, over all devices; resumes in `workdir`.

  Returns:
    (the trained model, share of weights that oscillate).
  """
  quantized = quantize(model, settings)
  calibrate(quantized, jnp.asarray(next(batches)["images"]))
  graphdef, params = nnx.split(quantized)
  teacher_graphdef, teacher_params = nnx.split(model)
  mesh = make_mesh({"data": -1})
  everywhere = NamedSharding(mesh, PartitionSpec())
  params, teacher_params = jax.device_put((params, teacher_params), everywhere)

  def make(graphdef):
    step_fn, optimizer = make_qat_step(
      graphdef, teacher_graphdef, options, accumulate_steps=config.microbatches
    )

    def step(state, batch):
      weight = dampening_weight(state.step, dampening, options.num_steps)
      return step_fn(state, batch, teacher_params, weight)

    return step, optimizer

  step, optimizer = make(graphdef)
  # One program; the state of every parameter is otherwise made by programs of its own.
  init = jax.jit(init_train_state, static_argnums=1, out_shardings=everywhere)
  state = init(params, optimizer, jax.random.key(seed))
  switch = lambda state, **flags: dataclasses.replace(
    state, opt_state=optax.tree.set(state.opt_state, **flags)
  )
  flag = lambda: jax.device_put(jnp.array(True), everywhere)
  if freezes:
    state = switch(state, freezing=flag())
  run = functools.partial(
    train, save_every=1000, batch_sharding=batch_sharding(mesh), unit="images"
  )
  with jax.set_mesh(mesh):
    last = options.num_steps
    state = run(state, step, batches, num_steps=last, workdir=workdir / "training")
    if anneals:
      state = switch(state, annealing=flag())
      if config.cga_qk == "mask":
        quantized.set_attributes(boundary_range=options.boundary_range)
        step, _ = make(nnx.split(quantized)[0])
    last += annealing_steps
    state = run(state, step, batches, num_steps=last, workdir=workdir / "annealing")
  share = float(oscillating_share(state.opt_state.oscillation))
  return nnx.merge(graphdef, state.params), share


def slug(method: str) -> str:
  """A method's name in names of files."""
  return method.lower().replace(" + ", "-").replace(" ", "-")


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Trains the config's methods from a checkpoint and reports top-1 and oscillation.

  Args:
    config: see `config.py`.
    workdir: checkpoints go there, and METHOD-SEED.safetensors, the models with integer products;
      the same command resumes.

  Raises:
    UserError: the model or the data is not there, or they do not belong together.
  """
  checkpoint, train_images, test_images = open_classifier(
    config.model,
    config.data,
    (VisionTransformerConfig, SwinConfig),
    "ViT, DeiT or Swin",
    flag="model",
  )
  size, preprocessing = checkpoint.config.image_size, load_preprocessing(config.model)
  devices = jax.device_count() * config.microbatches
  if config.batch_size % devices or config.batch_size > len(train_images):
    raise UserError(
      f"batch_size={config.batch_size} must be a multiple of devices x microbatches = {devices}, "
      f"and at most the {len(train_images)} training images"
    )
  model = checkpoint.load_model()
  steps = len(train_images) // config.batch_size
  top1 = lambda model: (
    100 * accuracy(model, test_images, size, config.batch_size, preprocessing=preprocessing)
  )
  rows = [["full precision", None, top1(model), None, None]]
  for method in config.methods:
    settings = QATSettings(weight_bits=config.bits, activation_bits=config.bits, **METHODS[method])
    for seed in config.seeds:
      name = f"{slug(method)}-{seed}"
      trained, share = train_method(
        model,
        training_batches(train_images, config, size, preprocessing, seed),
        settings,
        training_settings(config, method, steps),
        config,
        anneals=method == CGA,
        freezes=method == FREEZING,
        dampening=config.dampening if method == DAMPENING else 0.0,
        annealing_steps=config.annealing_epochs * steps,
        seed=seed,
        workdir=workdir / name,
      )
      of_integer = None
      if exportable(settings.weight_quantizer, config.bits):
        integer = to_integer(trained)
        of_integer = top1(integer)
        if jax.process_index() == 0:
          save_integer(workdir / f"{name}.safetensors", integer, settings)
      rows.append([method, seed, top1(trained), of_integer, 100 * share])
  columns = [
    "method",
    "seed",
    Column("top-1, %", ".2f"),
    Column("with integer products, top-1, %", ".2f"),
    Column("oscillating at the end, %", ".2f"),
  ]
  note = (
    "The paper on ImageNet, full precision, OFQ W2A2, W3A3, W4A4: DeiT-T 72.02, 64.33, 72.72, "
    "75.46; DeiT-S 79.9, 75.72, 79.57, 81.10; Swin-T 81.2, 78.52, 81.09, 81.88."
  )
  return Report(tables=[Table(f"{config.data}, W{config.bits}A{config.bits}", columns, rows, note)])
