"""What several parameterizations are made of: splits, draws and errors."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lrjax.bases.orthonormal import mm
from lrjax.checks import positive_int

F = TypeVar('F', bound=Callable)
# What `LlamaConfig(remat='low_rank')` keeps for the backward pass.
LOW_RANK = 'low_rank'
Act = Literal['silu', 'gelu', 'relu', 'tanh']
# What may stand between two factors.
ACTS = {
  'silu': jax.nn.silu,
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'relu': jax.nn.relu,
  'tanh': jnp.tanh,
}


def value(make: F) -> F:
  """Makes calls with equal arguments return one object.

  Two models built alike then have equal graph definitions, and jit finds the compiled
  program of the first for the second.
  """
  # Typed, or 4.0 would be answered with what was made of 4.
  return functools.wraps(make)(functools.lru_cache(None, typed=True)(make))  # pyrefly: ignore


def check_rank(rank: int, shape: tuple[int, ...]) -> int:
  """The rank, or ValueError if it is above min(in, out)."""
  if positive_int('rank', rank) > min(shape):
    raise ValueError(
      f'rank must be at most min(in, out) = {min(shape)} for a kernel of shape'
      f' {tuple(shape)}, got {rank}'
    )
  return rank


def dense_init(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """The draw that factorizations start from: N(0, 0.02^2) in float32."""
  return 0.02 * jax.random.normal(key, shape)


def kaiming(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
  """Uniform on +-1/sqrt(fan_in) in float32, torch's default for a linear layer."""
  bound = 1 / math.sqrt(fan_in)
  return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def svd(W: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """U (in, p), s (p,), Vt (p, out) in float32."""
  U, s, Vt = jnp.linalg.svd(W.astype(jnp.float32), full_matrices=False)
  return U, s, Vt


def spectral(W: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
  """The best a (in, r), b (r, out), balanced: a'a = bb' = diag(s)."""
  U, s, Vt = svd(W)
  root = jnp.sqrt(s[:rank])
  return U[:, :rank] * root[None], root[:, None] * Vt[:rank]


def rebalance(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The same product ab with a'a = bb' = diag(s), in O((in + out) r^2).

  a = Qa Ra and b' = Qb Rb; the SVD U s V' of Ra Rb' gives Qa U sqrt(s), sqrt(s) V' Qb'.
  """
  Qa, Ra = jnp.linalg.qr(a.astype(jnp.float32))
  Qb, Rb = jnp.linalg.qr(b.astype(jnp.float32).T)
  U, s, Vt = jnp.linalg.svd(mm(Ra, Rb.T), full_matrices=False)
  root = jnp.sqrt(s)
  return mm(Qa, U * root[None]), mm(root[:, None] * Vt, Qb.T)


def relative_error(W: jax.Array, approximation: jax.Array) -> jax.Array:
  """||W - approximation||_F / ||W||_F in float32; 0 where W is 0."""
  W = W.astype(jnp.float32)
  norm = jnp.linalg.norm(W)
  lost = jnp.linalg.norm(W - approximation.astype(jnp.float32))
  return jnp.where(norm > 0, lost / jnp.where(norm > 0, norm, 1), 0)


def down(x: jax.Array, a: jax.Array) -> jax.Array:
  """x a, under the name by which rematerialization keeps it."""
  return checkpoint_name(x @ a, LOW_RANK)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
  """ab at full float32 precision, in the dtype of a."""
  return mm(a.astype(jnp.float32), b.astype(jnp.float32)).astype(a.dtype)


def cast(train: Mapping[str, Any], dtype: jax.typing.DTypeLike) -> dict[str, jax.Array]:
  """Named arrays in another dtype."""
  return {name: jnp.asarray(x, dtype) for name, x in train.items()}


def periodic(every: int) -> Callable[[int], bool]:
  """`due` of an event at every multiple of `every`, not at 0."""
  positive_int('every', every)
  return lambda k: k > 0 and k % every == 0


def fold(
  kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float | jax.Array = 1.0
) -> jax.Array:
  """kernel + scale ab, summed in float32 and rounded once to the dtype of the kernel."""
  ab = mm(a.astype(jnp.float32), b.astype(jnp.float32))
  return (kernel.astype(jnp.float32) + scale * ab).astype(kernel.dtype)
