"""Metrics as one history per run: JSON lines always, TensorBoard where asked for."""

import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments import rundir

_log = logging.getLogger(__name__)


class Metrics:
  """Writes one JSON object a line, keys sorted; on process 0 only.

  A file without `attempt` is a function of the training alone: log a step's metrics
  before saving that step, call `truncate_after(restored step)` at every resume (-1
  where nothing was restored), and a run that was killed has the bytes of one that was
  not. What depends on the clock or on the attempt goes into a second file.

  Args:
    path: the file; made if missing, appended to otherwise. Not a symlink.
    attempt: if given, every line carries it.
    tensorboard_dir: where to write TensorBoard events too; needs tensorboardX.

  Raises:
    RunDirError: the path or the directory is a symlink.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    *,
    attempt: int | None = None,
    tensorboard_dir: str | os.PathLike | None = None,
  ):
    self._path = pathlib.Path(path)
    self._fixed = {} if attempt is None else {'attempt': attempt}
    self._tensorboard_dir = tensorboard_dir
    if tensorboard_dir is not None:
      # Here, because at the first line its second would count as that step's.
      import tensorboardX

      self._make_writer = tensorboardX.SummaryWriter
    self._writer = None
    self._file = None
    self._purge_step = None
    if jax.process_index() == 0:
      self._open()
      if tensorboard_dir is not None:
        rundir.refuse_symlink(pathlib.Path(tensorboard_dir))

  def scalars(
    self, step: int, values: Mapping[str, Any], *, split: str = 'train'
  ) -> None:
    """Writes one line.

    Args:
      step: number of updates done.
      values: name -> number; floats are written so that reading gives the same
        number, NaN and infinities as the strings 'nan', 'inf' and '-inf', which
        `float` reads.
      split: 'train', 'validation', ...

    Raises:
      ValueError: a value is named `step`, `split` or `attempt`.
    """
    if self._file is None:
      return
    fixed = {'step': step, 'split': split, **self._fixed}
    if taken := {'step', 'split', 'attempt'} & {*values}:
      raise ValueError(f'metric names {sorted(taken)} are taken by every line')
    numbers = {rundir.escape(k): np.asarray(v).item() for k, v in values.items()}
    line = {k: _plain(v) for k, v in {**fixed, **numbers}.items()}
    self._file.write(json.dumps(line, sort_keys=True, allow_nan=False).encode() + b'\n')
    if self._tensorboard_dir is not None:
      self._to_tensorboard(step, numbers, split)

  def flush(self) -> None:
    """Makes all lines survive a crash of the machine; call it before each save."""
    if self._file is not None:
      os.fsync(self._file.fileno())
    if self._writer is not None:
      self._writer.flush()

  def truncate_after(self, step: int) -> None:
    """Cuts lines past the step, and any that a kill left half written."""
    if self._file is None:
      return
    self._file.close()
    lines = self._path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (s := _step(line)) is not None and s <= step]
    rundir.write_text(self._path, b''.join(kept))
    _log.info('%s: kept %d of %d lines', self._path, len(kept), len(lines))
    self._purge_step = step + 1
    self._open()

  def close(self) -> None:
    """Flushes and closes."""
    self.flush()
    for file in (self._file, self._writer):
      if file is not None:
        file.close()
    self._file = self._writer = None

  def _open(self):
    rundir.refuse_symlink(self._path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    # Unbuffered: a line is out of reach of SIGKILL once it is written.
    fd = os.open(self._path, flags, 0o666)
    self._file = os.fdopen(fd, 'wb', buffering=0)

  def _to_tensorboard(self, step, numbers, split):
    if self._writer is None:
      self._writer = self._make_writer(
        str(self._tensorboard_dir), purge_step=self._purge_step
      )
    for name, value in numbers.items():
      self._writer.add_scalar(f'{split}/{name}', value, step)


def _plain(value):
  """JSON has no NaN and no infinities."""
  return str(value) if isinstance(value, float) and value - value != 0 else value


def _step(line):
  """The step of a whole line, else None."""
  try:
    step = json.loads(line)['step'] if line.endswith(b'\n') else None
  except (ValueError, KeyError, TypeError, RecursionError):
    return None
  return step if type(step) is int else None
