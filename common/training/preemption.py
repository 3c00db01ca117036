"""SIGTERM and SIGINT as a request to stop at the next step, the same step on every process."""

import contextlib
import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopRequest:
  """Whether the process was asked to stop.

  Attributes:
    signum: the signal that asked, None until one has.
  """

  def __init__(self):
    self.signum: signal.Signals | None = None

  def reached(self, step: int) -> bool:
    """Returns whether to stop after `step`; to be called after every step, by every process."""
    # A notice to one machine reaches all: JAX agrees on a step that none of them has passed yet.
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      self.signum = signal.SIGTERM
    return self.signum is not None


@contextlib.contextmanager
def exit_on_signals():
  """Lets SIGTERM and SIGINT end the process where the block ends, not where they arrive.

  Yields a StopRequest for the block to look at. If a signal came, leaving the block raises
  SystemExit with the shell's code for it (143 for SIGTERM, 130 for SIGINT), unless the block
  raised something itself.

  After the first signal the previous handlers are back, so that a second Ctrl-C ends a run that
  hangs; they are put back on leaving too. Under `jax.distributed` (several processes) nothing is
  installed: JAX's own preemption service listens for SIGTERM there. Neither is it outside the
  main thread, where Python allows no handlers.
  """
  request = StopRequest()
  previous = {}

  def restore():
    while previous:
      signal.signal(*previous.popitem())

  def handler(signum, frame):
    del frame
    request.signum = signal.Signals(signum)
    restore()

  if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
    for signum in (signal.SIGTERM, signal.SIGINT):
      previous[signum] = signal.signal(signum, handler)
  try:
    yield request
  finally:
    restore()
  if request.signum is not None:
    raise SystemExit(128 + request.signum)
