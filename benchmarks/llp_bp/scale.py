"""One round of belief propagation and training at 10^4, 10^5 and 10^6 instances, on the CPU.

  python -m benchmarks.llp_bp.scale

Bags of 8 to 2048 instances, their sizes log-uniform; 4 covariates; 10 neighbours; the cardinality
factor. Every size runs in a process of its own, for its peak memory. Compilation is timed apart: it
depends on the sizes of bags, not on the number of instances. `growth` in `scale.json` beside this
file is the exponent of the time between 10^5 and 10^6 instances: 1 is linear.
"""

import argparse
import json
import math
import os
import pathlib
import platform
import resource
import subprocess
import sys
import time

from common import cli

cli.prepare_jax()

import jax  # noqa: E402
import numpy as np  # noqa: E402
from sklearn.metrics import roc_auc_score  # noqa: E402

from projects.llp_bp import belief_propagation, graph, losses, training  # noqa: E402

SIZES = (10_000, 100_000, 1_000_000)
NEIGHBOURS, ITERATIONS, ROWS_PER_BATCH = 10, 50, 2048


def make_data(n: int, seed: int = 0):
  """Standard normal covariates, labels of a product of two of them, random bags."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, 4)).astype(np.float32)
  y = (x[:, 0] * x[:, 1] + 0.1 * rng.normal(size=n) > 0).astype(int)
  sizes = np.exp(rng.uniform(math.log(8), math.log(2048), n // 8)).astype(int)
  sizes = sizes[: np.searchsorted(np.cumsum(sizes), n)]
  bags = np.repeat(np.arange(len(sizes)), sizes)
  bags = np.concatenate([bags, np.full(n - len(bags), len(sizes))])  # A last one of what is left.
  bags = rng.permutation(bags)
  return x, y, bags, np.bincount(bags, weights=y)


def measure(n: int) -> dict:
  x, y, bags, counts = make_data(n)
  seconds, start = {}, time.perf_counter()

  def lap(name: str) -> None:
    nonlocal start
    seconds[name] = time.perf_counter() - start
    start = time.perf_counter()

  order = graph.tree_order(x)
  x, y, bags = x[order], y[order], bags[order]
  near = graph.nearest(x, NEIGHBOURS)
  lap("neighbours")
  groups, edges = graph.group_bags(bags, counts), graph.neighbour_edges(near)
  lap("graph")
  groups, edges = jax.device_put((groups, edges))
  settings = {"max_iterations": ITERATIONS, "tolerance": -1.0, "damping": 0.5}
  infer = belief_propagation.infer.lower(
    edges, groups, 0.25, 32.0, bag_factor="cardinality", **settings
  ).compile()
  lap("compilation of belief propagation")
  beliefs = jax.block_until_ready(infer(edges, groups, 0.25, 32.0, **settings))
  lap("belief propagation")
  probability = np.asarray(beliefs.probability)
  steps = max(20, n // ROWS_PER_BATCH)
  rng = np.random.default_rng(1)
  batches = training.pack_bags(bags, counts, ROWS_PER_BATCH, steps, rng)
  lap("batches")
  network = {"encoder": "mlp", "hidden": (64, 64, 32)}
  held_out = make_data(5000, seed=2)
  candidate = training.Settings(*np.float32([[1e-2], [1e-4], [0.1]]))
  arguments = (
    jax.random.key(0),
    training.initialise(jax.random.key(1), in_features=4, **network),
    x,
    (probability >= 0.5).astype(np.float32),
    batches,
    held_out[0],
    held_out[1].astype(np.float32),
    candidate,
  )
  train = training.train.lower(
    *arguments, loss=losses.pseudo_label_loss, score=training.auc, validations=10, **network
  ).compile()
  lap("compilation of training")
  trained = jax.block_until_ready(train(*arguments))
  lap("training, one epoch")
  measured = [v for k, v in seconds.items() if not k.startswith("compilation")]
  return {
    "instances": n,
    "bags": len(counts),
    "bag_sizes": [int(np.bincount(bags).min()), int(np.bincount(bags).max())],
    "directed_edges": int((np.asarray(edges.weight) > 0).sum()),
    "seconds": seconds,
    "seconds_without_compilation": sum(measured),
    "iterations": int(beliefs.iterations),
    "residual": float(beliefs.residual),
    "auc_of_mu": float(roc_auc_score(y, probability)),
    "auc_of_bag_proportion": float(roc_auc_score(y, (counts / np.bincount(bags))[bags])),
    "auc_of_classifier": float(trained.score),
    "peak_memory_GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
  }


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--rows", type=int, help="measure this size only, and print it")
  args = parser.parse_args()
  if args.rows:
    print(json.dumps(measure(args.rows)))
    return
  load = os.getloadavg()[0]
  runs = []
  for n in SIZES:
    command = [sys.executable, "-m", "benchmarks.llp_bp.scale", f"--rows={n}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    runs.append(json.loads(done.stdout.splitlines()[-1]))
  times = [run["seconds_without_compilation"] for run in runs]
  result = {
    "runs": runs,
    "growth": math.log10(times[-1] / times[-2]),
    "load_average": {"before": load, "after": os.getloadavg()[0]},
    "environment": {
      "cpu_count": os.cpu_count(),
      "platform": platform.platform(),
      "jax": jax.__version__,
      "numpy": np.__version__,
    },
  }
  file = pathlib.Path(__file__).with_suffix(".json")
  file.write_text(json.dumps(result, indent=1) + "\n")
  print(json.dumps(result, indent=1))


if __name__ == "__main__":
  main()
