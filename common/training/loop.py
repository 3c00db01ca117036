"""The training loop: resume, step, watch, save."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX
from etils import epath

from common.checkpoints.orbax import TrainingCheckpoints
from common.errors import UserError
from common.training.preemption import exit_on_signals
from common.training.progress import Progress
from common.training.train_step import StepFn, TrainState


class TrainingDiverged(UserError):
  """The loss, the gradient or the parameters became NaN or infinite.

  Attributes:
    step: the step at which it showed.
    loss: its loss.
    grad_norm: its gradient norm.
  """

  def __init__(self, step: int, loss: float, grad_norm: float, last_good: str):
    self.step, self.loss, self.grad_norm = step, loss, grad_norm
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    super().__init__(
      f"training diverged at step {step}: loss {loss:.4g}, gradient norm {grad_norm:.4g}"
      f"{', parameters not finite' if finite else ''}; {last_good}; try a lower learning rate, "
      "a longer warmup, a smaller clip_norm, or float32 instead of bfloat16"
    )


def train(
  state: TrainState,
  step_fn: StepFn,
  data_iterator: Iterator[Any],
  *,
  num_steps: int,
  workdir: os.PathLike | str | None = None,
  save_every: int | None = None,
  keep: int = 2,
  log_every: int = 50,
  eval_fn: Callable[[TrainState], dict[str, float]] | None = None,
  eval_every: int | None = None,
  batch_sharding: jax.sharding.Sharding | None = None,
  unit: str = "tokens",
  description: str = "training",
  quiet: bool = False,
) -> TrainState:
  """Trains until `state.step == num_steps`, from the newest checkpoint in `workdir` if any.

  State and data iterator are both restored, so a run that was killed at any moment and started
  again ends with the same bits as one that was not.

  The host waits for the device only where it logs, evaluates or saves. There the metrics of
  every step since the last time are looked at, and nothing is saved unless all were finite and
  the parameters are.

  On SIGTERM or SIGINT (with a workdir) the current step is finished and saved, and SystemExit
  is raised with the shell's code for the signal (143, 130): the process ends as if by the
  signal, without a traceback, unless the caller wants otherwise. A second one acts at once.

  Args:
    state: the initial state. It is donated: use what is returned.
    step_fn: from `make_train_step`; its metrics must have loss, weight and grad_norm.
    data_iterator: yields batches (pytrees of numpy arrays); with a workdir it needs `get_state`
      and `set_state` (JSON), as a Grain DatasetIterator has.
    num_steps: the step to stop at.
    workdir: `checkpoints/` and `tensorboard/` go there. None keeps nothing and does not resume.
    save_every: steps between checkpoints; None saves only at the end (and when interrupted).
    keep: how many checkpoints to keep.
    log_every: steps between logs. The first step is logged too.
    eval_fn: `eval_fn(state)` returns numbers to log; it must not donate the state.
    eval_every: steps between evaluations; None evaluates only at the end.
    batch_sharding: how batches are laid out over a mesh; each process then yields its own rows.
    unit: what `weight` counts, for the speed on the progress bar.
    description: what the progress bar calls the run.
    quiet: shows nothing.

  Returns:
    The state at `num_steps`.

  Raises:
    TrainingDiverged: a loss, a gradient or a parameter was NaN or infinite.
    UserError: the checkpoint does not fit or is damaged, or the data ran out.
    SystemExit: interrupted; see above.
  """
  with contextlib.ExitStack() as stack:
    checkpoints, writer, stop = None, None, None
    resumes = False
    if workdir is not None:
      workdir = epath.Path(workdir)
      checkpoints = stack.enter_context(TrainingCheckpoints(workdir / "checkpoints", keep))
      resumes = checkpoints.latest_step() is not None
      if resumes:
        jax.tree.map(lambda x: x.delete(), state)  # Makes room; shapes and shardings stay.
        state, iterator_state = checkpoints.restore_latest(state)
        data_iterator.set_state(iterator_state)
      stop = stack.enter_context(exit_on_signals())
    start = step = int(state.step)
    if step > num_steps:
      raise UserError(
        f"{workdir} holds a run of {step} steps already, more than num_steps={num_steps}; "
        "use another workdir"
      )
    if workdir is not None and jax.process_index() == 0:
      # On resuming, TensorBoard hides what was logged after the checkpoint.
      writer = tensorboardX.SummaryWriter(os.fspath(workdir / "tensorboard"), purge_step=step + 1)
      stack.callback(writer.close)
    progress = stack.enter_context(Progress(description, step, num_steps, unit, quiet))
    if resumes:
      progress.message(f"continues from step {step} in {checkpoints.directory}")

    window = []  # The metrics of the steps since the host last waited, still on the device.
    clock = time.monotonic()
    while step < num_steps:
      try:
        batch = next(data_iterator)
      except StopIteration:
        raise UserError(
          f"the data ran out after {step} of {num_steps} steps; "
          "repeat the data set, or ask for fewer steps"
        ) from None
      if batch_sharding is not None:
        batch = jax.tree.map(
          lambda x: jax.make_array_from_process_local_data(batch_sharding, x), batch
        )
      state, metrics = step_fn(state, batch)
      step += 1
      window.append(metrics)
      progress.advance(step)

      last = step == num_steps
      stops = stop is not None and stop.reached(step)
      saves = checkpoints is not None and (last or stops or _is_multiple(step, save_every))
      evaluates = eval_fn is not None and (last or _is_multiple(step, eval_every))
      if not (last or saves or evaluates or step == start + 1 or step % log_every == 0):
        continue

      window = jax.device_get(window)
      _check_finite(window, step, checkpoints)
      seconds = time.monotonic() - clock
      # The first step's time is the compiler's.
      steps_per_second = None if step == start + 1 else len(window) / seconds
      weight = sum(float(m["weight"]) for m in window)
      summary = _summarize(window)
      progress.report(step, summary, steps_per_second, weight / seconds)
      if steps_per_second:
        summary[f"{unit}_per_second"] = weight / seconds
      _write(writer, step, summary)
      if saves:
        if not _all_finite(state.params):
          raise _diverged(step, window[-1], checkpoints)
        checkpoints.save(step, state, data_iterator.get_state())
      if stops:
        checkpoints.wait()
        progress.message(
          f"stopped by {stop.signum.name} at step {step}, saved in {checkpoints.directory}; "
          "the same command continues"
        )
        break
      if evaluates:  # After saving, which must not wait for it when the process is to end.
        _write(writer, step, {f"eval/{name}": x for name, x in eval_fn(state).items()})
      window = []
      clock = time.monotonic()
    return state


def _write(writer: tensorboardX.SummaryWriter | None, step: int, values: dict[str, float]) -> None:
  if writer:
    for name, value in values.items():
      writer.add_scalar(name, float(value), step)
    writer.flush()


def _is_multiple(step: int, every: int | None) -> bool:
  return every is not None and step % every == 0


def _summarize(window: list[dict[str, np.ndarray]]) -> dict[str, float]:
  """Averages each metric over the window as one large batch would: weighted by `weight`."""
  weights = np.asarray([m["weight"] for m in window], np.float64)
  weights = weights / weights.sum() if weights.sum() > 0 else weights
  summary = {
    name: float(np.dot(weights, np.asarray([m[name] for m in window], np.float64)))
    for name in window[-1]
    if name != "weight"
  }
  if "learning_rate" in summary:
    summary["learning_rate"] = float(window[-1]["learning_rate"])
  return summary


def _check_finite(window, step: int, checkpoints: TrainingCheckpoints | None) -> None:
  """Raises TrainingDiverged for the first step of the window, which ends at `step`, that did."""
  for at, metrics in enumerate(window, start=step - len(window) + 1):
    if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])):
      raise _diverged(at, metrics, checkpoints)


def _diverged(step: int, metrics, checkpoints: TrainingCheckpoints | None) -> TrainingDiverged:
  saved = checkpoints.latest_step() if checkpoints else None
  last_good = (
    "nothing was saved"
    if saved is None
    else f"the last good checkpoint is {checkpoints.directory / str(saved)}"
  )
  return TrainingDiverged(step, float(metrics["loss"]), float(metrics["grad_norm"]), last_good)


@jax.jit
def _all_finite(params: Any) -> jax.Array:
  leaves = [jnp.isfinite(x).all() for x in jax.tree.leaves(params)]
  return jnp.stack(leaves).all()
