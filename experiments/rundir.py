"""The directory of one run: its name, its lock, and how files are written there."""

import contextlib
import fcntl
import json
import logging
import os
import pathlib
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from experiments import errors

_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,127}')
_LOCK = '.lrjax.lock'
MARKER = '.lrjax'
_log = logging.getLogger(__name__)


class RunDir(NamedTuple):
  """The places of one run.

  Attributes:
    path: the run's own directory.
    checkpoints: the directory for `checkpoints.Checkpoints`.
    existed: whether an earlier attempt of this run is there.
  """

  path: pathlib.Path
  checkpoints: pathlib.Path
  existed: bool


@contextlib.contextmanager
def open_run(
  root: str | os.PathLike, name: str, *, resume: bool = False, overwrite: bool = False
) -> Iterator[RunDir]:
  """Opens the run `root/name` for one writer; a context manager.

  In a multi-process run every process calls it and process 0 acts.

  Args:
    root: directory of all runs; made if it is missing.
    name: letters, digits, `.`, `_`, `-`; starts with a letter or digit.
    resume: go on with the run of that name if there is one.
    overwrite: move a run of that name aside to `<name>.<n>` and start anew.

  Raises:
    ConfigError: a bad name, or both `resume` and `overwrite`.
    RunExistsError: the directory holds a run, or files of somebody else.
    RunLockedError: another process has the run open; names it.
    RunDirError: the directory or its lock is a symlink.
  """
  if resume and overwrite:
    raise errors.ConfigError('resume and overwrite exclude each other; pass one')
  path = run_path(root, name)
  with contextlib.ExitStack() as held:
    existed = on_process_0(lambda: _claim(held, path, resume, overwrite))
    yield RunDir(path, path / 'checkpoints', existed)


def open_group(
  root: str | os.PathLike, name: str, *, resume: bool = False, overwrite: bool = False
) -> pathlib.Path:
  """Returns the directory `root/name` for several runs, made if it is missing.

  Args and errors are those of `open_run`; each run in it has a lock of its own.
  """
  if resume and overwrite:
    raise errors.ConfigError('resume and overwrite exclude each other; pass one')
  path = run_path(root, name)

  def claim():
    occupied = path.exists() and sorted(p.name for p in path.iterdir())
    if occupied and overwrite:
      _log.warning('moved the earlier %s aside to %s', path, _move_aside(path))
    elif occupied and not resume:
      raise errors.RunExistsError(
        f'{path} already holds {occupied[:5]}; pass resume to go on with it, overwrite'
        f' to move it aside, or choose another name'
      )
    path.mkdir(parents=True, exist_ok=True)

  on_process_0(claim)
  return path


def run_path(root: str | os.PathLike, name: str) -> pathlib.Path:
  """Returns `root/name` after checking that it names a place right under root.

  >>> run_path('/tmp', '../etc')
  Traceback (most recent call last):
  experiments.errors.ConfigError: run name '../etc' ...
  """
  if not isinstance(name, str) or not _NAME.fullmatch(name):
    raise errors.ConfigError(
      f'run name {name!r} must be 1 to 128 letters, digits, ".", "_" or "-", and '
      f'start with a letter or digit'
    )
  path = pathlib.Path(root).resolve() / name
  if path.resolve() != path:
    raise errors.RunDirError(f'{path} is a symlink; a run is a plain directory')
  return path


def on_process_0(decide: Callable[[], Any]) -> Any:
  """Returns what `decide()` gives on process 0, or raises its error, everywhere.

  The value goes through JSON when there are several processes.
  """
  import jax

  if jax.process_count() == 1:
    return decide()
  answer, error = {}, None
  if jax.process_index() == 0:
    try:
      answer = {'value': decide()}
    except Exception as e:
      # Raising alone would leave the other processes waiting in a collective.
      error = e
      answer = {'error': type(e).__name__, 'message': f'{e} (on process 0)'}
  answer = json.loads(_broadcast(json.dumps(answer).encode()))
  if error is not None:
    raise error
  if 'error' in answer:
    raise getattr(errors, answer['error'], RuntimeError)(answer['message'])
  return answer['value']


def write_text(path: str | os.PathLike, text: str | bytes) -> None:
  """Replaces a file atomically and durably; a symlink in its place is refused."""
  path = pathlib.Path(path)
  refuse_symlink(path)
  temporary = path.with_name(f'.{path.name}.tmp')
  flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
  try:
    with open(os.open(temporary, flags, 0o666), 'wb') as f:
      f.write(text.encode() if isinstance(text, str) else text)
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
  sync_directory(path.parent)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes JSON as `write_text` does, keys sorted; NaN and Inf are refused."""
  text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
  write_text(path, text + '\n')


def sync_directory(path: str | os.PathLike) -> None:
  """Makes the entries of a directory survive a power loss."""
  fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


def refuse_symlink(path: pathlib.Path) -> None:
  """Raises RunDirError if the path is a symlink."""
  if path.is_symlink():
    raise errors.RunDirError(f'{path} is a symlink; nothing is written through it')


def own_directory(path: pathlib.Path) -> None:
  """Makes the directory and marks it, or checks that it carries the mark.

  Raises:
    RunDirError: it is a symlink, or holds files but no mark.
  """
  refuse_symlink(path)
  path.mkdir(parents=True, exist_ok=True)
  if (path / MARKER).exists():
    return
  if foreign := sorted(p.name for p in path.iterdir()):
    raise errors.RunDirError(
      f'{path} was not made by this runner and holds {foreign[:5]}; move it away'
    )
  (path / MARKER).touch()
  sync_directory(path)


def escape(text: str) -> str:
  r"""Returns text on one line, control characters written out.

  >>> print(escape('loss\n2026 forged'))
  loss\n2026 forged
  """
  return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def describe_error(error: BaseException) -> str:
  """Returns what first went wrong, on one line of at most 500 letters."""
  while error.__cause__ is not None:
    error = error.__cause__
  return escape(f'{type(error).__name__}: {error}')[:500]


def _claim(held, path, resume, overwrite):
  """Locks the run until `held` closes; returns whether it existed before."""
  path.mkdir(parents=True, exist_ok=True)
  lock = _lock(path)
  held.callback(_unlock, lock)
  occupied = sorted(p.name for p in path.iterdir() if p.name != _LOCK)
  ours = (path / 'checkpoints' / MARKER).exists()
  if not occupied:
    own_directory(path / 'checkpoints')
    return False
  if resume and ours:
    return True
  if not overwrite:
    raise errors.RunExistsError(
      f'{path} already holds {occupied[:5]}; '
      + ('pass resume to go on with it, ' if ours else 'it is not a run of ours; ')
      + 'pass overwrite to move it aside, or choose another name'
    )
  aside = _move_aside(path)
  _log.warning('moved the earlier %s aside to %s', path, aside)
  return _claim(held, path, resume=False, overwrite=False)


def _move_aside(path):
  n = 1
  while (aside := path.with_name(f'{path.name}.{n}')).exists():
    n += 1
  os.rename(path, aside)
  sync_directory(path.parent)
  return aside


def _lock(path):
  """Takes the lock and signs it; the kernel frees it when its holder dies."""
  file = path / _LOCK
  refuse_symlink(file)
  fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
  try:
    text = os.pread(fd, 1000, 0).decode(errors='replace')
    try:
      fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise errors.RunLockedError(f'{path} is in use by {escape(text)}') from None
    text = os.pread(fd, 1000, 0).decode(errors='replace')
    _check_holder(file, text)
    me = {'pid': os.getpid(), 'host': socket.gethostname(), 'started': _now()}
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(me).encode(), 0)
    os.fsync(fd)
  except BaseException:
    os.close(fd)
    raise
  return fd


def _check_holder(file, text):
  """Decides about the signature that a holder left without unlocking."""
  if not text:
    return
  try:
    host = json.loads(text)['host']
  except (ValueError, KeyError, TypeError):
    host = None
  # Some network file systems do not show one host the locks of another.
  if host is not None and host != socket.gethostname():
    raise errors.RunLockedError(
      f'{file} was left by {escape(text)}; if that process is gone, remove the file'
    )
  _log.warning('took over the lock left by %s', escape(text))


def _unlock(fd):
  # Emptied, not removed: a removed file could be locked by two at once.
  os.ftruncate(fd, 0)
  os.close(fd)


def _now():
  return time.strftime('%Y-%m-%dT%H:%M:%S%z')


def _broadcast(data):
  """Process 0's bytes, on every process."""
  import numpy as np
  from jax.experimental import multihost_utils

  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  buffer = np.zeros(size, np.uint8)
  buffer[: len(data)] = np.frombuffer(data, np.uint8)[:size]
  return bytes(multihost_utils.broadcast_one_to_all(buffer).astype(np.uint8))
