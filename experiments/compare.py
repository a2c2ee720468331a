"""Trains methods on the same batches: `python -m experiments.compare --preset demo`.

Runs that are finished are kept, one that was interrupted goes on, and the report holds
all of them. Exit codes are those of `experiments.train`.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from experiments import command_line
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
  """

  runs: str = 'runs'
  name: str | None = None
  resume: bool = False
  overwrite: bool = False


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  words = sys.argv[1:] if argv is None else argv
  return run_command(lambda preemption: compare(words, preemption))


def compare(words: Sequence[str], preemption: Preemption) -> None:
  """Trains what is not finished yet, and writes one report of all runs."""
  from experiments import loop, report, rundir
  from experiments.arguments import parse_args
  from experiments.config import COMPARISONS
  from experiments.optimizers import METHODS

  asked, runs = parse_args(words, METHODS, COMPARISONS, Command)
  root = rundir.open_group(
    asked.runs,
    asked.name or asked.preset,
    resume=asked.resume,
    overwrite=asked.overwrite,
  )
  print(announce(root, runs), flush=True)
  for run in runs:
    if not (root / run.name / 'summary.json').exists():
      loop.run(run, root, preemption, resume=True)
  done = [report.load_run(root / run.name) for run in runs]
  report.write_report(done, root)
  report.terminal_table(done)
  print(f'report: {root / "report.html"}')


def announce(root: pathlib.Path, runs: Sequence) -> str:
  """What is about to happen."""
  tokens = sum(r.steps * r.data.batch_size * r.data.seq_len for r in runs)
  names = ', '.join(r.name for r in runs)
  return f'{root}: {len(runs)} runs ({names}), {tokens:,} tokens in all'


if __name__ == '__main__':
  sys.exit(main())
