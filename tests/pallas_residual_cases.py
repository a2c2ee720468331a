"""Rows for pallas_test: 8-bit Adam, residuals, column scores."""

import numpy as np

from lrjax import kernels
from lrjax.codecs.dynamic import Dynamic8, dynamic_map
from lrjax.moments import AdamState
from tests.pallas_cases import Case, basis, canonical, leaf, normal


def transposed(canonical_oracle):
  """An oracle whose result is a leaf, from one of matrices (d, k)."""
  return lambda p, g, *rest, side: canonical(
    canonical_oracle(p, canonical(g, side), *rest), side
  )


def make_parts(rng, d, k, r, side):
  return basis(rng, d, r), leaf(rng, d, k, side), normal(rng, r, k), normal(rng, 1, k)


def make_signed(rng, d, k, r, side):
  p, y, x = basis(rng, d, r), normal(rng, r, k), normal(rng, r, k)
  g, inside = normal(rng, d, k), p @ y
  # No entry so small that roundings have a say in its sign.
  g = np.where(np.abs(g - inside) < 0.05, inside + 0.1, g).astype(np.float32)
  return p, canonical(g, side), x, normal(rng, 1, k), y


def make_8bit(rng, d, k, r, side):
  del d, side
  codes = lambda: rng.integers(0, 256, (r, k)).astype(np.uint8)
  scales = lambda: rng.uniform(0.5, 2, -(-r * k // 8)).astype(np.float32)
  moments = (Dynamic8(codes(), scales()) for _ in range(2))
  return normal(rng, r, k), AdamState(np.int32(4), *moments)


def run_8bit(g, state, *, side, implementation):
  """Update and scales: codes come down to roundings, see adam_8bit_test."""
  u, new = kernels.adam_8bit(g, state, implementation=implementation)
  return u, new.mu.scale, new.nu.scale


def adam_oracle(g, state, side):
  def decoded(x, signed):  # blocks of 8 along the columns
    scale = np.repeat(x.scale, 8)[: g.size].reshape(g.T.shape).T
    return dynamic_map(signed).astype(np.float64)[x.codes] * scale

  def largest(x):
    flat = np.abs(x).T.reshape(-1)
    return np.pad(flat, (0, -flat.size % 8)).reshape(-1, 8).max(axis=1)

  m = 0.9 * decoded(state.mu, True) + 0.1 * g
  v = 0.999 * decoded(state.nu, False) + 0.001 * g**2
  u = (m / (1 - 0.9**5)) / (np.sqrt(v / (1 - 0.999**5)) + 1e-8)
  return u, largest(m), largest(v)


CASES = [
  Case(
    'lift_and_add',
    run=kernels.lift_and_add,
    make=make_parts,
    oracle=transposed(lambda p, g, x, c: p @ x + c * g),
    leaves=(1,),
  ),
  Case(
    'lift_and_add of a sign',
    run=kernels.lift_and_add,
    make=make_signed,
    oracle=transposed(lambda p, g, x, c, y: p @ x + c * np.sign(g - p @ y)),
    leaves=(1,),
  ),
  Case(
    'column scores',
    run=kernels.column_scores,
    make=lambda rng, d, k, r, side: (basis(rng, d, d), leaf(rng, d, k, side)),
    oracle=lambda q, g, side: np.abs(q.T @ canonical(g, side)).sum(axis=1),
    leaves=(1,),
  ),
  Case(
    'adam 8-bit',
    run=run_8bit,
    make=make_8bit,
    oracle=adam_oracle,
    leaves=(0,),
    sided=False,
  ),
]
