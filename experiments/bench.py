"""Times optimizer steps side by side: `python -m experiments.bench --size 60m`.

Every method updates the parameters of one model from the same gradients, in turns within
one process, so that a machine whose speed drifts slows all of them alike; quote the
ratios. A round of a method is a fresh state, one step that fits the bases, and three that
do not.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lrjax
from experiments import command_line, errors, provenance
from experiments.memory import abstract_params, with_rank
from experiments.optimizers import METHODS
from lrjax.models.llama_config import LLAMA_SIZES
from lrjax.models.llama_params import unstack_layers
from lrjax.views import leaf_path

STEADY = 3


@dataclasses.dataclass(frozen=True)
class Command:
  """Flags of this command.

  Attributes:
    size: of the model.
    rank: of the projections.
    rounds: how often each method is timed; medians are over them.
    layers: keep only so many layers; none: all.
    methods: of `experiments.optimizers`, with commas between, against AdamW; empty: forms
      of GaLore.
  """

  size: str = '60m'
  rank: int = 128
  rounds: int = 5
  layers: int | None = None
  methods: tuple[str, ...] = ()


class Method(NamedTuple):
  """A transformation, and whether it gets the layers stacked."""

  tx: optax.GradientTransformation
  stacked: bool = False


def methods(rank: int, names: Sequence[str] = ()) -> dict[str, Method]:
  """What is compared; the first one is what ratios refer to.

  Args:
    rank: of the projections.
    names: of methods, with their own defaults; none: forms of GaLore.
  """
  if names:
    named = {name: Method(with_rank(name, rank, 'float32')) for name in names}
    return {'optax.adamw': Method(optax.adamw(1e-3))} | named
  ours = lambda **more: lrjax.galore(1e-2, rank, **more)
  return {
    'optax.adamw': Method(optax.adamw(1e-3)),
    'optax.contrib.galore': Method(
      optax.contrib.galore(1e-2, rank, weight_dimension_numbers=_hidden_only)
    ),
    'lrjax.galore, svd': Method(ours(basis='svd')),
    'lrjax.galore': Method(ours()),
    'lrjax.galore, long side': Method(ours(side='long')),
    'lrjax.galore, stacked': Method(ours(), stacked=True),
    'lrjax.galore, randomized': Method(ours(basis='randomized_svd')),
    'lrjax.galore, subspace': Method(ours(basis='subspace_iteration')),
  }


def _hidden_only(params: Any) -> Any:
  """What lrjax projects by default; optax alone would take embedding and head too."""
  spec = optax.contrib.GaLoreDimensionNumbers()
  choose = lambda path, x: spec if lrjax.hidden_kernels(leaf_path(path), x) else None
  return jax.tree.map_with_path(choose, params)


def gradients(params: Any, seed: int = 0) -> Any:
  """Full-rank gradients with a decaying spectrum; all layers of a stack differ."""

  def draw(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
    name = jax.tree_util.keystr(path).encode()
    rng = np.random.default_rng([seed, *name])
    g = rng.standard_normal(x.shape, np.float32)
    if g.ndim > 1:
      decay = np.exp(-4 * np.arange(g.shape[-1]) / g.shape[-1])
      g = g * decay.astype(np.float32)
    return jnp.asarray(g * 1e-3)

  return jax.tree.map_with_path(draw, params)


class Timed:
  """One method, compiled, and the seconds its steps took."""

  def __init__(self, method: Method, params: Any, grads: Any):
    self.grads = grads if method.stacked else unstack_layers(grads)
    self.params = jax.tree.map(jnp.zeros_like, self.grads)
    self.init = jax.jit(method.tx.init)
    self.refresh: list[float] = []
    self.steady: list[float] = []

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
      updates, state = method.tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    start = time.perf_counter()
    state = jax.eval_shape(method.tx.init, self.params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(self.params, state, self.grads)
    self.step = lowered.compile()
    self.compile_seconds = time.perf_counter() - start
    self.state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

  def round(self) -> None:
    """One step with a fresh state, then steady ones."""
    state = jax.block_until_ready(self.init(self.params))
    for i in range(1 + STEADY):
      start = time.perf_counter()
      self.params, state = self.step(self.params, state, self.grads)
      jax.block_until_ready((self.params, state))
      seconds = time.perf_counter() - start
      (self.steady if i else self.refresh).append(seconds)


def run(asked: Command, say: Callable[[str], None] = print) -> dict[str, Any]:
  """Times all methods in turns; returns medians, ratios and where they come from."""
  config = LLAMA_SIZES[asked.size]
  if asked.layers:
    config = dataclasses.replace(config, num_layers=asked.layers)
  params = abstract_params(config, 'float32')
  grads = gradients(params)
  compared = methods(asked.rank, asked.methods)
  timed = {name: Timed(m, params, grads) for name, m in compared.items()}
  for _ in range(asked.rounds + 1):
    for t in timed.values():
      t.round()
  first = next(iter(timed.values()))
  found = {}
  for name, t in timed.items():
    # The first round warms caches up and does not count.
    steady = np.array(t.steady[STEADY:]).reshape(-1, STEADY).min(axis=1)
    base = np.array(first.steady[STEADY:]).reshape(-1, STEADY).min(axis=1)
    found[name] = dict(
      steady_ms=1e3 * float(np.median(steady)),
      steady_ratio=float(np.median(steady / base)),
      refresh_ms=1e3 * float(np.median(t.refresh[1:])),
      state_bytes=t.state_bytes,
      compile_seconds=t.compile_seconds,
    )
    say(f'{name}: {found[name]}')
  where = dict(machine=provenance.machine(), versions=provenance.versions())
  return dict(asked=dataclasses.asdict(asked), found=found, **where)


def table(found: dict[str, dict[str, float]]) -> str:
  """The results in Markdown."""
  lines = [
    '| method | steady ms | of optax.adamw | refresh ms | state MiB | compile s |',
    '|---|---|---|---|---|---|',
  ]
  for name, f in found.items():
    lines.append(
      f'| {name} | {f["steady_ms"]:.1f} | {f["steady_ratio"]:.2f} |'
      f' {f["refresh_ms"]:.0f} | {f["state_bytes"] / 2**20:.1f} |'
      f' {f["compile_seconds"]:.1f} |'
    )
  return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  try:
    asked = command_line.parse_flags(sys.argv[1:] if argv is None else argv, Command)
    if asked.size not in LLAMA_SIZES:
      raise errors.ConfigError(f'size: {asked.size!r}; known: {", ".join(LLAMA_SIZES)}')
    if unknown := {*asked.methods} - {*METHODS}:
      raise errors.ConfigError(f'methods: {unknown}; known: {", ".join(METHODS)}')
  except errors.ConfigError as e:
    print(f'error: {e}', file=sys.stderr)
    return errors.EXIT_BAD_CONFIG
  result = run(asked, say=lambda text: None)
  print(json.dumps(result['machine'] | result['versions']))
  print(table(result['found']))
  return errors.EXIT_DONE


if __name__ == '__main__':
  sys.exit(main())
