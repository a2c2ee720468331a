"""Step directories on disk: which there are, which are ours, and what becomes of them.

Only files; arrays are read and written by `checkpoints`. A directory named by a
number counts as a step. It is whole if its record, written by the saver inside the
same atomic rename, carries the right checksum.
"""

import itertools
import json
import logging
import os
import pathlib
import re
import shutil
from typing import Any

from experiments import errors, integrity, rundir

_RECORD_FILE = '_CHECKPOINT_METADATA'
_MAX_RECORD_BYTES = 1 << 28
_STEP = re.compile(r'0|[1-9][0-9]*')
_LEFTOVER = re.compile(r'[0-9]+\.(orbax-checkpoint-tmp.*|deleted)')
_log = logging.getLogger(__name__)


class Damaged(Exception):
  """What is wrong with a step."""


class Steps:
  """The steps in one directory; for one process, that which decides.

  Args:
    directory: absolute path.
  """

  def __init__(self, directory: pathlib.Path):
    self.directory = directory

  def open(self) -> int | None:
    """Makes or checks the directory and removes what a kill left half done.

    Returns:
      The largest step there, healthy or not.

    Raises:
      RunDirError: the directory is not ours, or holds entries that are not.
    """
    rundir.own_directory(self.directory)
    entries = sorted(self.directory.iterdir())
    if foreign := [p.name for p in entries if not _is_own(p)]:
      raise errors.RunDirError(
        f'{self.directory} holds {foreign[:5]}, which this runner did not make; '
        f'move them away'
      )
    for path in entries:
      if _LEFTOVER.fullmatch(path.name):
        shutil.rmtree(path)
    return max(self.listed(), default=None)

  def path(self, step: int) -> pathlib.Path:
    """Returns the directory of a step."""
    return self.directory / str(step)

  def listed(self) -> list[int]:
    """Returns all steps in ascending order, healthy or not."""
    names = os.listdir(self.directory)
    return sorted(int(name) for name in names if _STEP.fullmatch(name))

  def intact(self) -> list[int]:
    """Returns the steps whose record is intact, in ascending order."""
    return [step for step in self.listed() if self._has_record(step)]

  def record(self, step: int) -> dict[str, Any]:
    """Returns the record saved with the step.

    Raises:
      Damaged: it cannot be read, or is not what was saved at this step.
    """
    file = self.path(step) / _RECORD_FILE
    try:
      if file.stat().st_size > _MAX_RECORD_BYTES:
        raise ValueError(f'{_RECORD_FILE} is too large')
      record = integrity.unseal(json.loads(file.read_bytes())['custom_metadata'])
      if record['step'] != step:
        raise ValueError(f'it is step {record["step"]} renamed')
    except PermissionError:
      raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
      raise Damaged(rundir.describe_error(e)) from e
    return record

  def readable(self, step: int) -> bool:
    """Whether access rights let us read every file of the step."""
    return all(os.access(p, os.R_OK) for p in self.path(step).rglob('*'))

  def quarantine(self, step: int, reason: str) -> None:
    """Moves a damaged step to `quarantine/<step>_<n>`."""
    room = self.directory / 'quarantine'
    rundir.refuse_symlink(room)
    room.mkdir(exist_ok=True)
    names = (room / f'{step}_{n}' for n in itertools.count())
    target = next(path for path in names if not path.exists())
    os.rename(self.path(step), target)
    rundir.sync_directory(room)
    rundir.sync_directory(self.directory)
    _log.warning('step %d is damaged, moved to %s: %s', step, target, reason)

  def retain(self, keep: int, keep_every: int | None) -> None:
    """Deletes steps that are neither among the newest nor multiples of keep_every."""
    # What lacks our record is neither counted nor deleted, whatever its name.
    for step in self.intact()[:-keep]:
      if keep_every is None or step % keep_every:
        # Renamed first, so that a kill never leaves half a step under its number.
        doomed = self.directory / f'{step}.deleted'
        os.rename(self.path(step), doomed)
        shutil.rmtree(doomed)

  def discard_unfinished(self, step: int) -> None:
    """Removes what a failed save of the step left."""
    for path in self.directory.glob(f'{step}.orbax-checkpoint-tmp*'):
      shutil.rmtree(path, ignore_errors=True)

  def sync(self, step: int) -> None:
    """Makes every file of the step survive a power loss."""
    for directory, _, files in os.walk(self.path(step)):
      for name in files:
        with open(os.path.join(directory, name), 'rb') as f:
          os.fsync(f.fileno())
      rundir.sync_directory(directory)
    rundir.sync_directory(self.directory)

  def _has_record(self, step):
    try:
      return bool(self.record(step))
    except Damaged:
      return False


def _is_own(path):
  """Whether the runner made the entry; a step may be damaged, but not a stranger."""
  if path.is_symlink():
    return False
  if path.name in (rundir.MARKER, 'quarantine') or _LEFTOVER.fullmatch(path.name):
    return True
  if not (_STEP.fullmatch(path.name) and path.is_dir()):
    return False
  names = {p.name for p in path.iterdir()}
  return not names or bool(names & {_RECORD_FILE, 'state'})
