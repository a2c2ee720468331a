"""Optimizer steps and whole training steps of several methods, timed in turns."""

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lrjax
from experiments.contestants import (
  STEADY,
  Contestant,
  Method,
  OptimizerStep,
  TorchStep,
  TrainingStep,
)
from experiments.memory import abstract_params, with_rank
from lrjax.models.llama_config import LlamaConfig
from lrjax.views import leaf_path

NOTE = (
  'GB/s are of the bytes that a steady step of an optimizer must move: gradients read,'
  ' weights and state, bases too, read and written.'
)
TORCH = {'galore-torch': 'galore_torch', 'apollo-torch': 'apollo_torch'}


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


def tokens_for(config: LlamaConfig, count: int, length: int) -> jax.Array:
  """Random ids (count / length, length + 1)."""
  rng = np.random.default_rng(0)
  ids = rng.integers(0, config.vocab_size, (count // length, length + 1))
  return jnp.asarray(ids, jnp.int32)


def with_layers(config: LlamaConfig, layers: int | None) -> LlamaConfig:
  """The model with so many layers; None: all."""
  return config if layers is None else dataclasses.replace(config, num_layers=layers)


def optimizer_steps(
  config: LlamaConfig, rank: int, names: Sequence[str] = ()
) -> dict[str, Contestant]:
  """The contestants of `optimizers`, and without names those of torch; compiled."""
  grads = gradients(abstract_params(config, 'float32'))
  found: dict[str, Contestant] = {
    name: OptimizerStep(m, grads, grads) for name, m in optimizers(rank, names).items()
  }
  if not names:
    there = [name for name, module in TORCH.items() if find_spec(module)]
    found |= {name: TorchStep(name, rank, grads) for name in there}
  return found


def training_steps(
  config: LlamaConfig, tokens: jax.Array, rank: int, names: Sequence[str] = ()
) -> dict[str, Contestant]:
  """The contestants of `trainings` on one batch, compiled."""
  train = lambda m: TrainingStep(m, config, tokens)
  return {name: train(m) for name, m in trainings(rank, names).items()}


def measure(
  timed: Mapping[str, Contestant], rounds: int, gap: int, copied: float
) -> dict[str, dict[str, Any]]:
  """Times all methods in turns; returns medians, and ratios to the first.

  Args:
    timed: by name.
    rounds: how often; medians are over them.
    gap: steps between refreshes over which their cost is spread.
    copied: bytes a second that the device copies.
  """
  for _ in range(rounds + 1):
    for t in timed.values():
      t.round()
  # The first round warms caches up and does not count.
  best = lambda t: np.array(t.steady[STEADY:]).reshape(-1, STEADY).min(axis=1)
  spread = lambda t: best(t) * (1 - 1 / gap) + np.array(t.refresh[1:]) / gap
  first = next(iter(timed.values()))
  found = {}
  for name, t in timed.items():
    steady = float(np.median(best(t)))
    bytes_per_s = None if t.moved_bytes is None else t.moved_bytes / steady
    found[name] = dict(
      steady_ms=1e3 * steady,
      steady_ratio=float(np.median(best(t) / best(first))),
      refresh_ms=1e3 * float(np.median(t.refresh[1:])),
      amortized_ms=1e3 * float(np.median(spread(t))),
      amortized_ratio=float(np.median(spread(t) / spread(first))),
      bytes_per_s=bytes_per_s,
      of_copy=None if bytes_per_s is None else bytes_per_s / copied,
      state_bytes=t.state_bytes,
      temporary_bytes=t.temporary_bytes,
      refresh_temporary_bytes=t.refresh_temporary_bytes,
      compile_seconds=t.compile_seconds,
    )
  return found


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
  """The results in Markdown."""
  lines = [
    '| method | steady ms | of the first | refresh ms | amortized ms | of the first'
    ' | GB/s, of the copy | state MiB | temporaries MiB, steady / refresh | compile s |',
    '|---|---|---|---|---|---|---|---|---|---|',
  ]
  mib = lambda n: '–' if n is None else f'{n / 2**20:.1f}'
  for name, f in found.items():
    temporaries = mib(f['temporary_bytes']), mib(f['refresh_temporary_bytes'])
    speed = '–'
    if f['bytes_per_s'] is not None:
      speed = f'{f["bytes_per_s"] / 1e9:.1f}, {f["of_copy"]:.2f}'
    lines.append(
      f'| {name} | {f["steady_ms"]:.1f} | {f["steady_ratio"]:.2f} |'
      f' {f["refresh_ms"]:.0f} | {f["amortized_ms"]:.1f} |'
      f' {f["amortized_ratio"]:.2f} | {speed} | {mib(f["state_bytes"])} |'
      f' {" / ".join(temporaries)} | {f["compile_seconds"]:.1f} |'
    )
  return '\n'.join(lines)
