"""How diagonal state spaces start; Gu et al., 2022, arXiv 2206.11893."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.checks import closest, positive_int

Init = Literal['lin', 'inv', 'legs', 'real']


def s4d_init(
  key: jax.Array,
  features: int,
  state: int = 64,
  init: Init = 'lin',
  dt_range: tuple[float, float] = (1e-3, 1e-1),
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> dict[str, jax.Array]:
  r"""Draws the parameters, H (3 N + 2) numbers.

  A is -exp(`log_a_real`) + i `a_imag`, so that its real part is below 0 whatever an
  update does. At the start, for n = 0 .. N/2 - 1:

  - `lin`: :math:`-1/2 + i \pi n`;
  - `inv`: :math:`-1/2 + i (N / \pi) (N / (2n + 1) - 1)`;
  - `legs`: the eigenvalues of the normal part of HiPPO-LegS, with B from the same
    diagonalization, clipped at 2 as in the official code;
  - `real`: :math:`-(n + 1)`, an average over exponential windows; clearly worse on
    signals than the others.

  B is 1 otherwise, C complex normal, D normal, log dt uniform.

  Args:
    key: of C, D and dt.
    features: H.
    state: N, even; 64 is customary.
    init: start of A.
    dt_range: bounds of the step sizes; a lower one near 1 / length is a good guess.
    dtype: of all arrays.

  Returns:
    `log_dt`, `skip` (D) of shape (H,); `log_a_real`, `a_imag`, `b_real`, `b_imag`,
    `c_real`, `c_imag` of shape (H, N/2).

  Raises:
    TypeError: for a size that is no int.
    ValueError: for an odd `state`, an unknown `init`, or bounds that are not
      0 < low <= high.

  Examples:
    >>> params = s4d_init(jax.random.key(0), 3, state=8)
    >>> print(params['a_imag'][0])
    [0.       3.1415927 6.2831855 9.424778 ]
  """
  H, N = positive_int('features', features), positive_int('state', state)
  if N % 2:
    raise ValueError(f'`state` must be even, as half of it is stored, got {N}')
  if init not in _STARTS:
    raise ValueError(f'unknown `init` {init!r}; {closest(str(init), _STARTS)}')
  low, high = dt_range
  if not 0 < low <= high < math.inf:
    raise ValueError(f'`dt_range` must be 0 < low <= high, got {dt_range}')
  A, B = _STARTS[init](N)
  k1, k2, k3 = jax.random.split(key, 3)
  C = jax.random.normal(k1, (2, H, N // 2)) * math.sqrt(0.5)
  log_dt = jax.random.uniform(k2, (H,), minval=math.log(low), maxval=math.log(high))
  for_each = lambda row: jnp.broadcast_to(row, (H, N // 2))
  arrays = {
    'log_dt': log_dt,
    'log_a_real': for_each(np.log(-A.real)),
    'a_imag': for_each(A.imag),
    'b_real': for_each(B.real),
    'b_imag': for_each(B.imag),
    'c_real': C[0],
    'c_imag': C[1],
    'skip': jax.random.normal(k3, (H,)),
  }
  return {name: x.astype(dtype) for name, x in arrays.items()}


def _legs(N: int) -> tuple[np.ndarray, np.ndarray]:
  """Eigenvalues above the real axis of the normal part of HiPPO-LegS, and its B."""
  n = np.arange(N)
  root = np.sqrt(2 * n + 1.0)
  # A + P P' = -1/2 + S for P = root / sqrt(2): S is antisymmetric.
  S = np.tril(-np.outer(root, root) / 2, -1)
  values, V = np.linalg.eigh(-1j * (S - S.T))
  values, V = values[::-1][: N // 2], V[:, ::-1][:, : N // 2]
  # Eigenvectors are unique up to a phase: that of the first entry is taken out.
  B = (V * np.exp(-1j * np.angle(V[:1]))).conj().T @ root
  B = B * np.sign(B.imag)
  return -0.5 + 1j * values, B.real + 1j * np.minimum(B.imag, 2)


def _diagonal(imag: Any) -> tuple[np.ndarray, np.ndarray]:
  return -0.5 + 1j * imag, np.ones(len(imag), complex)


_STARTS = {
  'lin': lambda N: _diagonal(np.pi * np.arange(N // 2)),
  'inv': lambda N: _diagonal(N / np.pi * (N / (2 * np.arange(N // 2) + 1) - 1)),
  'legs': _legs,
  'real': lambda N: (-1.0 - np.arange(N // 2) + 0j, np.ones(N // 2, complex)),
}
