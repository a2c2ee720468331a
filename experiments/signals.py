"""Leaving in good order when asked to: SIGTERM (preemption) and SIGINT (Ctrl-C).

Nothing heavy is imported here, so that an entry point can install the handlers before
its own slow imports.
"""

import os
import signal

from experiments import errors


class Preemption:
  """Turns SIGTERM and SIGINT into a flag that the training loop reads.

  Until `requested` is called for the first time there is nothing to save: a signal
  raises `SystemExit(144)` at once, or when a running compilation ends. From then on
  it only sets the flag, and more signals change nothing. Every file is written
  atomically, so who cannot wait may send SIGKILL and loses the save in progress only.

  With `jax.distributed` the flag is not used: jax's preemption service, which takes
  SIGTERM over in `jax.distributed.initialize`, makes all processes stop after the same
  step, whichever of them was signalled. So install the handlers before that call.

  >>> with Preemption() as preemption:
  ...   preemption.requested(step=1)
  False
  """

  def __init__(self):
    self._received = False
    self._in_loop = False
    self._distributed = False
    self._previous = {}

  def __enter__(self) -> 'Preemption':
    for number in (signal.SIGTERM, signal.SIGINT):
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exception) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def requested(self, step: int) -> bool:
    """Returns whether to save and stop now; call it after every step.

    Args:
      step: number of updates done; with several processes all call it with the same
        steps.
    """
    import jax
    from jax.experimental import multihost_utils

    self._in_loop = True
    self._distributed = jax.distributed.is_initialized()
    if self._distributed:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._received

  def _handle(self, number, frame):
    name = signal.Signals(number).name
    # Not print or logging: the signal may have interrupted either of them.
    if not self._in_loop:
      os.write(2, f'{name} before the first step: nothing to save\n'.encode())
      raise SystemExit(errors.EXIT_PREEMPTED_UNSAVED)
    os.write(2, f'{name}: saving after this step, then leaving\n'.encode())
    self._received = True
    if self._distributed and number == signal.SIGINT:
      os.kill(os.getpid(), signal.SIGTERM)
