r"""S4D: diagonal state spaces that mix positions, as pure functions.

Gu, Gupta, Goel, Ré, "On the Parameterization and Initialization of Diagonal State Space
Models", NeurIPS 2022, arXiv 2206.11893.

Each of H features has a state of N/2 complex numbers (of N, whose other half is
conjugate), a diagonal A, and a step size:

  x_t = dA x_{t-1} + dB u_t,    y_t = 2 Re(C x_t) + D u_t.

Parameters and states are real arrays: complex numbers live inside the calls only.
"""

import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from lrjax.checks import closest, positive_int
from lrjax.s4d_starts import s4d_init as s4d_init
from lrjax.types import PyTree

Discretization = Literal['zoh', 'bilinear']
Params = Mapping[str, jax.Array]

# What sets the dynamics: no weight decay, and often a rate of its own.
DYNAMICS = ('log_dt', 'log_a_real', 'a_imag', 'b_real', 'b_imag')


def s4d_kernel(
  params: Params, length: int, discretization: Discretization = 'zoh'
) -> jax.Array:
  r"""The convolution kernel :math:`K_l = 2 \mathrm{Re} \sum_n C_n dB_n dA_n^l`.

  - `zoh`: :math:`dA = e^{dt A},\ dB = B (e^{dt A} - 1) / A`;
  - `bilinear`: :math:`dA = (1 + dt A / 2) / (1 - dt A / 2),\ dB = B dt / (1 - dt A / 2)`.

  With l = q s + j and s about sqrt(L) it is a product of (H, q, N) and (H, N, s) real
  matrices: no array of H N L numbers exists, forward or backward, but O(H N sqrt(L)).

  Args:
    params: those of `s4d_init`.
    length: L.
    discretization: how steps are taken.

  Returns:
    K (L, H).

  Raises:
    ValueError: for an unknown `discretization`.

  Examples:
    >>> s4d_kernel(s4d_init(jax.random.key(0), 3), 10).shape
    (10, 3)
  """
  log_dA, dB, C, _ = _system(params, discretization)
  return _vandermonde(C * dB, log_dA, positive_int('length', length))


def s4d_convolve(
  params: Params,
  u: jax.Array,
  state: jax.Array | None = None,
  discretization: Discretization = 'zoh',
) -> jax.Array:
  """y = K * u + D u by FFT, in O(H L log L) a sequence: what training uses.

  Args:
    params: those of `s4d_init`.
    u: (..., L, H).
    state: (..., H, N/2, 2), what `s4d_step` and `s4d_scan` return; None: 0.
    discretization: see `s4d_kernel`.

  Returns:
    y (..., L, H) in the dtype of u, computed in float32 at least.

  Examples:
    >>> params = s4d_init(jax.random.key(0), 3)
    >>> s4d_convolve(params, jnp.ones((2, 10, 3))).shape
    (2, 10, 3)
  """
  v, L = _real(u), u.shape[-2]
  log_dA, dB, C, D = _system(params, discretization)
  K = _vandermonde(C * dB, log_dA, L)
  # Twice the length, so that what wraps around meets zeros.
  spectrum = jnp.fft.rfft(v, 2 * L, axis=-2) * _like(jnp.fft.rfft(K, 2 * L, axis=0), v)
  y = jnp.fft.irfft(spectrum, 2 * L, axis=-2)[..., :L, :] + _like(D, v) * v
  if state is not None:
    x = _complex(state)
    y = y + _vandermonde(_like(C * jnp.exp(log_dA), x) * x, log_dA, L)
  return y.astype(u.dtype)


def s4d_step(
  params: Params,
  state: jax.Array,
  u: jax.Array,
  discretization: Discretization = 'zoh',
) -> tuple[jax.Array, jax.Array]:
  """One position: what decoding uses, in O(H N) time and memory.

  Args:
    params: those of `s4d_init`.
    state: (..., H, N/2, 2), real and imaginary parts; zeros at first.
    u: (..., H).
    discretization: see `s4d_kernel`.

  Returns:
    `(state, y)`, y (..., H) in the dtype of u.

  Examples:
    >>> params = s4d_init(jax.random.key(0), 3)
    >>> state, y = s4d_step(params, jnp.zeros((3, 32, 2)), jnp.ones(3))
    >>> state.shape, y.shape
    ((3, 32, 2), (3,))
  """
  log_dA, dB, C, D = _system(params, discretization)
  x, v = _complex(state), _real(u)
  x = _like(jnp.exp(log_dA), x) * x + _like(dB, x) * v[..., None]
  y = 2 * jnp.sum(_like(C, x) * x, axis=-1).real + _like(D, v) * v
  return _pair(x), y.astype(u.dtype)


def s4d_scan(
  params: Params,
  u: jax.Array,
  state: jax.Array | None = None,
  discretization: Discretization = 'zoh',
  chunk: int = 128,
) -> tuple[jax.Array, jax.Array]:
  """The recurrence over a sequence by `lax.associative_scan`, with its last state.

  States of one chunk are held at a time, and one state of each chunk for the backward
  pass, so memory is O(B H N (chunk + L / chunk)) and not O(B H N L).

  Args:
    params: those of `s4d_init`.
    u: (..., L, H).
    state: (..., H, N/2, 2); None: 0.
    discretization: see `s4d_kernel`.
    chunk: positions that are scanned together.

  Returns:
    `(state, y)` after all positions, y (..., L, H) in the dtype of u.

  Examples:
    >>> params, u = s4d_init(jax.random.key(0), 3), jnp.ones((10, 3))
    >>> state, y = s4d_scan(params, u)
    >>> bool(jnp.allclose(y, s4d_convolve(params, u), atol=1e-4))
    True
  """
  v, chunk = jnp.moveaxis(_real(u), -2, 0), positive_int('chunk', chunk)
  log_dA, dB, C, D = _system(params, discretization)
  if state is None:
    x = jnp.zeros((*v.shape[1:], dB.shape[-1]), dB.dtype)
  else:
    x = _complex(state)

  @jax.checkpoint
  def run(x, v):
    b = _like(dB, v[..., None]) * v[..., None]
    a = jnp.repeat(_like(jnp.exp(log_dA), b), len(v), axis=0)
    a, b = jax.lax.associative_scan(_then, (a, b))
    states = a * x[None] + b
    y = 2 * jnp.sum(_like(C, states) * states, axis=-1).real + _like(D, v) * v
    return states[-1], y

  whole = len(v) // chunk
  head, tail = jnp.split(v, [whole * chunk])
  x, y = jax.lax.scan(run, x, head.reshape(whole, chunk, *v.shape[1:]))
  y = y.reshape(head.shape)
  if len(tail):
    x, rest = run(x, tail)
    y = jnp.concatenate([y, rest])
  return _pair(x), jnp.moveaxis(y, 0, -2).astype(u.dtype)


def s4d_labels(params: PyTree) -> PyTree:
  """`'ssm'` for A, B and dt of S4D layers, `'regular'` for all other leaves.

  For `optax.multi_transform`: decay of weights, or a large rate, on the former breaks
  training; 1e-3 without decay is customary. `lrjax.hidden_kernels` projects none of them.

  Examples:
    >>> s4d_labels({'ssm': {'log_dt': 0, 'skip': 0}, 'glu': {'kernel': 0}})
    {'glu': {'kernel': 'regular'}, 'ssm': {'log_dt': 'ssm', 'skip': 'regular'}}
  """
  name = lambda path: jax.tree_util.keystr(path[-1:], simple=True)
  label = lambda path, _: 'ssm' if name(path) in DYNAMICS else 'regular'
  return jax.tree.map_with_path(label, params)


def _system(params: Params, discretization: str) -> tuple[jax.Array, ...]:
  """log dA, dB, C (H, N/2), complex, and D (H,)."""
  if discretization not in ('zoh', 'bilinear'):
    known = closest(str(discretization), ('zoh', 'bilinear'))
    raise ValueError(f'unknown `discretization` {discretization!r}; {known}')
  p = {name: _real(x) for name, x in params.items()}
  A = jax.lax.complex(-jnp.exp(p['log_a_real']), p['a_imag'])
  B = jax.lax.complex(p['b_real'], p['b_imag'])
  C = jax.lax.complex(p['c_real'], p['c_imag'])
  dt = jnp.exp(p['log_dt'])[:, None]
  z = dt * A
  if discretization == 'zoh':
    return z, dt * B * _expm1_over(z), C, p['skip']
  dA = (1 + z / 2) / (1 - z / 2)
  # dA is 0 where dt A = -2, and 0 has no logarithm.
  dA = jnp.where(dA == 0, jnp.finfo(dt.dtype).tiny, dA)
  return jnp.log(dA), dt * B / (1 - z / 2), C, p['skip']


def _then(first, second):
  """x -> a x + b of one, then of the other."""
  (a1, b1), (a2, b2) = first, second
  return a2 * a1, a2 * b1 + b2


def _expm1_over(z):
  """(e^z - 1) / z, by its series where the difference would cancel."""
  small = jnp.abs(z) < 1e-3
  # Each branch sees harmless numbers where the other is taken, or gradients are NaN.
  near, far = jnp.where(small, z, 0), jnp.where(small, 1, z)
  series = 1 + near / 2 * (1 + near / 3 * (1 + near / 4))
  return jnp.where(small, series, jnp.expm1(far) / far)


def _vandermonde(v, log_dA, length):
  """2 Re sum_n v_n dA_n^l for l < length: (..., H, N/2) to (..., length, H)."""
  s = math.isqrt(length - 1) + 1
  powers = lambda l: jnp.exp(log_dA[..., None] * l[None, None])  # (H, N/2, number)
  l = jnp.arange(s, dtype=log_dA.real.dtype)
  left, right = powers(s * l[: -(-length // s)]), powers(l)
  left = v[..., None] * _like(left, v[..., None])
  left = jnp.concatenate([left.real, -left.imag], axis=-2)
  right = jnp.concatenate([right.real, right.imag], axis=-2)
  highest = jax.lax.Precision.HIGHEST
  y = 2 * jnp.einsum('...hnq,hns->...qsh', left, right, precision=highest)
  return y.reshape(*v.shape[:-2], -1, v.shape[-2])[..., :length, :]


def _real(x):
  """x in float32, or in float64 if it is that."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _complex(state):
  state = _real(state)
  return jax.lax.complex(state[..., 0], state[..., 1])


def _pair(x):
  return jnp.stack([x.real, x.imag], axis=-1)


def _like(x, y):
  """x with axes of 1 in front, as many as y has more."""
  return x.reshape((1,) * (y.ndim - x.ndim) + x.shape)
