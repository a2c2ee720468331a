"""Operations of lrjax.kernels with inputs and oracles: one row each for pallas_test."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lrjax
from lrjax import kernels
from lrjax.kernels import rounding

# Sizes that no tile divides, of which every axis still fills more than half a tile.
D, K, R = 160, 208, 24


class Case(NamedTuple):
  """One way to call an operation.

  Attributes:
    name: shown by pytest.
    run: `(*arrays, side, implementation) -> tree`.
    make: `(rng, d, k, r, side) -> arrays`; float32 but for what never changes type.
    oracle: `(*arrays, side) -> tree`, numpy in float64 on what `run` was given.
    leaves: which of the arrays are also tried in bfloat16.
    sided: whether it knows two sides of a leaf.
  """

  name: str
  run: Callable
  make: Callable
  oracle: Callable
  leaves: tuple[int, ...]
  sided: bool = True


def normal(rng, *shape):
  return rng.standard_normal(shape).astype(np.float32)


def leaf(rng, d, k, side):
  return normal(rng, *((d, k) if side == 'in' else (k, d)))


def basis(rng, d, r):
  return np.linalg.qr(normal(rng, d, r))[0]


def canonical(g, side):
  """A leaf as the matrix (d, k); its own inverse."""
  return g if side == 'in' else g.T


def stored(codec):
  """`project` from a basis that a codec stores."""

  def make(rng, d, k, r, side):
    p = codec.encode(jnp.asarray(basis(rng, d, r)))
    return p, leaf(rng, d, k, side)

  return dict(
    make=make,
    oracle=lambda p, g, side: _decoded(codec, p).T @ canonical(g, side),
    leaves=(1,),
  )


def make_adam(rng, d, k, r, side):
  p, g = basis(rng, d, r), leaf(rng, d, k, side)
  moments = normal(rng, r, k), normal(rng, r, k) ** 2
  # In a vmapped test the counts differ, as those of a stack of slots may.
  return p, g, *moments, np.int32(rng.integers(3, 9))


def adam_oracle(correct):
  """`correct`: (M, V, c1, c2, eps) -> N."""

  def oracle(p, g, mu, nu, count, side):
    b1, b2, eps = 0.8, 0.99, 1e-6
    low = p.T @ canonical(g, side)
    m, v = b1 * mu + (1 - b1) * low, b2 * nu + (1 - b2) * low**2
    t = count + 1
    return correct(m, v, 1 - b1**t, 1 - b2**t, eps), m, v

  return oracle


def make_lift(rng, d, k, r, side):
  w, p, n = leaf(rng, d, k, side), basis(rng, d, r), normal(rng, r, k)
  return w, p, n, np.float32(rng.uniform(0.1, 0.2))


def lift(w, p, n, rate, **how):
  return kernels.lift_and_apply(w, p, n, rate=rate, scale=0.25, decay=0.1, **how)


def lift_oracle(w, p, n, rate, side):
  return w - rate * (0.25 * canonical(p @ n, side) + 0.1 * w)


def make_rounded(rng, d, k, r, side):
  # Sums of so few bits are exact in any order: only the rounding is left to compare.
  w, p, n, _ = make_lift(rng, d, k, r, side)
  return w, np.round(8 * p), np.round(n), np.uint32(rng.integers(9))


def lift_rounded(w, p, n, seed, **how):
  key, w = jax.random.key(seed), w.astype(jnp.bfloat16)
  return kernels.lift_and_apply(w, p, n, rate=2.0**-5, key=key, **how)


def rounded_oracle(w, p, n, seed, side):
  """Float32 to bfloat16 by the definition: up where the bits exceed what is left."""
  bf16 = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
  exact = bf16(w) - 2.0**-5 * canonical(p @ n, side)
  at = np.arange(w.size, dtype=np.uint32).reshape(w.shape)
  words = rounding.words(jax.random.key(seed))
  bits = np.asarray(rounding.random_bits(jnp.asarray(at), words)) >> 16
  step = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), 1e-30))) - 7)
  low = np.floor(np.abs(exact) / step)
  up = np.abs(exact) / step - low + bits / 2.0**16 >= 1
  return np.sign(exact) * (low + up) * step


def _decoded(codec, p):
  # The codecs have oracles of their own, in codecs_test.
  narrow = lambda x: x.astype(np.float32) if x.dtype == np.float64 else x
  return np.asarray(codec.decode(jax.tree.map(narrow, p)), np.float64)


CASES = [
  Case(
    'project',
    run=kernels.project,
    make=lambda rng, d, k, r, side: (basis(rng, d, r), leaf(rng, d, k, side)),
    oracle=lambda p, g, side: p.T @ canonical(g, side),
    leaves=(1,),
  ),
  Case(
    'project int8',
    run=kernels.project,
    **stored(lrjax.int8()),
  ),
  Case(
    'project int8 of groups',
    run=functools.partial(kernels.project, bits=8, group=4 * R),
    **stored(lrjax.affine(8, 4 * R)),
  ),
  Case(
    'project int4',
    run=functools.partial(kernels.project, bits=4, group=4 * R),
    **stored(lrjax.affine(4, 4 * R)),
  ),
  Case(
    'low_rank_adam',
    run=functools.partial(kernels.low_rank_adam, b1=0.8, b2=0.99, eps=1e-6),
    make=make_adam,
    oracle=adam_oracle(lambda m, v, c1, c2, e: (m / c1) / (np.sqrt(v / c2) + e)),
    leaves=(1, 2, 3),
  ),
  Case('lift_and_apply', run=lift, make=make_lift, oracle=lift_oracle, leaves=(0,)),
  Case(
    'lift_and_apply rounded',
    run=lift_rounded,
    make=make_rounded,
    oracle=rounded_oracle,
    leaves=(),
  ),
]
