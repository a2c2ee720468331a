"""Conditionals whose costly side stays unpaid under vmap."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def rarely(pred: jax.Array, then: Callable, otherwise: Callable, *args: Any) -> Any:
  """`then(*args)` if `pred` else `otherwise(*args)`; a conditional under vmap as well.

  `jax.lax.cond` turns into a select under vmap and computes both sides for every
  matrix. Here a batch computes `then` only if one of its entries needs it.

  Args:
    pred: bool[].
    then: the costly side.
    otherwise: the cheap side, of the same result types.
    *args: all arrays the two sides read; they must not close over traced ones.

  Returns:
    The result of one side.

  >>> f = lambda x: rarely(x > 2, lambda x: x * 10, lambda x: x, x)
  >>> print(jax.vmap(f)(jnp.arange(4)))
  [ 0  1  2 30]
  """

  @custom_vmap
  def run(pred: jax.Array, args: tuple) -> Any:
    return jax.lax.cond(pred, then, otherwise, *args)

  @run.def_vmap
  def batched(size: int, in_batched: Any, pred: jax.Array, args: tuple) -> tuple:
    axes = jax.tree.map(lambda b: 0 if b else None, tuple(in_batched))
    over = lambda f: jax.vmap(f, in_axes=axes, axis_size=size)

    def either(pred: jax.Array, args: tuple) -> Any:
      pick = lambda a, b: jnp.where(pred, a, b)
      return jax.tree.map(pick, then(*args), otherwise(*args))

    cheap = over(lambda pred, args: otherwise(*args))
    # By the same means again, for the next vmap around this one.
    out = rarely(jnp.any(pred), over(either), cheap, pred, args)
    return out, jax.tree.map(lambda _: True, out)

  return run(pred, args)
