"""Sparse Spectral Training: a full-rank kernel kept as its SVD and trained in turns.

Zhao et al., "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural
Networks", 2024, arXiv 2405.15481. A reconstruction: the authors' code could not be
consulted. The stored form, the enhanced gradients, the sampling law, the unit vectors,
the reset of their moments and the re-SVD are the paper's; the length of an iteration
(200 updates) and of a round (p / r iterations) are as remembered from it; that moments
of sigma start anew at a re-SVD, where singular values change places, is our choice.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lrjax.checks import positive_int
from lrjax.parameterizations import factors
from lrjax.parameterizations.factors import value
from lrjax.types import Event, Parameterization, Split


class Spectrum(NamedTuple):
  """W = V diag(sigma) U^T.

  Attributes:
    sigma: (p,), p = min(in, out), at least 0.
    U: (out, p), unit columns, orthogonal after a re-SVD.
    V: (in, p), likewise.
  """

  sigma: jax.Array
  U: jax.Array
  V: jax.Array


@value
def sst(
  rank: int, resample_every: int = 200, iterations: int | None = None
) -> Parameterization:
  r"""W = V diag(sigma) U^T of full rank; all of sigma and r vector pairs are trained.

  The r pairs :math:`\Omega` that train now are the arrays `u`, `v`; all pairs are kept in
  `all_u`, `all_v`. With G = dL/dW,

  .. math::
    g_\sigma = \mathrm{diag}(V^\top G U), \quad
    g_{u_i} = G^\top v_i, \quad g_{v_i} = G u_i, \quad i \in \Omega

  the gradients of vectors are enhanced: the true ones have a factor :math:`\sigma_i`,
  with which small directions hardly learn. Events:

  - `normalize`, at every step: :math:`\sigma \leftarrow \max(\sigma, 0)`, and u, v get
    unit columns. W is always formed with both done, so nothing changes in it;
  - `resample`, every `resample_every` updates (an iteration): u, v return to their
    places, a new :math:`\Omega` is drawn without replacement with chances
    :math:`\frac12 (1/p + \sigma_i / \sum \sigma)`, and moments of u, v start anew. Every
    time `iterations` of them are over (a round), V, sigma, U first become the SVD of W,
    and moments of sigma start anew too. W does not change.

  Moments that start anew make first steps large: let the learning rate rise over some 20
  updates after each resample, `lrjax.with_restarts(schedule, resample_every, 20)`.
  Decoupled weight decay on sigma is that of W; on u, v it does nothing.

  Memory: r (in + out) + p trained numbers, and as many of each moment; p (in + out) more
  at rest, twice the dense kernel where in = out. W and its gradient are formed for one
  kernel at a time. FLOPs of a step of T tokens: the 6 T in out of a dense kernel, and
  6 p in out, little for T far above p. A re-SVD is O(p in out).

  Choose it for full-rank training where optimizer state, not weights, fills the memory,
  and ranks are small. At moderate ranks GaLore has the same purpose without the second
  copy of the weights. Export it to dense for inference.

  Args:
    rank: r, pairs of singular vectors that train at a time, at most min(in, out).
    resample_every: updates in an iteration.
    iterations: iterations in a round; None: p / r, rounded up.

  Returns:
    A Parameterization; its events are `normalize` and `resample`.

  Raises:
    ValueError: at `init` for a rank that does not fit.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> W = sst(2).init(jax.random.key(0), (4, 3), jnp.float32)
    >>> jax.tree.map(jnp.shape, W.train)
    {'sigma': (3,), 'u': (3, 2), 'v': (4, 2)}
  """
  if iterations is not None:
    positive_int('iterations', iterations)

  def from_dense(key: jax.Array, W: jax.Array) -> tuple[Split, jax.Array]:
    spectrum = decomposed(W)
    lost = factors.relative_error(W, _product(spectrum))
    omega = sample(key, spectrum.sigma, factors.check_rank(rank, W.shape))
    return activate(jax.tree.map(lambda a: a.astype(W.dtype), spectrum), omega), lost

  def start(key: jax.Array, shape: tuple, dtype: jax.typing.DTypeLike) -> Split:
    drawn, sampled = jax.random.split(key)
    return from_dense(sampled, factors.dense_init(drawn, shape).astype(dtype))[0]

  return Parameterization(
    init=start,
    from_dense=from_dense,
    apply=_apply,
    materialize=lambda split: _product(spectrum_of(split)),
    axes={
      'sigma': (None,),
      'u': ('out', None),
      'v': ('in', None),
      'all_u': ('out', None),
      'all_v': ('in', None),
      'omega': (None,),
    },
    events=(
      Event('normalize', _normalize),
      _resample(resample_every, iterations),
    ),
  )


def spectrum_of(split: Split) -> Spectrum:
  """All of it, with the trained vectors at their places."""
  train, fixed = split
  put = lambda all, now: all.at[:, fixed['omega']].set(_unit(now))
  return Spectrum(
    jnp.maximum(train['sigma'], 0),
    put(fixed['all_u'], train['u']),
    put(fixed['all_v'], train['v']),
  )


def activate(s: Spectrum, omega: jax.Array) -> Split:
  """The stored form in which the pairs omega (r,) train."""
  train = {'sigma': s.sigma, 'u': s.U[:, omega], 'v': s.V[:, omega]}
  return Split(train, {'all_u': s.U, 'all_v': s.V, 'omega': omega})


def decomposed(W: jax.Array) -> Spectrum:
  """The SVD of W (in, out), sigma descending, in float32."""
  V, sigma, Ut = factors.svd(W)
  return Spectrum(sigma, Ut.T, V)


def chances(sigma: jax.Array) -> jax.Array:
  """Half uniform, half by size: (p,) that sum to 1; uniform where sigma is 0."""
  sigma = sigma.astype(jnp.float32)
  even, total = 1 / sigma.size, jnp.sum(sigma)
  share = jnp.where(total > 0, sigma / jnp.where(total > 0, total, 1), even)
  return (even + share) / 2


def sample(key: jax.Array, sigma: jax.Array, rank: int) -> jax.Array:
  """Ascending indices (rank,) int32, drawn without replacement by `chances`."""
  scores = jnp.log(chances(sigma)) + jax.random.gumbel(key, sigma.shape)
  return jnp.sort(jax.lax.top_k(scores, rank)[1]).astype(jnp.int32)


def _apply(split: Split, x: jax.Array) -> jax.Array:
  # W is formed again for the backward pass: kept, it would be a second set of weights.
  form = lambda s: _enhanced(s.train, s.fixed['omega'], spectrum_of(s))
  return jax.checkpoint(lambda split, x: x @ form(split))(split, x)


@jax.custom_vjp
def _enhanced(train: dict, omega: jax.Array, s: Spectrum) -> jax.Array:
  """W of the spectrum s; its gradient goes to `train`."""
  return (s.V * s.sigma[None]) @ s.U.T


def _forward(train, omega, s):
  return _enhanced(train, omega, s), (omega, s)


def _backward(kept, G):
  omega, s = kept
  GU = G @ s.U
  sigma = jnp.sum(s.V * GU, axis=0)
  return {'sigma': sigma, 'u': G.T @ s.V[:, omega], 'v': GU[:, omega]}, None, None


_enhanced.defvjp(_forward, _backward)


def _product(s: Spectrum) -> jax.Array:
  return factors.product(s.V * s.sigma[None], s.U.T)


def _unit(v: jax.Array) -> jax.Array:
  """v with columns of length 1, measured in float32; zeros stay."""
  wide = v.astype(jnp.float32)
  norm = jnp.linalg.norm(wide, axis=0, keepdims=True)
  return (wide / jnp.where(norm > 0, norm, 1)).astype(v.dtype)


def _normalize(key: jax.Array, split: Split, k: jax.Array) -> tuple[Split, dict]:
  train = split.train
  sigma = jnp.maximum(train['sigma'], 0)
  unit = {'sigma': sigma, 'u': _unit(train['u']), 'v': _unit(train['v'])}
  return split._replace(train=unit), {}


def _resample(every: int, iterations: int | None) -> Event:
  def weights(key: jax.Array, split: Split, k: jax.Array) -> tuple[Split, dict]:
    p, r = split.train['sigma'].size, split.fixed['omega'].size
    new_round = k % (every * (iterations or -(-p // r))) == 0

    def decompose(s: Spectrum) -> Spectrum:
      wide = jax.tree.map(lambda a: a.astype(jnp.float32), s)
      new = decomposed(_product(wide))
      return jax.tree.map(lambda a, old: a.astype(old.dtype), new, s)

    s = jax.lax.cond(new_round, decompose, lambda s: s, spectrum_of(split))
    new = activate(s, sample(key, s.sigma, r))
    return new, {'sigma': new_round, 'u': True, 'v': True}

  return Event('resample', weights, factors.periodic(every))
