"""What the fields of an optimizer's state mean: first moments, second moments, the rest."""

from collections.abc import Callable
from typing import Any

SIGNED = frozenset({'mu', 'trace', 'momentum', 'm1', 'm2'})
NON_NEGATIVE = frozenset({'nu', 'nu_max', 'sum_of_squares'})
# Second moments that are not of the gradient's shape, so that no basis rotates them.
FACTORED = frozenset({'v_row', 'v_col', 'v'})


def map_moments(
  state: Any,
  signed: Callable,
  non_negative: Callable,
  other: Callable | None = None,
  factored: Callable | None = None,
) -> Any:
  """Applies a function to each moment of every named tuple inside an optax state.

  Args:
    state: an optax state, or any nest of tuples and named tuples.
    signed: for the values of fields of first moments, `SIGNED`.
    non_negative: for the values of fields of second moments, `NON_NEGATIVE`.
    other: `(state's type, field name, value) -> value` for what is no moment.
    factored: for the values of `FACTORED`; default as they are.

  Returns:
    A state of the same structure.

  >>> import jax.numpy as jnp, optax
  >>> state = optax.scale_by_adam().init(jnp.ones(2))
  >>> map_moments(state, lambda mu: mu + 1, lambda nu: nu).mu
  Array([1., 1.], dtype=float32)
  """

  def visit(owner: type, name: str, x: Any) -> Any:
    if name in SIGNED:
      return signed(x)
    if name in NON_NEGATIVE:
      return non_negative(x)
    if name in FACTORED:
      return factored(x) if factored else x
    if hasattr(x, '_fields'):
      return x._replace(**{k: visit(type(x), k, v) for k, v in x._asdict().items()})
    if isinstance(x, tuple):
      return tuple(visit(owner, name, v) for v in x)
    return other(owner, name, x) if other else x

  return visit(type(state), '', state)
