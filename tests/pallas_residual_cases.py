"""Rows for pallas_test: 8-bit Adam, residuals, column scores."""

import functools

import numpy as np

from lrjax import kernels
from lrjax.codecs.dynamic import Dynamic8, dynamic_map
from lrjax.moments import AdamState
from tests.pallas_cases import Case, basis, canonical, leaf, normal


def transposed(canonical_oracle):
  """An oracle whose first result is a leaf, from one of matrices (d, k)."""

  def oracle(p, g, *rest, side):
    first, *more = canonical_oracle(p, canonical(g, side), *rest)
    return canonical(first, side), *more

  return oracle


def fira(p, g, u, last):
  """Residual in full, its norm measured, at most 1.01 times the last one."""
  low = p.T @ g
  phi = np.linalg.norm(u, axis=0) / np.linalg.norm(low, axis=0)
  missed = (g - 0.25 * p @ low) * phi
  shrink = max(np.linalg.norm(missed) / (1.01 * last), 1)
  return p @ (0.25 * u) + missed / shrink, np.linalg.norm(missed) / shrink


def run_fira(p, g, u, last, **how):
  low = kernels.project(p, g, side=how['side'], implementation='xla')
  return kernels.scaled_residual(p, g, low, u, last, scale=0.25, **how)


def make_frugal(rng, d, k, r, side):
  p, low, u = basis(rng, d, r), normal(rng, r, k), normal(rng, r, k)
  g, inside = normal(rng, d, k), p @ low
  # No entry so small that roundings have a say in its sign.
  g = np.where(np.abs(g - inside) < 0.05, inside + 0.1, g).astype(np.float32)
  return p, canonical(g, side), low, u


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
    'fira',
    run=run_fira,
    make=lambda rng, d, k, r, side: (
      basis(rng, d, r),
      leaf(rng, d, k, side),
      normal(rng, r, k),
      np.float32(20),
    ),
    oracle=transposed(fira),
    leaves=(1,),
  ),
  Case(
    'frugal',
    run=functools.partial(kernels.signed_residual, scale=0.5, inactive_scale=0.1),
    make=make_frugal,
    oracle=transposed(
      lambda p, g, low, u: (0.5 * (p @ u + 0.1 * np.sign(g - p @ low)),)
    ),
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
