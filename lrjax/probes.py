"""Kernels whose gradient is projected where it arises, and never formed."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['kernel', 'basis', 'probe'],
  meta_fields=['side', 'keep'],
)
@dataclasses.dataclass(frozen=True)
class Probed:
  r"""A kernel W (in, out) in a product x W, of whose gradient only a projection is asked.

  The probe q (r, k) is zero and adds P q to W, on paper: its gradient is
  :math:`P^\top \partial L / \partial W`. The product reads neither q nor P; the backward
  pass has :math:`(x P)^\top \bar y` for `side='in'`, :math:`(\bar y P)^\top x` for 'out'.

  As a pytree it can be sliced by a scan over layers like the array it stands for.

  Attributes:
    kernel: W (..., in, out).
    basis: P (..., d, r), d the size of the compressed side.
    probe: q (..., r, k), zeros.
    side: the compressed side, 'in' or 'out'.
    keep: 'input' keeps x for the backward pass; 'projection' keeps x P in its place
      where the side is 'in'.
  """

  kernel: Any
  basis: Any
  probe: Any
  side: str = 'in'
  keep: str = 'input'

  @property
  def shape(self) -> tuple[int, ...]:
    return self.kernel.shape

  @property
  def ndim(self) -> int:
    return self.kernel.ndim

  @property
  def dtype(self) -> Any:
    return self.kernel.dtype

  def astype(self, dtype: Any) -> 'Probed':
    """The kernel and the basis in another dtype; the probe's gradient keeps its own."""
    kernel, basis = self.kernel.astype(dtype), self.basis.astype(dtype)
    return dataclasses.replace(self, kernel=kernel, basis=basis)

  def __rmatmul__(self, x: Any) -> jax.Array:
    return product(x, self)


def product(x: jax.Array, w: Any) -> jax.Array:
  """x W for an array W (in, out) or a `Probed` one; x (..., in) -> (..., out).

  >>> w = Probed(jnp.ones((3, 2)), jnp.eye(3, 1), jnp.zeros((1, 2)))
  >>> print(product(jnp.ones(3), w))
  [3. 3.]
  """
  if not isinstance(w, Probed):
    return x @ w
  return _product(w.side, w.keep, x, w.kernel, w.basis, w.probe)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(side: str, keep: str, x: Any, w: Any, p: Any, q: Any) -> jax.Array:
  return x @ w


def _forward(side: str, keep: str, x: Any, w: Any, p: Any, q: Any) -> tuple:
  kept = x @ p if (side, keep) == ('in', 'projection') else x
  return x @ w, (kept, w, p, q)


def _backward(side: str, keep: str, kept: tuple, dy: jax.Array) -> tuple:
  x, w, p, q = kept
  rows = lambda a: a.reshape(-1, a.shape[-1])
  if side == 'in':
    a, b = x if keep == 'projection' else x @ p, dy
  else:
    a, b = dy @ p, x
  low = jnp.matmul(rows(a).T, rows(b), preferred_element_type=q.dtype)
  return dy @ w.T, None, None, low


_product.defvjp(_forward, _backward)
