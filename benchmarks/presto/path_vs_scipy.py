"""PRESTO's path of 50 penalties on 100,000 x 100 against scipy's L-BFGS-B, on the CPU.

  python -m benchmarks.presto.path_vs_scipy

There is no Python solver of this problem. The other side is its textbook formulation for a solver
with bounds: the differences psi are split into positive and negative parts, so that the L1 penalty
is linear, and scipy minimises with the exact gradient in NumPy, warm-started along the path. Both
minima must agree to 1e-7. If scipy takes longer than --scipy_seconds, its remaining fits are
extrapolated from the mean of those made, which favours it, as smaller penalties take longer. The
ratio scipy / ours (above 1: ours is faster) goes to `path_vs_scipy.json` beside this file;
compilation is timed apart.
"""

import argparse
import json
import os
import pathlib
import platform
import time

from common import cli

cli.prepare_jax()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from scipy import optimize, special  # noqa: E402

from projects.presto import presto  # noqa: E402


def make_data(n: int, p: int, seed: int = 0):
  """Sparse slopes and changes, four classes of which the last is about 0.5 %."""
  rng = np.random.default_rng(seed)
  x = rng.uniform(-1, 1, (n, p))
  psi = 0.25 * (rng.random((3, p)) < 0.1)
  psi[1:] *= rng.choice([-1, 1], (2, p))
  eta = np.array([0, 3.5, 5.5]) + x @ np.cumsum(psi, axis=0).T
  # Where boundaries cross, the class between them has no probability.
  below = np.maximum.accumulate(special.expit(eta), axis=1)
  return x, (rng.random((n, 1)) > below).sum(axis=1)


class Scipy:
  """The objective and its gradient by (alpha, psi+, psi-), on standardised covariates."""

  def __init__(self, x, y):
    self.z = (x - x.mean(axis=0)) / x.std(axis=0)
    self.y, self.n, self.p = y, *x.shape
    self.m = y.max()

  def value_and_gradient(self, parameters, lambda_):
    m, p = self.m, self.p
    alpha, parts = parameters[:m], parameters[m:].reshape(2, m, p)
    beta = np.cumsum(parts[0] - parts[1], axis=0)
    eta = alpha + self.z @ beta.T
    padded = np.pad(eta, ((0, 0), (1, 1)), constant_values=((0, 0), (-np.inf, np.inf)))
    rows = np.arange(self.n)
    lower, upper = padded[rows, self.y], padded[rows, self.y + 1]
    gap = upper - lower
    if (gap <= 0).any():
      return 1e10, np.zeros_like(parameters)
    loss = np.logaddexp(0, -upper) + np.logaddexp(0, lower) - np.log(-np.expm1(-gap))
    with np.errstate(over="ignore"):
      by_gap = 1 / np.expm1(gap)
    residuals = np.zeros((self.n, m + 2))
    residuals[rows, self.y + 1] -= special.expit(-upper) + by_gap
    residuals[rows, self.y] += special.expit(lower) + by_gap
    residuals = residuals[:, 1:-1] / self.n
    slopes = np.cumsum((residuals.T @ self.z)[::-1], axis=0)[::-1]
    gradient = np.concatenate([residuals.sum(axis=0), (slopes + lambda_).ravel()])
    gradient = np.concatenate([gradient, (-slopes + lambda_).ravel()])
    return loss.mean() + lambda_ * parts.sum(), gradient

  def fit(self, lambda_, start):
    free, positive = [(None, None)] * self.m, [(0, None)] * (2 * self.m * self.p)
    return optimize.minimize(
      self.value_and_gradient,
      start,
      args=(lambda_,),
      jac=True,
      method="L-BFGS-B",
      bounds=free + positive,
      options={"maxiter": 10_000, "maxfun": 10_000, "ftol": 1e-13, "gtol": 1e-8},
    )


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--rows", type=int, default=100_000)
  parser.add_argument("--columns", type=int, default=100)
  parser.add_argument("--penalties", type=int, default=50)
  parser.add_argument("--scipy_seconds", type=float, default=300)
  args = parser.parse_args()
  load = os.getloadavg()[0]
  x, y = make_data(args.rows, args.columns)
  with jax.enable_x64(True):
    arrays = jnp.asarray(x), jnp.asarray(y), jnp.ones(args.rows)
    largest = presto.largest_lambda(*arrays, num_classes=4)
    lambdas = presto.lambda_path(largest, args.penalties, 0.01)
    start = time.perf_counter()
    fit = presto.fit_path.lower(*arrays, lambdas, num_classes=4).compile()
    compile_seconds = time.perf_counter() - start
    start = time.perf_counter()
    path = jax.block_until_ready(fit(*arrays, lambdas))
    ours = time.perf_counter() - start
  assert path.converged.all()
  psi = np.asarray(path.differences) * x.std(axis=0)
  objectives = -np.asarray(path.log_likelihood) / args.rows
  objectives += np.asarray(lambdas) * np.abs(psi).sum(axis=(1, 2))

  solver, seconds, excess = Scipy(x, y), [], []
  shares = np.cumsum(np.bincount(y))[:-1] / args.rows
  parameters = np.concatenate([special.logit(shares), np.zeros(6 * args.columns)])
  for i, lambda_ in enumerate(np.asarray(lambdas)):
    start = time.perf_counter()
    result = solver.fit(lambda_, parameters)
    seconds.append(time.perf_counter() - start)
    parameters, _ = result.x, excess.append(float(result.fun - objectives[i]))
    if sum(seconds) > args.scipy_seconds:
      break
  # Ours is certified by its KKT residual; only the same minimum is worth comparing.
  assert max(np.abs(excess)) < 1e-7, excess
  scipy_path = float(np.mean(seconds)) * args.penalties
  result = {
    "rows": args.rows,
    "columns": args.columns,
    "classes": 4,
    "penalties": args.penalties,
    "class_counts": np.bincount(y).tolist(),
    "ours_seconds": ours,
    "ours_compile_seconds": compile_seconds,
    "ours_iterations": int(path.iterations.sum()),
    "ours_largest_kkt_residual": float(path.kkt_residual.max()),
    "scipy_fits": len(seconds),
    "scipy_seconds_per_fit": seconds,
    "scipy_path_seconds": scipy_path,
    "scipy_excess_objective": excess,
    "ratio": scipy_path / ours,
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
