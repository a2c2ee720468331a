"""Plain low-rank training: every kernel is a product of two thin factors, for good.

Khodak et al., "Initialization and Regularization of Factorized Neural Layers", 2021,
arXiv 2105.01029; Kamalakara et al., "Exploring Low Rank Training of Deep Neural
Networks", 2022, arXiv 2209.13569; restarts: Glentis et al., "Scalable Parameter and
Memory Efficient Pretraining for LLM", 2025, arXiv 2505.22922.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from lrjax.checks import named
from lrjax.parameterizations import factors
from lrjax.parameterizations.factors import value
from lrjax.types import Event, Parameterization, Split

Init = Literal['spectral', 'spectral_ones', 'xavier', 'kaiming', 'normal']


@value
def factorized(
  rank: int,
  init: Init = 'spectral',
  restart_every: int | None = None,
) -> Parameterization:
  r"""W = ab with a (in, r) and b (r, out): y = (x a) b.

  Start, with :math:`W_0 \sim N(0, 0.02^2)` and its SVD :math:`U S V^\top`:

  - `spectral`: :math:`a = U_r S_r^{1/2},\ b = S_r^{1/2} V_r^\top`;
  - `spectral_ones`: the same with ones for :math:`S_r`;
  - `xavier`: normal, variances 2 / (in + r) and 2 / (r + out);
  - `kaiming`: uniform on :math:`\pm` in^-1/2 and :math:`\pm` r^-1/2;
  - `normal`: both of variance 0.02 / sqrt(r), so that ab has the entries of
    :math:`W_0`.

  A restart rebalances the factors, :math:`a^\top a = b b^\top`, leaves ab as it is and
  has the whole optimizer start anew; give the learning rate `lrjax.with_restarts`.

  Memory: r (in + out) weights, and as many of each moment. Multiplications 2 r
  (in + out) a token. For weight decay prefer `lrjax.frobenius_decay`, on ab, to decay on
  the factors, which penalises the nuclear norm.

  Choose it as the baseline that other low-rank methods have to beat: with a spectral
  start, Frobenius decay and a tuned rate it is better than its reputation.

  Args:
    rank: r, at most min(in, out).
    init: how a and b are drawn.
    restart_every: updates between restarts; None: no restarts. The paper has 200.

  Returns:
    A Parameterization; its event is `restart`.

  Raises:
    ValueError: for an unknown `init`, or at `init` for a rank that does not fit.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> W = factorized(2).init(jax.random.key(0), (4, 3), jnp.float32)
    >>> jax.tree.map(jnp.shape, W.train)
    {'a': (4, 2), 'b': (2, 3)}
  """
  draw = named('init', init, _INITS)

  def start(key: jax.Array, shape: tuple, dtype: jax.typing.DTypeLike) -> Split:
    a, b = draw(key, shape, factors.check_rank(rank, shape))
    return Split({'a': a.astype(dtype), 'b': b.astype(dtype)})

  def from_dense(key: jax.Array, W: jax.Array) -> tuple[Split, jax.Array]:
    a, b = factors.spectral(W, factors.check_rank(rank, W.shape))
    split = Split({'a': a.astype(W.dtype), 'b': b.astype(W.dtype)})
    return split, factors.relative_error(W, a @ b)

  return Parameterization(
    init=start,
    from_dense=from_dense,
    apply=lambda s, x: factors.down(x, s.train['a']) @ s.train['b'],
    materialize=lambda s: factors.product(s.train['a'], s.train['b']),
    axes={'a': ('in', None), 'b': (None, 'out')},
    events=() if restart_every is None else (restart(restart_every),),
  )


def restart(every: int) -> Event:
  """Rebalances the factors `a`, `b` every so many updates; the optimizer starts anew."""

  def weights(key: jax.Array, split: Split, k: jax.Array) -> tuple[Split, dict]:
    a, b = split.train['a'], split.train['b']
    new = dict(zip('ab', factors.rebalance(a, b)))
    train = {n: new.get(n, x).astype(x.dtype) for n, x in split.train.items()}
    return split._replace(train=train), {'a': True, 'b': True}

  return Event('restart', weights, factors.periodic(every), everything=True)


def _spectral_ones(key, shape, r):
  U, _, Vt = factors.svd(factors.dense_init(key, shape))
  return U[:, :r], Vt[:r]


def _pair(f):
  def draw(key, shape, r):
    ka, kb = jax.random.split(key)
    return f(ka, (shape[0], r), shape, r), f(kb, (r, shape[1]), shape, r)

  return draw


_INITS = {
  'spectral': lambda key, shape, r: factors.spectral(factors.dense_init(key, shape), r),
  'spectral_ones': _spectral_ones,
  'xavier': _pair(
    lambda key, s, shape, r: jax.random.normal(key, s) * jnp.sqrt(2 / sum(s))
  ),
  'kaiming': _pair(lambda key, s, shape, r: factors.kaiming(key, s, s[0])),
  'normal': _pair(
    lambda key, s, shape, r: jax.random.normal(key, s) * (0.02**2 / r) ** 0.25
  ),
}
