"""What bases catch of real gradients, and their time: `python -m experiments.energy`.

Trains a preset, takes the gradients of all its kernels every so many steps, and prints the
energy :math:`\\|P^\\top G\\|_F^2` that each basis catches of the best any basis of its rank
can. Then times a fit of each in turns, on one matrix with a decaying spectrum.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lrjax
from experiments import command_line, one_process
from experiments.entry import run_command
from lrjax import bases
from lrjax.low_rank import unit_scale
from lrjax.types import Basis
from lrjax.views import leaf_path


@dataclasses.dataclass(frozen=True)
class Command(command_line.Command):
  """Flags of this command.

  Attributes:
    takes: how often gradients are taken; 0: never.
    every: training steps between.
    fraction: rank over the shorter side.
    rounds: how often each basis is timed; 0: never.
    sides: of the matrix that is timed.
    rank: of its bases.
  """

  takes: int = 5
  every: int = 50
  fraction: float = 0.25
  rounds: int = 5
  sides: tuple[int, ...] = (1024, 2736)
  rank: int = 256


def compared(rank: int) -> dict[str, Basis]:
  """The bases, by the names of the table."""
  plain = ('eigh', 'randomized_svd', 'subspace_iteration', 'random_orthogonal')
  return {name: bases.NAMES[name](rank) for name in plain} | {
    'randomized_svd, q = 0': lrjax.randomized_svd(rank, power_steps=0),
    'dct': lrjax.dct(rank),
    'dct, l2': lrjax.dct(rank, norm='l2'),
    'gaussian': lrjax.gaussian(rank),
  }


def gradients(experiment: Any, takes: int, every: int) -> list[dict[tuple, Any]]:
  """Gradients of all kernels at several steps, {(d, k): (n, d, k)}, d <= k."""
  from experiments import program as programs
  from experiments.data import load_corpus, train_batches
  from experiments.evaluate import place

  program = programs.build(experiment)
  batches = iter(train_batches(load_corpus(experiment.data), experiment.seed))
  state, found = program.init(), []
  with jax.set_mesh(program.mesh):
    for step in range(takes * every + 1):
      tokens = place(next(batches), program)['tokens']
      if step and step % every == 0:
        grads = program.gradients(state['params'], state['fixed'], tokens)
        found.append(_kernels(grads))
      state, _ = program.step(state, tokens)
  return found


def _kernels(grads: Any) -> dict[tuple, Any]:
  found: dict[tuple, list] = {}
  for path, x in jax.tree.leaves_with_path(grads):
    if lrjax.hidden_kernels(leaf_path(path), x):
      g = x.reshape(-1, *x.shape[-2:]).astype(jnp.float32)
      g = g if g.shape[1] <= g.shape[2] else jnp.swapaxes(g, 1, 2)
      found.setdefault(g.shape[1:], []).append(g)
  return {sides: jnp.concatenate(gs) for sides, gs in found.items()}


def shares(taken: Sequence[dict[tuple, Any]], fraction: float) -> dict[str, np.ndarray]:
  """Energy relative to the SVD's, of every basis on every matrix taken but the first.

  Each fit starts from the basis of the gradient before; those of subspace iteration, which
  alone makes use of it, also from the first gradient's ('far') and from none ('cold').
  """
  found: dict[str, list] = {}
  for d, k in taken[0]:
    series = [t[d, k] for t in taken]
    rank = max(1, int(d * fraction))
    best = [_best(g, rank) for g in series]
    for name, basis in compared(rank).items():
      fit, one = _fitting(basis), basis.init(d, k, jnp.float32)
      cold = jnp.broadcast_to(one, (len(series[0]), *one.shape))
      first, _ = fit(0, series[0], cold)
      starts = {name: first}
      if name == 'subspace_iteration':
        starts |= {f'{name}, far': first, f'{name}, cold': cold}
      for label, b in starts.items():
        for step, g in enumerate(series[1:], 1):
          new, caught = fit(step, g, b)
          b = new if label == name else b
          found.setdefault(label, []).append(caught / best[step])
  return {name: np.concatenate(parts) for name, parts in found.items()}


def _fitting(basis: Basis) -> Callable:
  """`(seed, g (n, d, k), b) -> (b, energy caught (n,))`, compiled."""
  assert basis.matrix is not None

  def one(key: jax.Array, g: jax.Array, b: Any) -> tuple[Any, jax.Array]:
    b = basis.fit(key, unit_scale(g), b)
    # Of what P spans: the columns of a sketch are not orthonormal.
    q = lrjax.householder_qr(basis.matrix(b, len(g)))
    return b, jnp.sum(jnp.square(q.T @ g))

  def every(seed: int, g: jax.Array, b: Any) -> tuple[Any, jax.Array]:
    return jax.vmap(one)(jax.random.split(jax.random.key(seed), len(g)), g, b)

  return jax.jit(every)


def _best(g: jax.Array, rank: int) -> np.ndarray:
  s = np.linalg.svd(np.asarray(g), compute_uv=False)[:, :rank]
  return np.square(s).sum(axis=1)


def seconds(sides: Sequence[int], rank: int, rounds: int) -> dict[str, list[float]]:
  """Seconds of a fit of each basis, measured in turns; the first is the SVD alone."""
  d, k = sorted(sides)
  rng = np.random.default_rng(0)
  g = rng.standard_normal((d, k), np.float32) * np.exp(-4 * np.arange(k) / k)[None]
  g, key = unit_scale(jnp.asarray(g, jnp.float32)), jax.random.key(0)
  svd = lambda key, g, b: jnp.linalg.svd(g, full_matrices=False)
  runs: dict[str, tuple[Callable, Any]] = {'jnp.linalg.svd': (jax.jit(svd), None)}
  for name, basis in compared(rank).items():
    fit = jax.jit(basis.fit)
    # Once fitted: a warm start is what later refreshes have.
    runs[name] = fit, fit(key, g, basis.init(d, k, g.dtype))
  took: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(rounds + 1):
    for name, (fit, b) in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(fit(key, g, b))
      took[name].append(time.perf_counter() - start)
  return {name: times[1:] for name, times in took.items()}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  words = sys.argv[1:] if argv is None else argv
  one_process()
  return run_command(lambda preemption: report(words))


def report(words: Sequence[str]) -> None:
  """Prints the tables that the command line asks for."""
  from experiments.arguments import parse_args
  from experiments.optimizers import METHODS

  asked, (experiment,) = parse_args(words, METHODS, command=Command)
  if asked.takes:
    found = shares(gradients(experiment, asked.takes, asked.every), asked.fraction)
    print("| basis | matrices | mean of the SVD's energy | least |\n|---|---|---|---|")
    for name, x in found.items():
      print(f'| {name} | {x.size} | {x.mean():.4f} | {x.min():.4f} |')
  if asked.rounds:
    took = seconds(asked.sides, asked.rank, asked.rounds)
    base = np.array(took['jnp.linalg.svd'])
    print('| basis | ms | times faster than the SVD |\n|---|---|---|')
    for name, times in took.items():
      ratio = np.median(base / np.array(times))
      print(f'| {name} | {1e3 * np.median(times):.1f} | {ratio:.1f} |')


if __name__ == '__main__':
  sys.exit(main())
