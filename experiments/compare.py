"""Trains methods on the same batches: `python -m experiments.compare --preset demo`.

Runs that are finished are kept, one that was interrupted goes on, and the report holds
all of them. With a sweep (`--preset optimizers`, or `--factors` and `--seeds`) every
method is tuned first, see `experiments.study`. Exit codes are those of
`experiments.train`.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from experiments import command_line, one_process
from experiments.entry import run_command
from experiments.signals import Preemption


@dataclasses.dataclass(frozen=True)
class Command(command_line.Command):
  """Flags of this command.

  Attributes:
    runs: directory of all runs; this comparison is a directory in it.
    name: of the comparison; none: that of the preset.
    resume: keep the finished runs of this comparison and go on with the others.
    overwrite: move an earlier comparison of this name aside and start anew.
    methods: which runs of the preset, with commas between; empty: all.
    factors: of each learning rate, all of them tried; none: the preset's.
    seeds: how many, at the best rate; none: the preset's.
  """

  runs: str = 'runs'
  name: str | None = None
  resume: bool = False
  overwrite: bool = False
  methods: tuple[str, ...] = ()
  factors: tuple[float, ...] | None = None
  seeds: int | None = None


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  words = sys.argv[1:] if argv is None else argv
  one_process()
  return run_command(lambda preemption: compare(words, preemption))


def compare(words: Sequence[str], preemption: Preemption) -> None:
  """Trains what is not finished yet, and writes one report of all runs."""
  from experiments import rundir, tuning
  from experiments.arguments import parse_args
  from experiments.optimizers import METHODS
  from experiments.presets import COMPARISONS

  asked, runs = parse_args(words, METHODS, COMPARISONS, Command)
  runs, sweep = chosen(runs, asked.methods), sweep_of(asked)
  root = rundir.open_group(
    asked.runs,
    asked.name or asked.preset,
    resume=asked.resume,
    overwrite=asked.overwrite,
  )
  if sweep is None:
    train(root, runs, preemption)
  else:
    tuning.train(root, runs, sweep, preemption)


def train(root: pathlib.Path, runs: Sequence, preemption: Preemption) -> None:
  """Trains each run once and reports."""
  from experiments import loop, report

  print(announce(root, runs), flush=True)
  for run in runs:
    if not (root / run.name / 'summary.json').exists():
      loop.run(run, root, preemption, resume=True)
  done = [report.load_run(root / run.name) for run in runs]
  report.write_report(done, root)
  report.terminal_table(done)
  print(f'report: {root / "report.html"}')


def chosen(runs: Sequence, names: Sequence[str]) -> tuple:
  """The runs of these names, in the order of the preset; all where none is named.

  Raises:
    ConfigError: for a name that is not there.
  """
  from experiments.errors import ConfigError

  known = [run.name for run in runs]
  for name in names:
    if name not in known:
      raise ConfigError(f'command line: methods: {name!r}; known: {", ".join(known)}')
  return tuple(run for run in runs if run.name in (names or known))


def sweep_of(asked: Command) -> Any:
  """The `Sweep` that is asked for, by preset and flags; None: no sweep."""
  from experiments.config import Sweep
  from experiments.errors import ConfigError
  from experiments.presets import SWEEPS

  known = SWEEPS.get(asked.preset)
  if known is None and asked.factors is None and asked.seeds is None:
    return None
  sweep = known or Sweep()
  factors = sweep.factors if asked.factors is None else asked.factors
  seeds = sweep.seeds if asked.seeds is None else asked.seeds
  try:
    return dataclasses.replace(sweep, factors=factors, seeds=seeds)
  except ValueError as error:
    raise ConfigError(f'command line: {error}') from error


def announce(root: pathlib.Path, runs: Sequence) -> str:
  """What is about to happen."""
  tokens = sum(r.steps * r.data.batch_size * r.data.seq_len for r in runs)
  names = ', '.join(r.name for r in runs)
  return f'{root}: {len(runs)} runs ({names}), {tokens:,} tokens in all'


if __name__ == '__main__':
  sys.exit(main())
