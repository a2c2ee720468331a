"""Trains one configuration: `python -m experiments.train --preset demo`.

Exit codes: 0 done, 1 error, 2 bad config, 143 interrupted and saved, 144 interrupted
before there was anything to save.
"""

import dataclasses
import sys
from collections.abc import Sequence

from experiments import command_line, one_process
from experiments.entry import run_command
from experiments.errors import ConfigError
from experiments.signals import Preemption


@dataclasses.dataclass(frozen=True)
class Command(command_line.Command):
  """Flags of this command.

  Attributes:
    runs: directory of all runs.
    resume: go on with the run of this name if there is one.
    overwrite: move a run of this name aside and start anew.
    allow_change: dotted config keys, with commas between, that may differ at a resume.
    coordinator: host:port of process 0 of a multi-process run; 'auto' on a cluster
      that jax knows; none: one process.
    processes: number of processes, with a coordinator that is not 'auto'.
    process: number of this process, from 0.
    heartbeat: seconds without a sign of life after which a process is taken for dead
      and all others are ended.
  """

  runs: str = 'runs'
  resume: bool = False
  overwrite: bool = False
  allow_change: str = ''
  coordinator: str | None = None
  processes: int = 1
  process: int = 0
  heartbeat: int = 100


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  words = sys.argv[1:] if argv is None else argv
  return run_command(lambda preemption: train(words, preemption))


def train(words: Sequence[str], preemption: Preemption) -> None:
  """Trains what the command line says, and writes the run's report."""
  import jax

  from experiments import loop, report
  from experiments.arguments import parse_args
  from experiments.optimizers import METHODS

  asked, (experiment,) = parse_args(words, METHODS, command=Command)
  connect(asked)
  directory = loop.run(
    experiment,
    asked.runs,
    preemption,
    resume=asked.resume,
    overwrite=asked.overwrite,
    allow_change=[k for k in asked.allow_change.split(',') if k],
  )
  if jax.process_index() == 0:
    report.write_report([directory], directory, title=f'Run {experiment.name}')
    print(f'report: {directory / "report.html"}')


def connect(asked: Command) -> None:
  """Joins the other processes of a multi-process run.

  Raises:
    ConfigError: for flags that do not fit together, and 'auto' where there is no cluster.
  """
  if asked.heartbeat < 1:
    raise ConfigError(f'heartbeat must be at least 1 second, got {asked.heartbeat}')
  if asked.coordinator is None:
    one_process()
    return
  import jax

  patience = dict(heartbeat_timeout_seconds=asked.heartbeat)
  if asked.coordinator != 'auto':
    if not 0 <= asked.process < asked.processes:
      raise ConfigError(
        f'process must be from 0 to processes - 1 = {asked.processes - 1}, got'
        f' {asked.process}'
      )
    jax.distributed.initialize(
      asked.coordinator, asked.processes, asked.process, **patience
    )
    return
  try:
    jax.distributed.initialize(**patience)
  except ValueError as e:  # jax found no cluster to ask
    raise ConfigError(
      f'coordinator auto: jax knows no cluster here ({e}); give host:port, --processes'
      f' and --process, or leave it out for one process'
    ) from e


if __name__ == '__main__':
  sys.exit(main())
