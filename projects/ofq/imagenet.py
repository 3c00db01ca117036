"""The paper's own run: a ViT, DeiT or Swin checkpoint, images in folders or a TFDS set."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorflow_datasets as tfds
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from PIL import Image

from common.checkpoints.huggingface import Checkpoint
from common.data.augmentation import RepeatedAugmentation, rand_augment
from common.errors import UserError
from common.models.sharding import batch_sharding
from common.models.swin import Swin
from common.models.vit import VisionTransformer
from common.reporting.report import Column, Report, Table
from common.training.loop import train
from common.training.mesh import make_mesh
from common.training.train_step import init_train_state
from projects.ofq.integer_model import exportable, save_integer, to_integer
from projects.ofq.ofq import QATSettings, calibrate, quantize
from projects.ofq.oscillation import oscillating_share
from projects.ofq.training import TrainingSettings, dampening_weight, make_qat_step

# ImageNet's, of pixels in [0, 1].
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
CROP_SHARE = 0.9  # Of the resized short side, at evaluation.


class ImageFolder(Sequence):
  """PATH/SPLIT/CLASS/*: pairs (RGB uint8 [height, width, 3], label), classes in sorted order.

  Raises:
    UserError: there is no such folder, or no class or image in it.
  """

  def __init__(self, path: str, split: str):
    root = pathlib.Path(path).expanduser() / split
    if not root.is_dir():
      raise UserError(
        f"no folder {root}; expected PATH/train/CLASS/*.JPEG and PATH/val/CLASS/*.JPEG"
      )
    self.classes = sorted(p.name for p in root.iterdir() if p.is_dir())
    suffixes = (".jpeg", ".jpg", ".png")
    self._files = [
      (file, label)
      for label, name in enumerate(self.classes)
      for file in sorted((root / name).iterdir())
      if file.suffix.lower() in suffixes
    ]
    if not self._files:
      raise UserError(f"{root} holds no {', '.join(suffixes)} in folders of classes")

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
    file, label = self._files[index]
    try:
      with Image.open(file) as image:
        return np.asarray(image.convert("RGB")), label
    except OSError as e:
      raise UserError(f"cannot read the image {file}: {e}") from None


class TFDSImages(Sequence):
  """A set of the TFDS catalogue with features `image` and `label`, as `ImageFolder`."""

  def __init__(self, name: str, split: str):
    try:
      builder = tfds.builder(name, file_format="array_record")
      builder.download_and_prepare()
      self._source = builder.as_data_source("validation" if split == "val" else split)
    except Exception as e:  # Whatever its download and preparation code may raise.
      reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
      raise UserError(
        f"tfds:{name} cannot be prepared: {reason}; ImageNet needs its archives in TFDS' manual "
        "folder and `pip install tensorflow`, or use folder:PATH with PATH/train/CLASS/*.JPEG"
      ) from None

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
    record = self._source[index]
    return record["image"], int(record["label"])


def load_images(source: str, split: str) -> Sequence[tuple[np.ndarray, int]]:
  """Images of `folder:PATH` or `tfds:NAME`; split is "train" or "val".

  Raises:
    UserError: another kind of source, or it is not there.
  """
  kind, _, name = source.partition(":")
  if kind not in ("folder", "tfds") or not name:
    raise UserError(f"unknown data {source!r}; expected digits, folder:PATH or tfds:NAME")
  return ImageFolder(name, split) if kind == "folder" else TFDSImages(name, split)


def standardise(image: Image.Image) -> np.ndarray:
  """uint8 pixels -> float32 [height, width, 3], as the checkpoints were trained."""
  return (np.asarray(image, np.float32) / 255 - MEAN) / STD


def augment(
  example: tuple[np.ndarray, int],
  rng: np.random.Generator,
  *,
  size: tuple[int, int],
  magnitude: float = 0,
  random_erasing: float = 0.0,
) -> dict[str, np.ndarray]:
  """A random crop of 8 to 100 % of the image, resized, mirrored; RandAugment; a box erased.

  Args:
    example: uint8 RGB [height, width, 3] and a label.
    rng: draws everything.
    size: (height, width) of the result.
    magnitude: of RandAugment, 0 leaves it out.
    random_erasing: probability of a box of noise.
  """
  image, label = Image.fromarray(example[0]), example[1]
  width, height = image.size
  area, ratio = rng.uniform(0.08, 1.0), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
  w = min(width, round(np.sqrt(width * height * area * ratio)))
  h = min(height, round(np.sqrt(width * height * area / ratio)))
  w, h = max(w, 1), max(h, 1)
  left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
  crop = image.resize(size[::-1], Image.Resampling.BICUBIC, (left, top, left + w, top + h))
  if rng.random() < 0.5:
    crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  if magnitude:
    crop = rand_augment(crop, rng, magnitude=magnitude)
  pixels = standardise(crop)
  if rng.random() < random_erasing:
    rows, columns = size
    share, ratio = rng.uniform(0.02, 1 / 3), np.exp(rng.uniform(np.log(0.3), -np.log(0.3)))
    h = min(rows, max(1, round(np.sqrt(rows * columns * share * ratio))))
    w = min(columns, max(1, round(np.sqrt(rows * columns * share / ratio))))
    top, left = rng.integers(rows - h + 1), rng.integers(columns - w + 1)
    pixels[top : top + h, left : left + w] = rng.normal(size=(h, w, 3))
  return {"images": pixels, "labels": np.int32(label)}


def centre_crop(example: tuple[np.ndarray, int], *, size: tuple[int, int]) -> dict[str, np.ndarray]:
  """The middle of the image, its short side resized so that the crop is `CROP_SHARE` of it."""
  image, label = Image.fromarray(example[0]), example[1]
  short = min(image.size) * CROP_SHARE
  w, h = short * min(1, size[1] / size[0]), short * min(1, size[0] / size[1])
  left, top = (image.size[0] - w) / 2, (image.size[1] - h) / 2
  crop = image.resize(size[::-1], Image.Resampling.BICUBIC, (left, top, left + w, top + h))
  return {"images": standardise(crop), "labels": np.int32(label)}


def training_batches(images, config: ConfigDict, size: tuple[int, int], seed: int):
  """Endless shuffled batches of this process's share of the images."""
  mine = grain.MapDataset.source(images).seed(seed).shuffle()
  mine = mine[jax.process_index() :: jax.process_count()]
  mine = RepeatedAugmentation(mine, config.repeated_augmentation).repeat()
  mine = mine.random_map(
    functools.partial(
      augment, size=size, magnitude=config.rand_augment, random_erasing=config.random_erasing
    )
  )
  rows = config.batch_size // jax.process_count()
  return iter(mine.batch(rows, drop_remainder=True).to_iter_dataset())


def accuracy(model: nnx.Module, images, size: tuple[int, int], batch_size: int) -> float:
  """Top-1 on all images. The last batch is filled up, so that one shape is compiled."""
  graphdef, params = nnx.split(model)
  correct = jax.jit(
    lambda params, x, labels: jnp.argmax(nnx.merge(graphdef, params)(x).logits, -1) == labels
  )
  data = grain.MapDataset.source(images).map(functools.partial(centre_crop, size=size))
  hits = []
  for batch in data.batch(batch_size):
    count = len(batch["labels"])
    rows = np.arange(batch_size) % count
    hits.append(correct(params, batch["images"][rows], batch["labels"][rows])[:count])
  return float(np.mean(np.concatenate(jax.device_get(hits))))


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
  state = init_train_state(params, optimizer, jax.random.key(seed))
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


def load_model(path: str) -> VisionTransformer | Swin:
  """A ViT, DeiT or Swin with a classifier from a checkpoint directory.

  Raises:
    UserError: it is not there, or holds another kind of model.
  """
  if not pathlib.Path(path).expanduser().is_dir():
    raise UserError(
      f"no checkpoint directory {path!r}; pass --config.model=DIR of a ViT, DeiT or Swin, such as "
      "a copy of facebook/deit-tiny-distilled-patch16-224"
    )
  model = Checkpoint(path).load_model()
  if not isinstance(model, VisionTransformer | Swin) or model.config.head == "none":
    raise UserError(
      f"{path} holds no vision transformer with a classifier; expected ViT, DeiT or Swin"
    )
  return model


def run(config: ConfigDict, methods: Mapping[str, Mapping], workdir: pathlib.Path) -> Report:
  """Trains the config's methods from a checkpoint and reports top-1 and oscillation.

  Args:
    config: see `config.py`.
    methods: the arguments of `QATSettings` by method.
    workdir: checkpoints go there, and METHOD-SEED.safetensors, the models with integer products;
      the same command resumes.

  Raises:
    UserError: the model or the data is not there, or they do not belong together.
  """
  # Imported here: the experiment imports this module.
  from projects.ofq.experiment import CGA, DAMPENING, FREEZING, training_settings

  model = load_model(config.model)
  size = model.config.image_size
  train_images, test_images = (load_images(config.data, split) for split in ("train", "val"))
  devices = jax.device_count() * config.microbatches
  if config.batch_size % devices or config.batch_size > len(train_images):
    raise UserError(
      f"batch_size={config.batch_size} must be a multiple of devices x microbatches = {devices}, "
      f"and at most the {len(train_images)} training images"
    )
  steps = len(train_images) // config.batch_size
  top1 = lambda model: 100 * accuracy(model, test_images, size, config.batch_size)
  rows = [["full precision", None, top1(model), None, None]]
  for method in config.methods:
    settings = QATSettings(weight_bits=config.bits, activation_bits=config.bits, **methods[method])
    for seed in config.seeds:
      name = f"{slug(method)}-{seed}"
      trained, share = train_method(
        model,
        training_batches(train_images, config, size, seed),
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
        integer = nnx.jit(to_integer)(trained)
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
