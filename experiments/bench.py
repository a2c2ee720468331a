"""Times methods side by side: `python -m experiments.bench --size 60m`.

Every method works on one model from the same gradients, or with `--tokens` trains it on
the same batch, in turns within one process, so that a machine whose speed drifts slows all
of them alike; quote the ratios. A round of a method is a fresh state, one step that fits
the bases, and three that do not. `make bench` writes both tables to runs/bench/.
"""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lrjax
from experiments import command_line, errors, provenance, rundir
from experiments.contestants import (
  STEADY,
  Contestant,
  Method,
  OptimizerStep,
  TorchStep,
  TrainingStep,
  tokens_for,
  with_layers,
)
from experiments.memory import abstract_params, with_rank
from experiments.optimizers import METHODS
from lrjax.models.llama_config import LLAMA_SIZES, LlamaConfig
from lrjax.views import leaf_path

TORCH = {'galore-torch': 'galore_torch', 'apollo-torch': 'apollo_torch'}


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
    dtype: of the arithmetic of whole training steps.
    gap: steps between refreshes over which their cost is spread.
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
  out: str | None = None


def optimizers(rank: int, names: Sequence[str] = ()) -> dict[str, Method]:
  """What is compared alone; the first one is what ratios refer to.

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
    'optax.contrib.galore': Method(_contrib(rank)),
    'lrjax.galore, svd': Method(ours(basis='svd')),
    'lrjax.galore': Method(ours()),
    'lrjax.galore, long side': Method(ours(side='long')),
    'lrjax.galore, stacked': Method(ours(), stacked=True),
    'lrjax.galore, randomized': Method(ours(basis='randomized_svd')),
    'lrjax.galore, subspace': Method(ours(basis='subspace_iteration')),
    'lrjax.galore, subspace, of projected gradients': Method(
      ours(basis='subspace_iteration'), projected=True
    ),
  }


def trainings(rank: int, names: Sequence[str] = ()) -> dict[str, Method]:
  """What is compared in whole training steps."""
  if names:
    return optimizers(rank, names)
  ours = lrjax.galore(1e-2, rank)
  thin = lrjax.galore(1e-2, rank, basis='subspace_iteration')
  return {
    'optax.adamw': Method(optax.adamw(1e-3)),
    'lrjax.galore': Method(ours),
    'lrjax.galore, projected backward': Method(ours, projected=True),
    'lrjax.galore, sketched refresh': Method(thin, projected=True, sketched=True),
  }


def _contrib(rank: int) -> optax.GradientTransformation:
  return optax.contrib.galore(1e-2, rank, weight_dimension_numbers=_hidden_only)


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


def contestants(asked: Command) -> dict[str, Contestant]:
  """All that are timed, compiled."""
  config = with_layers(LLAMA_SIZES[asked.size], asked.layers)
  rank = asked.rank or config.hidden_size // 4
  if asked.tokens:
    config = dataclasses.replace(config, dtype=asked.dtype)
    tokens = tokens_for(config, asked.tokens, asked.length)
    train = lambda m: TrainingStep(m, config, tokens)
    return {name: train(m) for name, m in trainings(rank, asked.methods).items()}
  grads = gradients(abstract_params(config, 'float32'))
  found: dict[str, Contestant] = {
    name: OptimizerStep(m, grads, grads)
    for name, m in optimizers(rank, asked.methods).items()
  }
  if not asked.methods:
    there = [name for name, module in TORCH.items() if find_spec(module)]
    found |= {name: TorchStep(name, rank, grads) for name in there}
  return found


def run(asked: Command, say: Callable[[str], None] = print) -> dict[str, Any]:
  """Times all methods in turns; returns medians, ratios and where they come from."""
  timed = contestants(asked)
  for _ in range(asked.rounds + 1):
    for t in timed.values():
      t.round()
  # The first round warms caches up and does not count.
  best = lambda t: np.array(t.steady[STEADY:]).reshape(-1, STEADY).min(axis=1)
  spread = lambda t: best(t) * (1 - 1 / asked.gap) + np.array(t.refresh[1:]) / asked.gap
  first = next(iter(timed.values()))
  found = {}
  for name, t in timed.items():
    found[name] = dict(
      steady_ms=1e3 * float(np.median(best(t))),
      steady_ratio=float(np.median(best(t) / best(first))),
      refresh_ms=1e3 * float(np.median(t.refresh[1:])),
      amortized_ms=1e3 * float(np.median(spread(t))),
      amortized_ratio=float(np.median(spread(t) / spread(first))),
      state_bytes=t.state_bytes,
      temporary_bytes=t.temporary_bytes,
      refresh_temporary_bytes=t.refresh_temporary_bytes,
      compile_seconds=t.compile_seconds,
    )
    say(f'{name}: {found[name]}')
  return dict(
    asked=dataclasses.asdict(asked),
    found=found,
    ceilings=ceilings(asked.rounds),
    machine=provenance.machine(),
    versions=provenance.versions(),
    commit=provenance.commit(),
  )


def ceilings(rounds: int) -> dict[str, float]:
  """What the device at hand reaches: bytes copied and float32 operations a second."""
  large = jax.devices()[0].platform != 'cpu'
  x = jnp.ones((2**29 if large else 2**25,), jnp.float32)
  n = 8192 if large else 1536
  a = jnp.ones((n, n), jnp.float32)
  seconds = dict(copied=[], multiplied=[])
  work = dict(copied=(jax.jit(lambda x: x + 1), x), multiplied=(jax.jit(jnp.dot), a, a))
  for _ in range(rounds + 1):
    for name, (f, *args) in work.items():
      start = time.perf_counter()
      jax.block_until_ready(f(*args))
      seconds[name].append(time.perf_counter() - start)
  least = {name: min(s[1:]) for name, s in seconds.items()}
  copied, multiplied = 2 * x.nbytes / least['copied'], 2 * n**3 / least['multiplied']
  return dict(bytes_per_s=copied, flops=multiplied)


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
  """The results in Markdown."""
  lines = [
    '| method | steady ms | of the first | refresh ms | amortized ms | of the first'
    ' | state MiB | temporaries MiB, steady / refresh | compile s |',
    '|---|---|---|---|---|---|---|---|---|',
  ]
  mib = lambda n: '–' if n is None else f'{n / 2**20:.1f}'
  for name, f in found.items():
    temporaries = mib(f['temporary_bytes']), mib(f['refresh_temporary_bytes'])
    lines.append(
      f'| {name} | {f["steady_ms"]:.1f} | {f["steady_ratio"]:.2f} |'
      f' {f["refresh_ms"]:.0f} | {f["amortized_ms"]:.1f} |'
      f' {f["amortized_ratio"]:.2f} | {mib(f["state_bytes"])} |'
      f' {" / ".join(temporaries)} | {f["compile_seconds"]:.1f} |'
    )
  return '\n'.join(lines)


def report(result: Mapping[str, Any]) -> str:
  """Table, ceilings, and where they come from, in Markdown."""
  c, where = result['ceilings'], result['machine'] | result['versions']
  return '\n\n'.join(
    [
      '`' + json.dumps(result['asked']) + '`',
      table(result['found']),
      f'The device copied {c["bytes_per_s"] / 1e9:.1f} GB/s and multiplied'
      f' {c["flops"] / 1e9:.0f} GFLOP/s (float32, default precision) in the same run.',
      f'Commit {result["commit"]}. ' + json.dumps(where),
    ]
  )


def check(asked: Command) -> None:
  """Raises ConfigError for what is not there or does not divide."""
  if asked.size not in LLAMA_SIZES:
    raise errors.ConfigError(f'size: {asked.size!r}; known: {", ".join(LLAMA_SIZES)}')
  if unknown := {*asked.methods} - {*METHODS}:
    raise errors.ConfigError(f'methods: {unknown}; known: {", ".join(METHODS)}')
  if asked.tokens % asked.length or asked.tokens < 0:
    raise errors.ConfigError(
      f'tokens: {asked.tokens} is no multiple of length={asked.length}'
    )
  config: LlamaConfig = LLAMA_SIZES[asked.size]
  if asked.length > config.max_seq_len:
    raise errors.ConfigError(
      f'length: {asked.length} is more than the {config.max_seq_len} of {asked.size}'
    )


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  try:
    asked = command_line.parse_flags(sys.argv[1:] if argv is None else argv, Command)
    check(asked)
  except errors.ConfigError as e:
    print(f'error: {e}', file=sys.stderr)
    return errors.EXIT_BAD_CONFIG
  result = run(asked, say=lambda text: None)
  print(report(result))
  if asked.out is not None:
    out = pathlib.Path(asked.out)
    out.mkdir(parents=True, exist_ok=True)
    rundir.write_json(out / 'bench.json', result)
    (out / 'bench.md').write_text(report(result) + '\n')
  return errors.EXIT_DONE


if __name__ == '__main__':
  sys.exit(main())
