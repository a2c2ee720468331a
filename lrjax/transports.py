r"""What the inner state becomes when the basis changes.

A transport is `(change, inner_state) -> inner_state`; `change()` gives
:math:`C = P_{new}^\top P_{old}` (r, r).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Change = Callable[[], jax.Array]


def keep(change: Change, inner: Any) -> Any:
  """The state as it is, read in the new basis (GaLore)."""
  return inner


def reset(change: Change, inner: Any) -> Any:
  """Zeros, counts included (FRUGAL)."""
  return jax.tree.map(jnp.zeros_like, inner)


def rotate_abs(change: Change, inner: Any) -> Any:
  """First moments `C mu`, second moments `|C nu|` (DCT-AdamW)."""
  C = change()
  return _moments(inner, lambda mu: C @ mu, lambda nu: jnp.abs(C @ nu))


def rotate_square(change: Change, inner: Any) -> Any:
  """First moments `C mu`, second moments `(C*C) nu`, exact for independent entries."""
  C = change()
  return _moments(inner, lambda mu: C @ mu, lambda nu: jnp.square(C) @ nu)


NAMES = dict(keep=keep, reset=reset, rotate_abs=rotate_abs, rotate=rotate_square)


def _moments(inner: Any, on_mu: Callable, on_nu: Callable) -> Any:
  """Maps the moments of every named tuple inside an optax state."""
  maps = {'mu': on_mu, 'trace': on_mu, 'nu': on_nu}
  found: list[str] = []

  def visit(s: Any) -> Any:
    if not hasattr(s, '_fields'):
      return tuple(map(visit, s)) if isinstance(s, tuple) else s
    new = {k: visit(v) for k, v in s._asdict().items()}
    for k in new.keys() & maps.keys():
      found.append(k)
      new[k] = maps[k](new[k]).astype(new[k].dtype)
    return s._replace(**new)

  out = visit(inner)
  if not found:
    raise ValueError(
      f'rotating needs an inner state with moments `mu`, `nu` or `trace` (r, k), got'
      f' {type(inner).__name__}; use transport=keep or reset with this inner optimizer'
    )
  return out
