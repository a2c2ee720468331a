"""What a run leaves in its directory, read back.

- `config.json`: the `Experiment`.
- `metrics.jsonl`: `{"step", "split", "loss", ...}` with `split` 'train' or 'valid',
  the loss in nats a token; one that is not finite is null, 'nan', 'inf' or '-inf'; and
  where subspaces were measured `{"step", "split": "subspace", "captured_energy",
  "overlap", ...}`, where events ran `{"step", "split": "event", ...}`.
- `timing.jsonl`: `{"step", "seconds", "refresh", ...}`, the time of each step alone.
- `summary.json`: a `Summary`, written at the end.

Only the metrics must be there: a run may still go on, or have been killed.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.configuring import build
from experiments.rundir import escape
from experiments.schema import Scalar


@dataclasses.dataclass(frozen=True)
class Summary:
  """The final numbers of a run; None where they are not known.

  Attributes:
    steps: optimizer steps taken.
    tokens: tokens trained on.
    skipped_steps: steps left out because of a non-finite gradient.
    valid_loss: nats a token, over the whole validation set.
    bits_per_byte: the same in bits a byte of text.
    perplexity: its exponential, per token.
    train_seconds: spent in training steps, all attempts together; without compilation,
      evaluation and saving.
    compile_seconds: in which the training step was compiled, in the last attempt.
    steady_ms: median time of a step without refresh.
    refresh_ms: median time of a step that refreshes bases.
    parameters: number of trained weights.
    parameter_bytes: what they take.
    fixed_bytes: what arrays of kernels take that nobody trains.
    gradient_bytes: what their gradients take.
    optimizer_bytes: what the state of the optimizer takes, exactly.
    adam_bytes: what Adam would keep for the same weights.
    corpus: name, files, bytes and digest of the text.
    versions: of Python and the packages that matter.
    machine: processor, cores, kind and number of devices.
    commit: of the source, with a mark where it was changed.
    captured_energy: mean share of the gradient's squares inside the subspaces.
    overlap: mean share of a subspace kept at a refresh.
    effective_rank: mean effective rank of the gradients.
    refreshes: of a matrix's subspace, on average.
    temporary_bytes: what a training step needs beside its state: activations, gradients.
    failure: why the run ended before its last step.
  """

  steps: int | None = None
  tokens: int | None = None
  skipped_steps: int | None = None
  valid_loss: float | None = None
  bits_per_byte: float | None = None
  perplexity: float | None = None
  train_seconds: float | None = None
  compile_seconds: float | None = None
  steady_ms: float | None = None
  refresh_ms: float | None = None
  parameters: int | None = None
  parameter_bytes: int | None = None
  fixed_bytes: int | None = None
  gradient_bytes: int | None = None
  optimizer_bytes: int | None = None
  adam_bytes: int | None = None
  temporary_bytes: int | None = None
  corpus: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)
  versions: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)
  machine: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)
  commit: str | None = None
  captured_energy: float | None = None
  overlap: float | None = None
  effective_rank: float | None = None
  refreshes: float | None = None
  failure: str | None = None


class Run(NamedTuple):
  """One run.

  Attributes:
    name: of its config, or else of its directory.
    config: the plain form of its `Experiment`; empty if it is not there.
    train: (steps, losses), arrays of one length, steps ascending.
    valid: the same of the evaluations.
    timing: (steps, seconds, is_refresh), the same of step times.
    subspaces: (steps, captured energies, overlaps), means over all matrices.
    summary: its final numbers.
  """

  name: str
  config: dict[str, Any]
  train: tuple[np.ndarray, np.ndarray]
  valid: tuple[np.ndarray, np.ndarray]
  timing: tuple[np.ndarray, np.ndarray, np.ndarray]
  subspaces: tuple[np.ndarray, np.ndarray, np.ndarray]
  summary: Summary

  @property
  def refreshes(self) -> int:
    """Number of timed steps that refreshed bases."""
    return int(self.timing[2].sum())

  @property
  def average_ms(self) -> float | None:
    """Time of a step with refresh steps in their proportion, from both medians."""
    steady, refresh = self.summary.steady_ms, self.summary.refresh_ms
    if steady is None or refresh is None or not self.refreshes:
      return steady
    return steady + (refresh - steady) * self.refreshes / len(self.timing[0])

  def seconds_at(self, steps: np.ndarray) -> np.ndarray:
    """Time spent in steps up to the given ones; NaN where nothing was timed."""
    timed, seconds, _ = self.timing
    if not len(timed):
      return np.full(len(steps), np.nan)
    # A line stands for all steps since the one before, where not all are logged.
    return np.interp(steps, timed, np.cumsum(seconds * np.diff(timed, prepend=0)))


# Numbers that are read of the lines of each split.
_PLOTTED = {
  'train': ('loss',),
  'valid': ('loss',),
  'subspace': ('captured_energy', 'overlap'),
}


def load_run(directory: str | os.PathLike) -> Run:
  """Reads the directory of a run.

  A last line that was cut off by a crash is left out; of lines for the same step the
  last one counts.

  Raises:
    FileNotFoundError: no such directory, or no metrics in it.
    ValueError: a file that is not what it should be; names it and the line.
  """
  directory = Path(directory)
  if not (directory / 'metrics.jsonl').exists():
    raise FileNotFoundError(f'{directory} holds no run: metrics.jsonl is missing')
  config = _read_object(directory / 'config.json')
  summary = _read_object(directory / 'summary.json')
  known = {field.name for field in dataclasses.fields(Summary)}
  summary = {name: value for name, value in summary.items() if name in known}
  splits: dict[str, dict[int, tuple]] = {split: {} for split in _PLOTTED}
  for where, line in _read_lines(directory / 'metrics.jsonl'):
    step = _number(line, 'step', where, int)
    split = line.get('split', 'train')
    if not isinstance(split, str):
      raise ValueError(f'{where}: split must be a name, got {repr(split)[:80]}')
    names = _PLOTTED.get(split, ())
    values = tuple(_number(line, name, where, float) for name in names)
    splits.setdefault(split, {})[step] = values
  timing = {}
  for where, line in _read_lines(directory / 'timing.jsonl'):
    seconds = _number(line, 'seconds', where, float)
    timing[_number(line, 'step', where, int)] = (seconds, line.get('refresh') is True)
  return Run(
    name=escape(str(config.get('name', directory.name))),
    config=config,
    train=_columns(splits['train'], float),
    valid=_columns(splits['valid'], float),
    timing=_columns(timing, float, bool),
    subspaces=_columns(splits['subspace'], float, float),
    summary=build(Summary, summary, str(directory / 'summary.json')),
  )


def _read_object(path) -> dict[str, Any]:
  if not path.exists():
    return {}
  value = _parse(path.read_bytes(), str(path))
  if not isinstance(value, dict):
    raise ValueError(f'{path}: expected a JSON object, got {type(value).__name__}')
  return value


def _read_lines(path) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (file and line number, object)."""
  if not path.exists():
    return
  *lines, last = path.read_bytes().split(b'\n')
  for number, line in enumerate([*lines, last], 1):
    where = f'{path}:{number}'
    try:
      value = _parse(line, where)
    except ValueError:
      if number <= len(lines):
        raise
      # Without its newline the last line is one that a crash has cut off.
      return
    if not isinstance(value, dict):
      raise ValueError(f'{where}: expected a JSON object, got {type(value).__name__}')
    yield where, value


def _parse(content, where):
  try:
    return json.loads(content.decode('utf-8'))
  except RecursionError:
    raise ValueError(f'{where}: brackets are nested too deeply') from None
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from error


def _number(line, name, where, kind) -> Any:
  """A number of a line; JSON has no words of its own for those not finite."""
  value = line.get(name)
  if kind is float and (
    value in ('nan', 'inf', '-inf') or (name in line and value is None)
  ):
    return float(value or 'nan')
  allowed = (int, float) if kind is float else int
  if isinstance(value, bool) or not isinstance(value, allowed):
    shown = repr(value)[:80] if name in line else 'nothing'
    raise ValueError(f'{where}: {name} must be {kind.__name__}, got {shown}')
  if abs(value) >= 2**63 and kind is int:
    raise ValueError(f'{where}: {name} is too large')
  return value


def _columns(rows, *kinds) -> Any:
  """{step: values} as arrays, ascending in step."""
  steps = sorted(rows)
  values = zip(*(rows[step] for step in steps)) if steps else ((),) * len(kinds)
  columns = (np.asarray(v, kind) for v, kind in zip(values, kinds))
  return np.asarray(steps, np.int64), *columns
