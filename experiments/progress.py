"""What a run shows while it goes on: a bar on a terminal, plain lines elsewhere."""

import collections
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from experiments.units import MISSING, count, duration

_SHOW_EVERY = 0.2  # seconds between redraws; rich takes about a millisecond for one


class Progress:
  """A context manager that shows step, loss, tokens a second and time left.

  It never asks the device for anything: a loss is shown when the loop has it as a
  Python float. On a terminal `rich` draws a bar; elsewhere a line appears now and
  then, at most 20 in all.

  Args:
    name: of the run.
    total: steps of the whole run.
    first: steps done before, in a run that is resumed.
    stream: where to; None: standard output.
    enabled: False shows nothing, for all processes of a run but one.
    clock: seconds.
  """

  def __init__(
    self,
    name: str,
    total: int,
    first: int = 0,
    *,
    stream: TextIO | None = None,
    enabled: bool = True,
    clock: Callable[[], float] = time.perf_counter,
  ):
    self._name, self._total, self._step, self._clock = name, total, first, clock
    self._stream = stream or sys.stdout
    self._enabled = enabled
    self._lines_every = max(1, total // 20)
    self._tokens, self._next = 0, -math.inf
    self._loss: float | None = None
    # (seconds, step, tokens) at the last redraws; the rates are taken over these.
    self._marks = collections.deque(maxlen=150)
    self._bar: Any = None

  def __enter__(self) -> 'Progress':
    is_terminal = self._stream.isatty() and os.environ.get('TERM') != 'dumb'
    if self._enabled and is_terminal:
      self._bar = _bar(self._stream)
      self._task = self._bar.add_task(self._name, total=self._total, state='starting')
      self._bar.update(self._task, completed=self._step)
      self._bar.start()
    return self

  def __exit__(self, *_) -> None:
    if self._bar is not None:
      self._draw()
      self._bar.stop()

  def update(self, step: int, tokens: int, loss: float | None = None) -> None:
    """Says that a step is done; about a microsecond but for redraws.

    Args:
      step: steps done since the start of the run.
      tokens: tokens of this step.
      loss: its loss, or None to leave the one shown before.
    """
    self._step = step
    self._tokens += tokens
    if loss is not None:
      self._loss = loss
    now = self._clock()
    if now >= self._next or step == self._total:
      self._next = now + _SHOW_EVERY
      self._marks.append((now, step, self._tokens))
      if self._bar is not None:
        self._draw()
    if self._bar is None and (step % self._lines_every == 0 or step == self._total):
      self.note(f'{self._name}  step {step}/{self._total}  {self._state()}')

  def note(self, text: str) -> None:
    """Prints a line, above the bar where there is one."""
    if self._bar is not None:
      self._bar.console.print(text, markup=False, highlight=False)
    elif self._enabled:
      print(text, file=self._stream, flush=True)

  def _draw(self):
    self._bar.update(self._task, completed=self._step, state=self._state())
    self._bar.refresh()

  def _state(self):
    tokens_per_s, seconds_left = self._rates()
    loss = MISSING if self._loss is None else f'{self._loss:.3f}'
    return f'loss {loss}  {count(tokens_per_s)} tok/s  {duration(seconds_left)} left'

  def _rates(self):
    """Tokens a second and seconds left; NaN before two steps are timed."""
    if len(self._marks) < 2:
      return math.nan, math.nan
    (start, first, before), (_, last, after) = self._marks[0], self._marks[-1]
    seconds = max(self._marks[-1][0] - start, 1e-9)
    per_step = seconds / max(last - first, 1)
    return (after - before) / seconds, (self._total - self._step) * per_step


def _bar(stream):
  import rich.console
  import rich.progress as rp

  columns = (
    rp.TextColumn('{task.description}', markup=False),
    rp.BarColumn(bar_width=24),
    rp.MofNCompleteColumn(),
    rp.TextColumn('{task.fields[state]}', markup=False),
  )
  return rp.Progress(
    *columns, console=rich.console.Console(file=stream), auto_refresh=False
  )
