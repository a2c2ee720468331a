"""Which layers come next: orders, probabilities, draws without replacement."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrjax import sharding, stacks
from lrjax.checks import closest, positive_int

ORDERS = ('random', 'ascending', 'descending', 'mirror')
TINY = float(np.finfo(np.float32).tiny)


def drawer(order: str | Callable, seed: int) -> Callable:
  """`(round, L, n, log p) -> layers (n,)`, ascending."""
  if callable(order):
    return lambda round, total, n, scores: _told(order(round), n)
  if order not in ORDERS:
    raise ValueError(f'unknown `order` {order!r}; {closest(str(order), ORDERS)}')

  def draw(round: jax.Array, total: int, n: int, scores: Any) -> jax.Array:
    if order == 'random':
      key = jax.random.fold_in(stacks.stream(seed, 'active layers'), round)
      # The n largest are a draw one after the other without replacement.
      found = jax.lax.top_k(jax.random.gumbel(key, (total,)) + scores, n)[1]
    elif order == 'mirror':
      half = total // 2
      found = (round % half * (n // 2) + jnp.arange(n // 2)) % half
      found = jnp.concatenate([found, total - 1 - found])
    else:
      found = (round % total * n + jnp.arange(n)) % total
      found = found if order == 'ascending' else total - 1 - found
    return jnp.sort(found).astype(jnp.int32)

  return draw


def _told(found: Any, n: int) -> jax.Array:
  """The layers that a user's order names."""
  found = jnp.asarray(found, jnp.int32)
  if found.shape != (n,):
    raise ValueError(f'`order` must return {n} layers, got shape {found.shape}')
  return jnp.sort(found)


def check_active(n: Any) -> None:
  if not isinstance(n, float):
    positive_int('n_active', n)
  elif not 0.0 < n <= 1.0:
    raise ValueError(f'a fractional `n_active` must lie in (0, 1], got {n}')


def resolve(n_active: int | float, total: int, order: Any) -> int:
  """The number of active layers; 1 in place of a fraction where there are no layers."""
  n = round(n_active * total) if isinstance(n_active, float) else n_active
  if not total:
    return max(1, n)
  if not 1 <= n <= total:
    raise ValueError(
      f'`n_active` {n_active} makes {n} layers active; allowed: 1 to {total}, the'
      f' number of layers'
    )
  if order == 'mirror' and n % 2:
    raise ValueError(f'order `mirror` takes as many layers from each end, got {n}')
  return n


def checked(probabilities: Any, order: Any, n_active: int | float) -> Any:
  """Log-probabilities, 0 where all are alike, or the function that computes them."""
  if probabilities is None:
    return 0.0
  if order != 'random':
    raise ValueError(f'`probabilities` need `order` random, got {order!r}')
  if callable(probabilities):
    return probabilities
  p = np.asarray(probabilities, np.float64)
  if p.ndim != 1 or not np.isfinite(p).all() or (p < 0).any():
    raise ValueError(
      f'`probabilities` must be one finite number of at least 0 a layer, got'
      f' {probabilities!r}'
    )
  needed = resolve(n_active, len(p), order)
  if (p > 0).sum() < needed:
    raise ValueError(
      f'`probabilities` are above 0 for {(p > 0).sum()} layers; at least `n_active` ='
      f' {needed} are needed'
    )
  return np.log(np.maximum(p / p.sum(), TINY)).astype(np.float32)


def log_scores(chances: Any, params: Any, total: int) -> Any:
  """What of the probabilities is state; zeros stand in while parameters are abstract."""
  if not callable(chances):
    if np.ndim(chances) and total and len(chances) != total:
      raise ValueError(
        f'`probabilities` has {len(chances)} entries for {total} layers; one each'
      )
    return ()
  leaves = jax.tree.leaves(params)
  if not total or any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
    return jnp.zeros(max(1, total), jnp.float32)
  scores = jnp.asarray(chances(params), jnp.float32)
  if scores.shape != (total,):
    raise ValueError(
      f'`probabilities` returned shape {scores.shape} for {total} layers; one each'
    )
  # Under jit there are no values to look at yet.
  if not isinstance(scores, jax.core.Tracer) and not bool((scores >= 0).all()):
    raise ValueError(f'`probabilities` returned negative numbers or NaN: {scores}')
  p = scores / jnp.maximum(scores.sum(), TINY)
  return sharding.whole(jnp.log(jnp.maximum(p, TINY)))
