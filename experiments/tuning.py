"""Trains the runs of a study one after the other, and reports what it found."""

import json
import math
import pathlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace

import jax

from experiments import errors, loop, optimizers, report, rundir
from experiments.config import Experiment, Sweep
from experiments.configuring import to_dict
from experiments.signals import Preemption
from experiments.study import Study, findings, largest_size, next_runs
from experiments.units import duration

_PROBE_STEPS = 8


def train(
  root: pathlib.Path,
  methods: Sequence[Experiment],
  sweep: Sweep,
  preemption: Preemption,
) -> None:
  """Does what a study needs and is not done yet, then writes its report.

  Args:
    root: directory of its runs; the report is `root/report`.
    methods: one run of each, at the centre of its sweep.
    sweep: rates and seeds.
    preemption: asked after each step whether to save and leave.

  Raises:
    ConfigError: a finished run in `root` has other settings than this study.
    Interrupted, ...: see `loop.run`; a run that fails counts as a loss without bound.
  """
  study = Study(tuple(methods), sweep)
  for method in methods:
    optimizers.make(method)  # options that do not fit are refused before anything runs
  losses = finished(study, root)
  if next_runs(study, losses):
    announce(study, root, losses)
    seconds = probe(methods[len(methods) // 2], preemption)
    left = seconds * (largest_size(study) - len(losses))
    print(f'about {duration(max(left, seconds))}, by a run of {_PROBE_STEPS} steps')
  started, count = time.perf_counter(), 0
  while runs := next_runs(study, losses):
    train_one(runs[0], root, preemption)
    losses, count = finished(study, root), count + 1
    each = (time.perf_counter() - started) / count
    left = max(largest_size(study) - len(losses), len(next_runs(study, losses)))
    print(f'{len(losses)} runs done; about {duration(each * left)} left', flush=True)
  found = findings(study, losses)
  path = report.write_study(study, found, root, root / 'report')
  print(f'report: {path}')


def announce(study: Study, root: pathlib.Path, losses: dict[str, float]) -> None:
  """Prints what is about to happen."""
  tokens = sum(m.steps * m.data.batch_size * m.data.seq_len for m in study.methods) * (
    largest_size(study) // len(study.methods)
  )
  names = ', '.join(m.name for m in study.methods)
  print(
    f'{root}: {largest_size(study)} runs, {len(losses)} of them done, {tokens:,} tokens '
    f'in all; {len(study.methods)} methods ({names}) x {len(study.sweep.factors)} '
    f'learning rates, then {study.sweep.seeds} seeds at the best; one more run where '
    f'the best rate lies on the edge',
    flush=True,
  )


def probe(method: Experiment, preemption: Preemption) -> float:
  """Seconds that a run takes, from one of a few steps."""
  few = replace(
    method,
    steps=min(_PROBE_STEPS, method.steps),
    optimizer=replace(method.optimizer, warmup=None),
  )
  with tempfile.TemporaryDirectory() as root:
    started = time.perf_counter()
    path = loop.run(few, root, preemption)
    seconds = time.perf_counter() - started
    summary = json.loads((path / 'summary.json').read_text())
  a_step = (summary['steady_ms'] or summary['refresh_ms']) / 1e3
  return seconds + (method.steps - few.steps) * a_step


def train_one(run: Experiment, root: pathlib.Path, preemption: Preemption) -> None:
  """Trains one run; of one that fails the failure is what stays."""
  try:
    loop.run(run, root, preemption, resume=True)
  except errors.NonFiniteError as error:
    failure = dict(valid_loss=None, failure=str(error))
    rundir.write_json(root / run.name / 'summary.json', failure)
    print(f'{run.name} failed: {error}')
  # A study compiles more programs than memory holds.
  jax.clear_caches()


def finished(study: Study, root: pathlib.Path) -> dict[str, float]:
  """Validation losses of the runs of the study that are done, infinite where one failed.

  Raises:
    ConfigError: a run was done with other settings.
  """
  losses: dict[str, float] = {}
  while True:
    fresh = {}
    for run in next_runs(study, losses):
      path = root / run.name / 'summary.json'
      if path.exists():
        _check_settings(run, path.parent)
        loss = json.loads(path.read_text())['valid_loss']
        fresh[run.name] = math.inf if loss is None else loss
    if not fresh:
      return losses
    losses |= fresh


def _check_settings(run: Experiment, directory: pathlib.Path) -> None:
  was = json.loads((directory / 'config.json').read_text())
  now = json.loads(json.dumps(to_dict(run)))
  if was != now:
    keys = [k for k in now if was.get(k) != now[k]]
    raise errors.ConfigError(
      f'{directory} was trained with another {", ".join(keys)}; give the study another '
      f'name, or pass overwrite to start anew'
    )
