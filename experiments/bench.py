"""Times methods side by side: `python -m experiments.bench --size 60m`.

Every method works on one model from the same gradients, or with `--tokens` trains it on
the same batch, in turns within one process, so that a machine whose speed drifts slows all
of them alike; quote the ratios. A round of a method is a fresh state, one step that fits
the bases, and three that do not. With `--kernels` the operations of `lrjax.kernels` are
timed alone instead, on stacks of the model's matrices: XLA's form, and the kernel where
there is one for the device. `make bench` writes three tables to runs/.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from experiments import (
  bench_operations,
  bench_steps,
  command_line,
  errors,
  jobs,
  one_process,
  provenance,
  rundir,
  timing,
)
from experiments.optimizers import METHODS
from lrjax.models.llama_config import LLAMA_SIZES


@dataclasses.dataclass(frozen=True)
class Command:
  """Flags of this command.

  Attributes:
    size: of the model.
    rank: of the projections; none: a quarter of the model's width.
    rounds: how often each method is timed; medians are over them.
    layers: keep only so many layers; none: all.
    methods: of `experiments.optimizers`, with commas between, against AdamW; empty: forms
      of GaLore, and with torch installed galore-torch and apollo-torch.
    tokens: in the batch of a whole training step; 0: the optimizer's step alone.
    length: of its sequences.
    dtype: of the arithmetic of whole training steps; of the gradients and weights that
      kernels are timed on.
    gap: steps between refreshes over which their cost is spread.
    kernels: time operations alone, each form of each in turns.
    megabytes: MiB that a call of one must move, in a stack of as many matrices; more than
      caches hold, and enough that a call takes longer than to start it.
    out: a directory for bench.json and bench.md; none: they are printed alone.
  """

  size: str = '60m'
  rank: int | None = None
  rounds: int = 5
  layers: int | None = None
  methods: tuple[str, ...] = ()
  tokens: int = 0
  length: int = 256
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  gap: int = 200
  kernels: bool = False
  megabytes: int = 512
  out: str | None = None


def run(asked: Command) -> dict[str, Any]:
  """Times what is asked for; returns what was found and where it comes from."""
  config = bench_steps.with_layers(LLAMA_SIZES[asked.size], asked.layers)
  rank = asked.rank or config.hidden_size // 4
  if asked.kernels:
    todo = jobs.jobs(asked.size, rank, asked.dtype)
    products = sorted({job.products for job in todo})
    ceilings = timing.ceilings(asked.rounds, products)
    found = bench_operations.measure(todo, asked.rounds, asked.megabytes, ceilings)
  else:
    ceilings = timing.ceilings(asked.rounds)
    if asked.tokens:
      config = dataclasses.replace(config, dtype=asked.dtype)
      tokens = bench_steps.tokens_for(config, asked.tokens, asked.length)
      timed = bench_steps.training_steps(config, tokens, rank, asked.methods)
    else:
      timed = bench_steps.optimizer_steps(config, rank, asked.methods)
    copied = ceilings['bytes_per_s']
    found = bench_steps.measure(timed, asked.rounds, asked.gap, copied)
  return dict(
    asked=dataclasses.asdict(asked),
    found=found,
    ceilings=ceilings,
    machine=provenance.machine(),
    versions=provenance.versions(),
    commit=provenance.commit(),
  )


def report(result: Mapping[str, Any]) -> str:
  """Table, ceilings, and where they come from, in Markdown."""
  c, where = result['ceilings'], result['machine'] | result['versions']
  mode = bench_operations if result['asked']['kernels'] else bench_steps
  flops = [f'{n / 1e9:.0f} GFLOP/s in {kind}' for kind, n in c['flops'].items()]
  return '\n\n'.join(
    [
      '`' + json.dumps(result['asked']) + '`',
      mode.table(result['found']),
      mode.NOTE,
      f'The device copied {c["bytes_per_s"] / 1e9:.1f} GB/s and multiplied'
      f' {", ".join(flops)} (default precision, or the highest of float32), in the same'
      ' run.',
      f'Commit {result["commit"]}. ' + json.dumps(where),
    ]
  )


def check(asked: Command) -> None:
  """Raises ConfigError for what is not there or does not divide."""
  jobs.check(asked.size, 1 if asked.rank is None else asked.rank)
  if unknown := {*asked.methods} - {*METHODS}:
    raise errors.ConfigError(f'methods: {unknown}; known: {", ".join(METHODS)}')
  if asked.kernels and (asked.methods or asked.tokens):
    raise errors.ConfigError('kernels: are timed alone; leave out methods and tokens')
  if asked.tokens % asked.length or asked.tokens < 0:
    raise errors.ConfigError(
      f'tokens: {asked.tokens} is no multiple of length={asked.length}'
    )
  longest = LLAMA_SIZES[asked.size].max_seq_len
  if asked.length > longest:
    raise errors.ConfigError(
      f'length: {asked.length} is more than the {longest} of {asked.size}'
    )


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  try:
    asked = command_line.parse_flags(sys.argv[1:] if argv is None else argv, Command)
    check(asked)
  except errors.ConfigError as e:
    print(f'error: {e}', file=sys.stderr)
    return errors.EXIT_BAD_CONFIG
  one_process()
  result = run(asked)
  print(report(result))
  if asked.out is not None:
    out = pathlib.Path(asked.out)
    out.mkdir(parents=True, exist_ok=True)
    rundir.write_json(out / 'bench.json', result)
    (out / 'bench.md').write_text(report(result) + '\n')
  return errors.EXIT_DONE


if __name__ == '__main__':
  sys.exit(main())
