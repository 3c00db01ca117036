"""OFQ's parts beside LSQ, dampening, iterative freezing and Q-ViT, from the same teacher."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from common.data.images import load_preprocessing
from common.errors import UserError
from common.evaluation.calibration import mean_interval
from common.evaluation.image_classification import accuracy, images_of
from common.quantization import straight_through as ste
from common.reporting import plots
from common.reporting.measurements import Measurements
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.ofq import digits, imagenet
from projects.ofq.digits_runs import (
  HISTOGRAM_BINS,
  Run,
  Teacher,
  pretrain,
  train_all,
  trained_model,
)
from projects.ofq.integer_model import exportable, load_integer, save_integer, to_integer
from projects.ofq.methods import BASELINES, CGA, LSQ, MAIN, METHODS, QKR, STATSQ
from projects.ofq.ofq import QATSettings
from projects.ofq.oscillation import init_oscillation, update_oscillation

# The paper's, DeiT-T on ImageNet: full precision, W2A2, W3A3, W4A4.
PAPER_DEIT_TINY = {"full precision": 72.02, 2: 64.33, 3: 72.72, 4: 75.46}
# How much accuracy a method that is "not worse" may lose: the paper's gains are of 8 to 10 points,
# and one image of 597 is 0.17.
MARGIN = 0.01
TOY_STEPS = 1000


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Trains every method for every seed; or the paper's run on ImageNet; or evaluates a saved model.

  Raises:
    UserError: a value of the config is not supported, or the data is not there.
  """
  check_config(config)
  if config.integer_model:
    return evaluate_saved(config)
  if config.data != "digits":
    return imagenet.run(config, workdir)
  return run_digits(config, workdir)


def check_config(config: ConfigDict) -> None:
  """Raises a UserError for what is wrong, before any work."""
  unknown = sorted(set(config.methods) - set(METHODS))
  if unknown:
    raise UserError(f"unknown methods {', '.join(unknown)}; there are {', '.join(METHODS)}")
  if config.cga_qk not in ("none", "mask"):
    raise UserError(f"cga_qk={config.cga_qk!r} is not supported; supported: none, mask")
  for bits in (config.bits, *config.other_bits):
    QATSettings(weight_bits=bits, activation_bits=bits)
  if config.epochs < 1 or config.annealing_epochs < 1:
    raise UserError(
      f"epochs={config.epochs} and annealing_epochs={config.annealing_epochs} must be at least 1"
    )
  for name, low, high in (
    ("rand_augment", 0, 10),
    ("repeated_augmentation", 1, math.inf),
    ("mixup", 0, math.inf),
    ("cutmix", 0, math.inf),
  ):
    if not low <= config[name] <= high:
      raise UserError(f"{name}={config[name]}; expected {low} to {high}")
  if config.data == "digits":
    if 8 % config.patch_size or config.hidden_size % config.num_heads:
      raise UserError(
        f"patch_size={config.patch_size} must divide the 8 pixels of a digit, and num_heads="
        f"{config.num_heads} hidden_size={config.hidden_size}"
      )
    if not 1 <= config.batch_size <= 1200:
      raise UserError(f"batch_size={config.batch_size}; expected 1 to 1200, the training images")


def run_digits(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """All methods on the digits."""
  measurements = Measurements(workdir, config, (Run,))
  teacher = pretrain(config, measurements)
  runs: dict[tuple[str, int], list[Run]] = {}
  chosen = lambda methods: [m for m in config.methods if m in methods]
  plan = [
    (config.bits, chosen(MAIN), config.seeds),
    (config.bits, chosen(BASELINES), config.baseline_seeds),
    *((bits, chosen((LSQ, QKR, CGA)), config.baseline_seeds[:1]) for bits in config.other_bits),
  ]
  work = []
  for bits, methods, seeds in plan:
    # Annealing continues from where plain QKR is after its epochs: one training for the two.
    groups = [tuple(m for m in methods if m in (QKR, CGA))] if {QKR, CGA} & set(methods) else []
    groups += [(m,) for m in methods if m not in (QKR, CGA)]
    work += [(group, bits, seed) for group in groups for seed in seeds]
  work = list(dict.fromkeys(work))  # `other_bits` may name `bits`.
  for job, of_job in train_all(config, teacher, work, measurements).items():
    for method, run in of_job.items():
      runs.setdefault((method, job[1]), []).append(run)
  toys = toy_regression(config)
  report = Report(tables=tables(config, teacher, runs), figures=[], claims=[])
  report.tables.append(export(config, teacher, runs, workdir))
  figures(config, runs, workdir, report)
  report.claims.extend(claims(config, teacher, runs, toys))
  return report


def export(config: ConfigDict, teacher: Teacher, runs, workdir: pathlib.Path) -> Table:
  """The last method's models of the first seed with integer products: saved, and measured."""
  data = teacher.data
  recognised = lambda model: digits.evaluate(*nnx.split(model), data)[0]
  rows = []
  for (method, bits), of_seeds in runs.items():
    settings = QATSettings(weight_bits=bits, activation_bits=bits, **METHODS[method])
    if method != config.methods[-1] or not exportable(settings.weight_quantizer, bits):
      continue
    model = trained_model(config, teacher, settings, of_seeds[0])
    integer = to_integer(model)
    file = workdir / f"{imagenet.slug(method)}-w{bits}a{bits}.safetensors"
    save_integer(file, integer, settings)
    classes = np.stack([recognised(model), recognised(integer)])
    top1 = 100 * np.mean(classes == np.asarray(data.test_labels), axis=1)
    alike = 100 * np.mean(classes[0] == classes[1])
    rows.append([method, f"W{bits}A{bits}", *top1.tolist(), float(alike), file.name])
  columns = [
    "method",
    "bits",
    Column("as trained, top-1, %", ".2f"),
    Column("integer products, top-1, %", ".2f"),
    Column("images classified alike, %", ".2f"),
    "file",
  ]
  note = f"Seed {config.seeds[0]}. The files are in the folder of the results."
  return Table("The models with integer products", columns, rows, note)


def evaluate_saved(config: ConfigDict) -> Report:
  """Top-1 of the model in the file `config.integer_model` on the config's data.

  Raises:
    UserError: there is no such model or data, or the model takes other images or classes.
  """
  model = load_integer(config.integer_model)
  size = model.config.image_size
  takes = (*size, model.config.num_channels)
  has = (8, 8, 1) if config.data == "digits" else (*size, 3)
  if takes != has:
    raise UserError(f"{config.integer_model} takes images {takes}, {config.data} has {has}")
  if config.data == "digits":
    data = digits.load(0)
    count, top1 = len(data.test_labels), float(digits.evaluate(*nnx.split(model), data)[1])
  else:
    images = images_of(model.config.labels, config.data, "val", config.integer_model)
    count = len(images)
    # The file does not say how its model's pixels are prepared: the checkpoint that it came from does.
    preprocessing = load_preprocessing(config.model)
    top1 = accuracy(model, images, size, config.batch_size, preprocessing=preprocessing)
  columns = ["model", "data", "images", Column("top-1, %", ".2f")]
  row = [config.integer_model, config.data, count, 100 * top1]
  return Report(tables=[Table("A saved model with integer products", columns, [row])])


def toy_regression(config: ConfigDict) -> dict[str, list[float]]:
  """Four 2-bit LSQ weights with one step, fitted to y = x w* by SGD.

  Three of them hold the step at 1; the last has its optimum between two levels, or on one.

  Returns:
    {where: the highest frequency, at the end, with which a weight's level turns back, by seed}.
  """
  optima = {"on a threshold": (1.0, -1.0, -2.0, 0.5), "on a level": (1.0, -1.0, -2.0, 0.0)}
  keys = [jax.random.key(seed) for seed in config.seeds]
  return {
    name: [float(_toy_frequency(jnp.array(w), key)) for key in keys] for name, w in optima.items()
  }


@jax.jit
def _toy_frequency(optimum, key):
  def loss(params, x):
    w, step = params
    return jnp.mean((x @ (ste.lsq(w, step, (-2, 1)) - optimum)) ** 2)

  def update(carry, key):
    params, oscillation = carry
    grads = jax.grad(loss)(params, jax.random.normal(key, (32, 4)))
    w, step = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)
    codes = jnp.round(jnp.clip(w / step, -2, 1))
    return ((w, step), update_oscillation(oscillation, codes)[0]), None

  start = ((jnp.zeros(4), jnp.float32(1.0)), init_oscillation(jnp.zeros(4)))
  return jax.lax.scan(update, start, jax.random.split(key, TOY_STEPS))[0][1].frequency.max()


def tables(config: ConfigDict, teacher: Teacher, runs) -> list[Table]:
  """Accuracy and oscillation of every method; oscillation layer by layer."""
  full = ["full precision", None, 100 * teacher.accuracy, *[None] * 5]
  rows = [[*full, PAPER_DEIT_TINY["full precision"]]]
  for (method, bits), of_seeds in runs.items():
    final = np.array([run.accuracy[-1] for run in of_seeds])
    tail = np.array([run.accuracy for run in of_seeds])
    rows.append(
      [
        method,
        f"W{bits}A{bits}",
        100 * final.mean(),
        100 * final.std(ddof=1) if len(final) > 1 else None,
        100 * np.mean(tail.std(axis=1, ddof=1)),
        100 * np.mean([run.oscillating_share()[config.epochs - 1] for run in of_seeds]),
        100 * np.mean([run.oscillating_share()[-1] for run in of_seeds]),
        100 * np.mean([run.near_threshold for run in of_seeds]),
        PAPER_DEIT_TINY[bits] if method == CGA else None,
      ]
    )
  columns = [
    "method",
    "bits",
    Column("top-1, %", ".2f"),
    Column("sd over seeds", ".2f"),
    Column("sd over the last epochs", ".2f"),
    Column("oscillating before the last epochs, %", ".2f"),
    Column("oscillating at the end, %", ".2f"),
    Column("within 0.005 of a threshold, %", ".2f"),
    Column("paper, DeiT-T", ".2f"),
  ]
  note = (
    f"{len(config.seeds)} seeds ({len(config.baseline_seeds)} of {', '.join(BASELINES)}; one of "
    f"the other widths), {config.epochs} epochs and {config.annealing_epochs} last ones at the final learning rate. "
    "Accuracy is after the last epoch, on 597 images of digits; the paper's is on ImageNet."
  )
  first = [Table("Accuracy and oscillation", columns, rows, note)]
  layers = {m: by_layer(of_seeds) for (m, b), of_seeds in runs.items() if b == config.bits}
  names = list(dict.fromkeys(name for shares in layers.values() for name in shares))
  rows = [[m, *[shares.get(name) for name in names]] for m, shares in layers.items()]
  columns = ["method", *[Column(name, ".2f") for name in names]]
  note = "Percent of the weights, after the last epoch; mean over blocks and seeds."
  return [
    *first,
    Table(f"Oscillating weights by layer, W{config.bits}A{config.bits}", columns, rows, note),
  ]


def by_layer(of_seeds: list[Run]) -> dict[str, float]:
  """{"q_proj": percent of its weights that oscillate at the end}, over blocks and seeds."""
  names = list(dict.fromkeys(path.rpartition(".")[2] for path in of_seeds[0].sizes))
  share = lambda name: np.mean([run.oscillating_share((name,))[-1] for run in of_seeds])
  return {name: 100 * float(share(name)) for name in names}


def claims(config: ConfigDict, teacher: Teacher, runs, toys) -> list[Claim]:
  """Oscillation, accuracy, steadiness and the toy, of the methods that ran."""
  found = [Claim.greater("the teacher is good (accuracy)", [teacher.accuracy], 0.96)]
  at = {method: of_seeds for (method, bits), of_seeds in runs.items() if bits == config.bits}
  end = lambda method, of=("",): [run.oscillating_share(of)[-1] for run in at[method]]
  pairs = [
    ("StatsQ's weights oscillate less than LSQ's", LSQ, STATSQ, None),
    ("with QKR fewer weights oscillate", STATSQ, QKR, None),
    ("W_Q W_K^T oscillates less than W_Q and W_K", STATSQ, QKR, (("q_proj", "k_proj"), ("query_key",))),
    ("with annealing fewer weights oscillate", QKR, CGA, None),
  ]  # fmt: skip
  for statement, worse, better, layers in pairs:
    if worse in at and better in at:
      of = layers or (("",), ("",))
      measured = {better: end(better, of[1]), worse: end(worse, of[0])}
      found.append(Claim.less(f"{statement} (share of weights)", measured))
  final = lambda method: [run.accuracy[-1] for run in at[method]]
  for worse, better in ((LSQ, STATSQ), (STATSQ, CGA), (LSQ, CGA)):
    if worse in at and better in at:
      measured = {better: final(better), worse: final(worse)}
      found.append(Claim.greater(f"{better} is more accurate than {worse} (top-1)", measured))
      difference = np.subtract(final(better), final(worse))
      low = mean_interval(difference).low
      statement = f"{better} is not worse than {worse} (95 % lower bound of the paired difference)"
      found.append(Claim.greater(statement, [low], -MARGIN))
  if QKR in at and CGA in at:
    spread = lambda method: [np.std(run.accuracy, ddof=1) for run in at[method]]
    measured = {CGA: spread(CGA), QKR: spread(QKR)}
    found.append(Claim.less("annealing steadies the accuracy of the last epochs (sd)", measured))
  return found + [
    Claim.greater("toy: a weight with its optimum on a threshold oscillates under LSQ (frequency)",
                  toys["on a threshold"], 0.005),
    Claim.less("toy: with its optimum on a level it does not (frequency)", toys["on a level"], 0.005),
  ]  # fmt: skip


def figures(config: ConfigDict, runs, workdir: pathlib.Path, report: Report) -> None:
  """Oscillation and scales by epoch, distances to thresholds."""
  at = {m: of_seeds for (m, bits), of_seeds in runs.items() if bits == config.bits and m in MAIN}
  epochs = np.arange(1, config.epochs + config.annealing_epochs + 1)
  mean = lambda of_seeds, value: np.mean([value(run) for run in of_seeds], axis=0)

  def add(name: str, caption: str) -> None:
    report.figures.append(Figure(name.replace("_", " "), f"{name}.png", caption))

  plots.line_plot(
    workdir / "oscillation.png",
    {m: (epochs, 100 * mean(r, lambda run: run.oscillating_share())) for m, r in at.items()},
    xlabel="epoch",
    ylabel="oscillating weights, %",
    title=f"W{config.bits}A{config.bits}",
  )
  add("oscillation", "Counting starts anew when the last epochs begin.")
  relative = lambda run: run.scales["blocks.0.mlp.up_proj"] / run.scales["blocks.0.mlp.up_proj"][0]
  plots.line_plot(
    workdir / "scales.png",
    {m: (epochs, mean(r, relative)) for m, r in at.items()},
    xlabel="epoch",
    ylabel="mean scale / after epoch 1",
    title="Scales of the first MLP",
  )
  add("scales", "LSQ learns them; StatsQ's follow the weights.")
  centres = (np.arange(HISTOGRAM_BINS) + 0.5) / (2 * HISTOGRAM_BINS)
  plots.line_plot(
    workdir / "thresholds.png",
    {m: (centres, 100 * mean(r, lambda run: run.histogram)) for m, r in at.items()},
    xlabel="distance to the nearest threshold, in levels",
    ylabel="weights, % per bin",
    title="Where weights end",
  )
  add("thresholds", "Bins of 0.02; LSQ's clipped weights are in the last.")
