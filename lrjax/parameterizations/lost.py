"""LOST: the top of a spectrum as factors, a few whole rows for the rest of it.

Li et al., "LOST: Low-rank and Sparse Pre-training for Large Language Models", 2025,
arXiv 2508.02668. A reconstruction: its code could not be read. What the abstract and the
public reviews say is sure: an SVD of the first weights, channels chosen by the energy of
the remaining components, fixed for good, and a mix by gamma. The nonlinearity and its
place, the defaults, `rescale` and `from_dense` are ours.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from lrjax.checks import finite, named
from lrjax.parameterizations import factors, sparse
from lrjax.parameterizations.factors import value
from lrjax.types import Parameterization, Split


@value
def lost(
  rank: int,
  channel_ratio: float = 0.01,
  gamma: float = 0.7,
  act: factors.Act | None = 'silu',
  sparse_init: Literal['original', 'complement'] = 'original',
  rescale: bool = False,
) -> Parameterization:
  r"""y = gamma act(x a) b + (1 - gamma) x_I C, with C the rows I of a kernel.

  Start, with :math:`W_0 \sim N(0, 0.02^2)` and its SVD :math:`U S V^\top`:

  .. math::
    a = U_r S_r^{1/2}, \quad b = S_r^{1/2} V_r^\top, \quad R = W_0 - a b

  I are the k = round(channel_ratio in) rows of R (input channels) of largest norm; they
  stay. C has these rows of :math:`W_0`, or of R.

  Memory: r (in + out) + k out weights, as many of each moment, and 4 k bytes for I. Flops
  2 r (in + out) + 2 k out a token; nothing of in * out is ever formed but at the start.

  Choose it as a cheaper relative of SLTrain that is structured enough for plain matrix
  products. Published gains over plain low-rank training are not separated from those of
  the spectral start and the nonlinearity, which `lrjax.factorized` and act=None separate.

  Args:
    rank: r, at most min(in, out).
    channel_ratio: share of input channels that have a row in C, in (0, 1].
    gamma: weight of the low-rank branch, between 0 and 1; fixed.
    act: nonlinearity between a and b; None: none, and the kernel is a matrix.
    sparse_init: what C starts from, `original` W_0 (as the paper seems to) or its
      `complement` R.
    rescale: whether a, b and C are scaled at the start so that, without its
      nonlinearity, the kernel has the norm of W_0; otherwise gamma and 1 - gamma make it
      smaller.

  Returns:
    A Parameterization. Its `from_dense` chooses I as above and then, whatever
    `sparse_init`, the best a, b and C for this I: C has the rows I of W, and ab is the
    truncated SVD of all others; with `act` the error is that of the linear part.

  Raises:
    ValueError: for an argument out of range, or at `init` for a rank or ratio that does
      not fit the shape.
    TypeError: for an argument of another type.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> W = lost(2, channel_ratio=0.5).init(jax.random.key(0), (4, 6), jnp.float32)
    >>> jax.tree.map(jnp.shape, W.train)
    {'a': (4, 2), 'b': (2, 6), 'rows': (2, 6)}
    >>> W.fixed['channels'].dtype
    dtype('int32')
  """
  sparse.check_fraction('channel_ratio', channel_ratio)
  if not 0 < finite('gamma', gamma) < 1:
    raise ValueError(
      '`gamma` must lie between 0 and 1, or one part would never be trained, got'
      f' {gamma}; the low-rank part alone is lrjax.factorized'
    )
  first_rows = named('sparse_init', sparse_init, _ROWS)
  activation = (lambda z: z) if act is None else named('act', act, factors.ACTS)

  def decompose(W: jax.Array) -> tuple[jax.Array, ...]:
    a, b = factors.spectral(W, factors.check_rank(rank, W.shape))
    rest = W - factors.product(a, b)
    score, k = jnp.linalg.norm(rest, axis=1), _count(channel_ratio, W.shape)
    return a, b, rest, jnp.sort(jax.lax.top_k(score, k)[1])

  def kernel(train: dict, channels: jax.Array) -> jax.Array:
    low = gamma * factors.product(train['a'], train['b'])
    return low.at[channels].add((1 - gamma) * train['rows'], **sparse.KNOWN)

  def init(key: jax.Array, shape: tuple, dtype: jax.typing.DTypeLike) -> Split:
    W = factors.dense_init(key, shape)
    a, b, rest, channels = decompose(W)
    train = {'a': a, 'b': b, 'rows': first_rows(W, rest)[channels]}
    if rescale:
      grow = jnp.linalg.norm(W) / jnp.linalg.norm(kernel(train, channels))
      root = jnp.sqrt(grow)
      train = {'a': a * root, 'b': b * root, 'rows': train['rows'] * grow}
    return Split(factors.cast(train, dtype), {'channels': channels})

  def from_dense(key: jax.Array, W: jax.Array) -> tuple[Split, jax.Array]:
    full = W.astype(jnp.float32)
    channels = decompose(full)[-1]
    a, b = factors.spectral(full.at[channels].set(0), rank)
    root = jnp.sqrt(gamma)
    rows = full[channels] / (1 - gamma)
    train = {'a': a / root, 'b': b / root, 'rows': rows}
    error = factors.relative_error(W, kernel(train, channels))
    return Split(factors.cast(train, W.dtype), {'channels': channels}), error

  def apply(split: Split, x: jax.Array) -> jax.Array:
    train, channels = split.train, split.fixed['channels']
    low = (gamma * activation(factors.down(x, train['a']))) @ train['b']
    chosen = x.at[..., channels].get(**sparse.KNOWN)
    return low + ((1 - gamma) * chosen) @ train['rows']

  def materialize(split: Split) -> jax.Array:
    W = kernel(factors.cast(split.train, jnp.float32), split.fixed['channels'])
    return W.astype(split.train['a'].dtype)

  return Parameterization(
    init=init,
    from_dense=from_dense,
    apply=apply,
    materialize=materialize if act is None else None,
    axes={
      'a': ('in', None),
      'b': (None, 'out'),
      'rows': (None, 'out'),
      'channels': (None,),
    },
  )


_ROWS = {
  'original': lambda W, rest: W,
  'complement': lambda W, rest: rest,
}


def _count(ratio: float, shape: tuple[int, ...]) -> int:
  k = round(ratio * shape[0])
  if k < 1:
    raise ValueError(
      f'channel_ratio must choose at least one channel, 1/{shape[0]} for a kernel of'
      f' shape {tuple(shape)}, got {ratio}'
    )
  return k
