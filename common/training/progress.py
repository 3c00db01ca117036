"""What a person sees of a training run: a bar on a terminal, lines elsewhere."""

import datetime

import jax
import rich.console
import rich.progress


class Progress:
  """Progress of `num_steps` steps; shows nothing where `quiet`, nor on processes but the first."""

  def __init__(self, description: str, step: int, num_steps: int, unit: str, quiet: bool):
    self._description = description
    self._num_steps = num_steps
    self._unit = unit
    self._shown = not quiet and jax.process_index() == 0
    self._bar = None
    console = rich.console.Console()
    if self._shown and console.is_terminal:
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=None),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[status]}"),
        console=console,
      )
      self._task = self._bar.add_task(description, total=num_steps, completed=step, status="")

  def advance(self, step: int) -> None:
    """Moves the bar; cheap, and never waits for the device."""
    if self._bar:
      self._bar.update(self._task, completed=step)

  def report(
    self,
    step: int,
    metrics: dict[str, float],
    steps_per_second: float | None,
    units_per_second: float | None,
  ) -> None:
    """Shows the loss and, once they are known, the speed and the time left."""
    status = f"loss {metrics['loss']:.4f}"
    if steps_per_second and units_per_second:
      left = datetime.timedelta(seconds=round((self._num_steps - step) / steps_per_second))
      status += f"  {units_per_second:,.0f} {self._unit}/s  {left} left"
    if self._bar:
      self._bar.update(self._task, completed=step, status=status)
    else:
      self.message(f"step {step}/{self._num_steps}  {status}")

  def message(self, text: str) -> None:
    """Shows a line that stays."""
    if self._bar:
      self._bar.console.print(f"{self._description}: {text}", markup=False, highlight=False)
    elif self._shown:
      print(f"{self._description}: {text}", flush=True)

  def __enter__(self):
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *exc):
    if self._bar:
      self._bar.stop()
