"""Tunes kernels on the present device: `python -m experiments.tune --size 350m`.

Every operation runs on stacks of the matrices of one model with each of the tiles that
lrjax/kernels/tiles.json lists for the platform, in turns within one process. The fastest
one is added to that table, under the device's name, and is what kernels run with there
from then on.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import command_line, errors
from lrjax import kernels
from lrjax.kernels import tiles
from lrjax.models.llama_config import LLAMA_SIZES

CALLS = 20


@dataclasses.dataclass(frozen=True)
class Command:
  """Flags of this command.

  Attributes:
    size: of the model whose matrices are taken.
    rank: of the projections.
    dtype: of gradients and weights.
    operations: with commas between; empty: all.
    stack: matrices in a stack; enough that no cache holds them.
    rounds: how often each tile is timed; medians are over them.
    table: the file that is read and extended.
  """

  size: str = '350m'
  rank: int = 256
  dtype: str = 'bfloat16'
  operations: tuple[str, ...] = ()
  stack: int = 8
  rounds: int = 5
  table: str = str(tiles.PATH)


class Tunable(NamedTuple):
  """How an operation is run for the sake of its time.

  Attributes:
    make: `(key, d, k, r, dtype) -> (donated, fixed)`, trees of arrays of one matrix.
    run: `(donated, fixed, implementation) -> (donated, results)`.
  """

  make: Callable
  run: Callable


class Job(NamedTuple):
  """An operation on matrices (d, k) at rank r."""

  operation: str
  sizes: dict[str, int]
  dtype: str


def _project_inputs(key: jax.Array, d: int, k: int, r: int, dtype: Any) -> tuple:
  return (), (_basis(d, r), jax.random.normal(key, (d, k), dtype))


def _project(_: tuple, fixed: tuple, implementation: str) -> tuple:
  return (), kernels.project(*fixed, implementation=implementation)


def _adam_inputs(key: jax.Array, d: int, k: int, r: int, dtype: Any) -> tuple:
  g = jax.random.normal(key, (d, k), dtype)
  return (jnp.zeros((r, k)), jnp.zeros((r, k))), (_basis(d, r), g, jnp.int32(0))


def _adam(moments: tuple, fixed: tuple, implementation: str) -> tuple:
  p, g, count = fixed
  n, mu, nu = kernels.low_rank_adam(
    p, g, moments[0], moments[1], count, implementation=implementation
  )
  return (mu, nu), n


def _lift_inputs(key: jax.Array, d: int, k: int, r: int, dtype: Any) -> tuple:
  w = jax.random.normal(key, (d, k), dtype)
  return w, (_basis(d, r), jax.random.normal(key, (r, k)))


def _lift(w: jax.Array, fixed: tuple, implementation: str) -> tuple:
  how = dict(rate=1e-3, decay=0.1, implementation=implementation)
  return kernels.lift_and_apply(w, *fixed, **how), ()


def _basis(d: int, r: int) -> jax.Array:
  return jnp.eye(d, r)


TUNABLE = {
  'project': Tunable(_project_inputs, _project),
  'low_rank_adam': Tunable(_adam_inputs, _adam),
  'lift_and_apply': Tunable(_lift_inputs, _lift),
}


def jobs(asked: Command) -> list[Job]:
  """What is tuned, one job for each operation and shape class."""
  config = LLAMA_SIZES[asked.size]
  d, r = config.hidden_size, asked.rank
  found = {}
  for operation in asked.operations or TUNABLE:
    for k in (config.hidden_size, config.intermediate_size):
      job = Job(operation, dict(d=d, k=k, r=r), asked.dtype)
      found[operation, tiles.shape_class(job.sizes)] = job
  return [*found.values()]


def sampler(job: Job, platform: str, stack: int) -> Callable[[], float]:
  """A function that runs a job some times and returns seconds per run.

  Raises:
    ValueError: if no tile fits.
  """
  tunable = TUNABLE[job.operation]
  keys = jax.random.split(jax.random.key(0), stack)
  make = lambda key: tunable.make(key, *job.sizes.values(), jnp.dtype(job.dtype))
  donated, fixed = jax.jit(jax.vmap(make))(keys)
  run = jax.vmap(lambda donated, fixed: tunable.run(donated, fixed, platform))
  compiled = jax.jit(run, donate_argnums=0).lower(donated, fixed).compile()
  state = [donated, None]

  def sample() -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
      state[0], state[1] = compiled(state[0], fixed)
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / CALLS

  sample()  # warms up and does not count
  return sample


def tune(
  table: tiles.Table,
  job: Job,
  device: tiles.Device,
  rounds: int,
  prepare: Callable[[Job, str], Callable[[], float]],
) -> dict[str, Any] | None:
  """The row that a job adds to the table; None where no tile fits."""
  samplers = []
  for tile in table.candidates[job.operation][device.platform]:
    with tiles.only(tile):
      # Whatever a compiler says against a tile, another one may do.
      try:
        samplers.append((tile, prepare(job, device.platform)))
      except (ValueError, jax.errors.JaxRuntimeError) as e:
        print(f'{job.operation}, {tile}: {str(e)[:200]}', file=sys.stderr)
  # In turns, so that a device whose clock drifts slows all of them alike.
  seconds = [[sample() for _, sample in samplers] for _ in range(rounds)]
  if not samplers:
    return None
  medians = [statistics.median(column) for column in zip(*seconds)]
  best = min(range(len(samplers)), key=medians.__getitem__)
  return dict(
    operation=job.operation,
    device=device.kind,
    shape=tiles.shape_class(job.sizes),
    dtype=job.dtype,
    tile=samplers[best][0],
    microseconds=round(1e6 * medians[best], 2),
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  try:
    asked = command_line.parse_flags(sys.argv[1:] if argv is None else argv, Command)
    if asked.size not in LLAMA_SIZES:
      raise errors.ConfigError(f'size: {asked.size!r}; known: {", ".join(LLAMA_SIZES)}')
    if unknown := {*asked.operations} - {*TUNABLE}:
      raise errors.ConfigError(f'operations: {unknown}; known: {", ".join(TUNABLE)}')
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
  prepare = lambda job, platform: sampler(job, platform, asked.stack)
  for job in jobs(asked):
    row = tune(table, job, device, asked.rounds, prepare)
    print(f'{job}: no tile fits' if row is None else json.dumps(row))
    if row is not None:
      table = extended(table, row)
      write(table, path)
  return errors.EXIT_DONE


def extended(table: tiles.Table, row: dict[str, Any]) -> tiles.Table:
  """The table with a row in place of an older one of the same key."""
  key = (row['operation'], row['device'], row['shape'], row['dtype'])
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
