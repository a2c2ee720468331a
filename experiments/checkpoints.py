"""Checkpoints that are whole or not there: the only module that knows Orbax.

A step is one directory that Orbax writes under a temporary name and renames when it
is complete. Beside the arrays it holds a record (config, data position, digest of
every leaf) with a checksum of its own. Hence two different questions have two
different answers: a record that disagrees with what is asked for means another run
(CheckpointMismatch), anything that disagrees with an intact record means damage.
"""

import gc
import os
import pathlib
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from experiments import errors, integrity, rundir, steps

# What a full device or missing rights say about a step: nothing.
_NOT_DAMAGE = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)
_OK, _DAMAGED, _FAILED = range(3)


class Restored(NamedTuple):
  """What `Checkpoints.restore` found.

  Attributes:
    step: the step it was saved at.
    state: the tree, on the template's shardings.
    data_state: the position in the data, as it was saved.
    meta: config, fingerprint, versions, as they were saved.
    quarantined: newer steps that were damaged, as `(step, reason)`.
  """

  step: int
  state: Any
  data_state: dict
  meta: dict
  quarantined: list[tuple[int, str]]


class Checkpoints:
  """The steps of one run.

  All methods are collective: in a multi-process run every process calls them in the
  same order; process 0 decides, and alone touches other files than Orbax's.

  Args:
    directory: made and marked if missing; nothing of others may lie in it.
    every: `save` acts on steps that are a multiple of it.
    keep: how many of the newest steps stay.
    keep_every: steps that are a multiple of it stay for ever; None: no such steps.
    on_saved: called with the step once that step survives a crash of the machine; on
      every process, from the next `save`, `wait` or `close`.

  Raises:
    ValueError: `every`, `keep` or `keep_every` below 1.
    RunDirError: the directory is not ours, or holds entries that are not.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    every: int,
    keep: int = 3,
    keep_every: int | None = None,
    on_saved: Callable[[int], None] = lambda step: None,
  ):
    counts = {'every': every, 'keep': keep, 'keep_every': keep_every}
    for name, value in counts.items():
      if value is not None and value < 1:
        raise ValueError(f'{name} is {value}; it must be at least 1')
    self._steps = steps.Steps(pathlib.Path(directory).absolute())
    self._every, self._keep, self._keep_every = every, keep, keep_every
    self._on_saved = on_saved
    self._writing = None  # (step, the state's bytes, Orbax's response)
    self._newest = rundir.on_process_0(self._steps.open)

  @property
  def newest(self) -> int | None:
    """The newest step saved or being saved; the next one must be larger."""
    return self._writing[0] if self._writing else self._newest

  def save(
    self, step: int, state: Any, *, data_state: dict, meta: dict, force: bool = False
  ) -> bool:
    """Begins to save; waits for the previous save, not for this one.

    Args:
      step: number of updates done; larger than `newest`.
      state: tree of arrays and Python numbers; may be donated after the call.
      data_state: position in the data, JSON.
      meta: what `restore` compares and returns, JSON.
      force: save although `step` is not a multiple of `every`.

    Returns:
      Whether a save was begun.

    Raises:
      ValueError: `step` is not larger than `newest`, or a leaf has no elements.
      CheckpointSaveError: this save could not begin, or the one before failed.
    """
    if not force and step % self._every:
      return False
    self.wait()
    if self._newest is not None and step <= self._newest:
      raise ValueError(
        f'step {step} is not newer than step {self._newest} in {self._steps.directory}'
      )
    for path, (shape, _) in integrity.describe(state).items():
      if 0 in shape:
        raise ValueError(f'leaf {path!r} has shape {tuple(shape)}: nothing to save')
    digest = integrity.digest(state)
    record = integrity.seal(
      {'step': step, 'meta': meta, 'data_state': data_state, 'digest': digest}
    )
    try:
      response = ocp.save_checkpointables_async(
        str(self._steps.path(step)), {'state': state}, custom_metadata=record
      )
    except Exception as e:
      raise self._save_error(step, _bytes(state), e) from e
    self._writing = step, _bytes(state), response
    return True

  def wait(self, timeout: float | None = None) -> None:
    """Waits until the save in progress is durable, then cleans up and reports it.

    Raises:
      CheckpointSaveError: it failed, or took longer than `timeout` seconds.
    """
    if self._writing is None:
      return
    (step, size, response), self._writing = self._writing, None
    error = None
    try:
      response.result(timeout)
      if jax.process_index() == 0:
        self._steps.sync(step)
    except Exception as e:
      error = e
    if _worst(_OK if error is None else _FAILED):
      error = error or OSError('it failed on another process')
      raise self._save_error(step, size, error) from error
    self._newest = step
    rundir.on_process_0(partial(self._steps.retain, self._keep, self._keep_every))
    self._on_saved(step)

  def close(self, timeout: float | None = None) -> None:
    """The last `wait`."""
    self.wait(timeout)

  def restore(
    self,
    template: Any,
    *,
    step: int | None = None,
    expect: Mapping[str, Any] | None = None,
    allow_change: Iterable[str] = (),
  ) -> Restored | None:
    """Restores the newest healthy step, moving damaged ones to `quarantine/`.

    Args:
      template: the state's structure; leaves are Python numbers, numpy arrays, or
        jax arrays or `ShapeDtypeStruct`s with the sharding to restore to.
      step: restore this step and no other; it is not moved if it is damaged.
      expect: parts of `meta` that must be equal to what was saved.
      allow_change: dotted keys of `expect` (or their parents) that may differ.

    Returns:
      The step with its state, or None if there is no healthy step.

    Raises:
      CheckpointMismatch: config, data or leaves differ; each difference is listed.
      CheckpointNotFound: there is no such `step`.
      CheckpointCorrupt: the `step` asked for is damaged.
      ValueError: a template leaf lacks a sharding, or it does not fit the shape.
    """
    _check_shardings(template)
    self.wait()
    leaves, allowed = integrity.describe(template), [*allow_change]
    quarantined = []
    while True:
      record, damaged = rundir.on_process_0(
        lambda: self._choose(step, leaves, expect or {}, allowed)
      )
      quarantined += map(tuple, damaged)
      if record is None:
        self._newest = None
        return None
      found = record['step']
      try:
        state = self._load(record, template)
        break
      except steps.Damaged as e:
        if step is not None:
          raise self._corrupt(step, e) from e
        quarantined.append((found, str(e)))
        rundir.on_process_0(partial(self._steps.quarantine, found, str(e)))
    if step is None:
      self._newest = found
    return Restored(found, state, record['data_state'], record['meta'], quarantined)

  def _choose(self, step, leaves, expect, allow_change):
    """The record of the step to restore, and the steps found damaged on the way."""
    listed = self._steps.listed()
    if step is not None and step not in listed:
      raise errors.CheckpointNotFound(
        f'{self._steps.directory} has no step {step}; it has {listed or "none"}'
      )
    damaged = []
    for s in listed[::-1] if step is None else [step]:
      try:
        record = self._steps.record(s)
      except steps.Damaged as e:
        if step is not None:
          raise self._corrupt(step, e) from e
        damaged.append((s, str(e)))
        self._steps.quarantine(s, str(e))
      else:
        _compare(self._steps.path(s), record, leaves, expect, allow_change)
        return record, damaged
    return None, damaged

  def _load(self, record, template):
    """The state, verified; raises the same on every process."""
    step, state, error, status = record['step'], None, None, _OK
    try:
      state = _read_state(self._steps.path(step), template)
    except Exception as e:
      # Orbax answers damage with seven unrelated types.
      blameless = isinstance(e, _NOT_DAMAGE) or not self._steps.readable(step)
      error, status = e, _FAILED if blameless else _DAMAGED
    if status != _OK:
      _drop_frames(error)
    worst = _worst(status)
    if worst == _FAILED:
      raise error or RuntimeError(f'another process could not read step {step}')
    if worst == _DAMAGED:
      error = error or OSError('unreadable on another process')
      raise steps.Damaged(rundir.describe_error(error)) from error
    found = integrity.digest(state)
    for leaf, saved in record['digest'].items():
      if found.get(leaf) != saved:
        raise steps.Damaged(f'leaf {leaf!r}: read {found.get(leaf)}, saved {saved}')
    return state

  def _corrupt(self, step, reason):
    earlier = [s for s in self._steps.intact() if s < step]
    return errors.CheckpointCorrupt(
      f'step {step} in {self._steps.directory} is damaged: {reason}; earlier steps '
      f'with an intact record: {earlier or "none"}'
    )

  def _save_error(self, step, size, cause):
    # A save that was only too slow may still be writing there.
    if jax.process_index() == 0 and not isinstance(cause, TimeoutError):
      self._steps.discard_unfinished(step)
    free = shutil.disk_usage(self._steps.directory).free
    return errors.CheckpointSaveError(
      f'step {step} was not saved at {self._steps.path(step)}: '
      f'{rundir.describe_error(cause)}; the state has {size} bytes, {free} are free; '
      f'earlier steps are intact'
    )


def _compare(path, record, leaves, expect, allow_change):
  """Raises CheckpointMismatch listing how the step differs from what is wanted."""
  saved = {key: record['meta'].get(key) for key in expect}
  lines = [*integrity.differences(saved, expect, allow_change)]
  saved = {leaf: kind for leaf, (_, *kind) in record['digest'].items()}
  for leaf in dict.fromkeys([*saved, *leaves]):
    a, b = saved.get(leaf), leaves.get(leaf)
    if a != b:
      lines.append(f'leaf {leaf}: saved {_kind(a)}, now {_kind(b)}')
  if len(lines) > 19:
    lines[18:] = [f'and {len(lines) - 18} more']
  if lines:
    head = f'{path} is of another run (allow_change lets harmless keys differ):'
    raise errors.CheckpointMismatch('\n  '.join([head, *lines]))


def _worst(status):
  """The largest status on any process."""
  return np.max(multihost_utils.process_allgather(np.int32(status)))


def _drop_frames(error):
  """Frees the coroutines that a failed load leaves behind, here and not anywhere."""
  while error is not None:
    error.__traceback__ = None
    error = error.__cause__ or error.__context__
  with warnings.catch_warnings(action='ignore', category=RuntimeWarning):
    gc.collect()


def _kind(leaf):
  return 'absent' if leaf is None else f'{leaf[1]}{leaf[0]}'


def _read_state(path, template):
  def abstract(x):
    if isinstance(x, jax.Array):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return x

  context = ocp.Context()
  # Each process reads its own shards and needs nobody else for it: one that fails
  # must be able to say so, instead of leaving the others in Orbax's barrier.
  me = jax.process_index()
  context.multiprocessing.active_processes = {me}
  context.multiprocessing.primary_host = me
  context.memory.read_concurrent_bytes = 2 * _bytes(template) + (1 << 26)
  with context:
    wanted = {'state': jax.tree.map(abstract, template)}
    return ocp.load_checkpointables(str(path), wanted)['state']


def _check_shardings(template):
  """Refuses what would fail in every step and look like damage there."""
  for path, x in integrity.by_path(template).items():
    if isinstance(x, jax.ShapeDtypeStruct):
      if x.sharding is None:
        raise ValueError(f'template leaf {path!r} has no sharding')
      try:
        x.sharding.shard_shape(x.shape)
      except ValueError as e:
        raise ValueError(f'template leaf {path!r}: {e}') from e


def _bytes(tree):
  sizes = (
    x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x, 'size')
  )
  return sum(sizes)
