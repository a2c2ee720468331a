"""Tunes kernels on the present device: `python -m experiments.tune --size 350m`.

Every operation runs on stacks of the matrices of one model with each of the tiles that
lrjax/kernels/tiles.json lists for the platform, in turns within one process. The fastest
one is added to that table, under the key that the operation itself looks up there, and is
what kernels run with on such a device from then on. A key does not tell how P is stored:
its tile is tuned on floats, or on what `--operations project_int4` alone says.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax

from experiments import command_line, errors, timing
from experiments.jobs import Job, check, jobs
from lrjax.kernels import tiles


@dataclasses.dataclass(frozen=True)
class Command:
  """Flags of this command.

  Attributes:
    size: of the model whose matrices are taken.
    rank: of the projections.
    dtype: of gradients and weights.
    operations: with commas between; empty: all.
    megabytes: MiB that a call must move, in a stack of as many matrices; more than caches
      hold, and enough that a call takes longer than to start it.
    rounds: how often each tile is timed; medians are over them.
    table: the file that is read and extended.
  """

  size: str = '350m'
  rank: int = 256
  dtype: Literal['float32', 'bfloat16'] = 'bfloat16'
  operations: tuple[str, ...] = ()
  megabytes: int = 512
  rounds: int = 5
  table: str = str(tiles.PATH)


def tuned(asked: Command) -> dict[tiles.Key, Job]:
  """For each row of the table the first job that looks it up on the present device."""
  found: dict[tiles.Key, Job] = {}
  for job in jobs(asked.size, asked.rank, asked.dtype, asked.operations):
    # On the longer side too: `side` of an optimizer may be 'long', layers have both.
    for one in (job, dataclasses.replace(job, d=job.k, k=job.d)):
      found.setdefault(one.key(), one)
  return found


def tune(
  table: tiles.Table, key: tiles.Key, job: Job, asked: Command
) -> dict[str, Any] | None:
  """The row that a job adds to the table; None where no tile fits."""
  platform, found = tiles.present().platform, []
  for tile in table.candidates[key.operation][platform]:
    with tiles.only(tile):
      # Whatever a compiler says against a tile, another one may do.
      try:
        found.append((tile, job.sampler(platform, asked.megabytes)))
      except (ValueError, jax.errors.JaxRuntimeError) as e:
        print(f'{job.name}, {tile}: {str(e)[:200]}', file=sys.stderr)
  if not found:
    return None
  seconds = timing.in_turns([sample for _, sample in found], asked.rounds)
  medians = [statistics.median(s) for s in seconds]
  best = min(range(len(found)), key=medians.__getitem__)
  microseconds = round(1e6 * medians[best], 2)
  return key._asdict() | dict(tile=found[best][0], microseconds=microseconds)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  try:
    asked = command_line.parse_flags(sys.argv[1:] if argv is None else argv, Command)
    check(asked.size, asked.rank, asked.operations)
    path = pathlib.Path(asked.table)
    table = _read(path)
    device = tiles.present()
    if device.platform not in tiles.PLATFORMS:
      raise errors.ConfigError(
        f'the present device is {device.kind!r} ({device.platform}); tiles are tuned on'
        f' a TPU or a GPU'
      )
  except errors.ConfigError as e:
    print(f'error: {e}', file=sys.stderr)
    return errors.EXIT_BAD_CONFIG
  for key, job in tuned(asked).items():
    row = tune(table, key, job, asked)
    print(f'{key}: no tile fits' if row is None else json.dumps(row))
    if row is not None:
      table = extended(table, row)
      write(table, path)
  return errors.EXIT_DONE


def extended(table: tiles.Table, row: dict[str, Any]) -> tiles.Table:
  """The table with a row in place of an older one of the same key."""
  key = tiles.Key(*(row[name] for name in tiles.Key._fields))
  return table._replace(tuned=table.tuned | {key: row})


def write(table: tiles.Table, path: pathlib.Path) -> None:
  """Replaces a table's file as a whole."""
  new = path.with_name(path.name + '.new')
  new.write_text(tiles.render(table), encoding='utf-8')
  os.replace(new, path)


def _read(path: pathlib.Path) -> tiles.Table:
  try:
    return tiles.read(path)
  except (OSError, ValueError) as e:
    raise errors.ConfigError(f'table: {e}') from e


if __name__ == '__main__':
  sys.exit(main())
