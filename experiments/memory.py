"""Bytes of weights, gradients and optimizer state: `python -m experiments.memory`.

From shapes alone: nothing is allocated, so 7B takes seconds on a laptop. Each method has
the rank of the GaLore paper and its own settings otherwise. Weights and gradients are in
`--dtype`, and so are states where the method lets choose; those of others are in float32 or
packed, as their documentation says.
"""

import dataclasses
import inspect
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import optax

from experiments import command_line, errors

Dtype = Literal['bfloat16', 'float32']
# Their states have a form of their own, whatever the dtype of the weights.
EIGHT_BIT = ('galore_8bit', 'q_galore')


@dataclasses.dataclass(frozen=True)
class Command:
  """Flags of this command.

  Attributes:
    dtype: of weights, gradients and states.
    sizes: which of 60m, 130m, 350m, 1b, 7b.
    methods: of `experiments.optimizers`, with commas between; empty: all.
  """

  dtype: Dtype = 'bfloat16'
  sizes: tuple[str, ...] = ('60m', '130m', '350m', '1b', '7b')
  methods: tuple[str, ...] = ()


class Row(NamedTuple):
  """Bytes of one method at one size."""

  size: str
  method: str
  weights: int
  gradients: int
  state: int
  adam: int


def rows(sizes: Sequence[str], dtype: Dtype, names: Sequence[str] = ()) -> list[Row]:
  """Counts every size with every method.

  Args:
    sizes: names of `LLAMA_SIZES`.
    dtype: of weights, gradients and states.
    names: of methods; none: all.

  Returns:
    One `Row` for each pair.

  Raises:
    ConfigError: for an unknown size or method.
  """
  import lrjax
  from experiments.optimizers import METHODS
  from experiments.presets import PRESETS

  if unknown := {*names} - {*METHODS}:
    raise errors.ConfigError(f'methods: {unknown}; known: {", ".join(METHODS)}')

  out = []
  for size in sizes:
    if f'galore_{size}' not in PRESETS:
      known = [
        name.removeprefix('galore_') for name in PRESETS if name[:7] == 'galore_'
      ]
      raise errors.ConfigError(f'sizes: unknown {size!r}; known: {", ".join(known)}')
    experiment = PRESETS[f'galore_{size}']
    params = abstract_params(experiment.model, dtype)
    for name in names or METHODS:
      c = lrjax.coverage(with_rank(name, _rank(experiment), dtype), params)
      out.append(
        Row(size, name, c.param_bytes, c.param_bytes, c.state_bytes, c.adam_bytes)
      )
  return out


def _rank(experiment: Any) -> int:
  return int(experiment.optimizer.options['rank'])


def with_rank(name: str, rank: int, dtype: Dtype) -> optax.GradientTransformation:
  """A method with states of `dtype` where it lets choose, and its own otherwise."""
  from experiments.optimizers import METHODS

  takes = inspect.signature(METHODS[name]).parameters
  options: dict[str, Any] = dict(rank=rank)
  if name not in EIGHT_BIT:
    options |= dict(inner='adam', state_dtype=dtype)
  return METHODS[name](1e-3, **{k: v for k, v in options.items() if k in takes})


def abstract_params(config: Any, dtype: Dtype) -> Any:
  """The parameter tree of a model as shapes."""
  from flax import nnx

  from lrjax.models.llama import Llama
  from lrjax.modules.nnx import split

  config = dataclasses.replace(config, param_dtype=dtype)
  return split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))[1]


def table(found: Sequence[Row]) -> str:
  """The rows as text, in GB of 10^9 bytes."""
  gb = lambda n: f'{n / 1e9:.3f}'
  cells = [
    ('size', 'method', 'weights', 'gradients', 'state', 'state bytes', 'of Adam')
  ]
  for r in found:
    sizes = (gb(r.weights), gb(r.gradients), gb(r.state), f'{r.state:,}')
    cells.append((r.size, r.method, *sizes, f'{100 * r.state / r.adam:.1f} %'))
  widths = [max(map(len, column)) for column in zip(*cells)]
  lines = ['  '.join(c.rjust(w) for c, w in zip(row, widths)) for row in cells]
  return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  try:
    asked = command_line.parse_flags(sys.argv[1:] if argv is None else argv, Command)
    print(f'GB (10^9 bytes), in {asked.dtype}; states where the method lets choose')
    print(table(rows(asked.sizes, asked.dtype, asked.methods)))
  except errors.ConfigError as e:
    print(f'error: {e}', file=sys.stderr)
    return errors.EXIT_BAD_CONFIG
  return errors.EXIT_DONE


if __name__ == '__main__':
  sys.exit(main())
