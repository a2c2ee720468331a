"""SLTrain: a low-rank plus a sparse kernel.

Han et al., "SLTrain: a sparse plus low-rank approach for parameter and memory efficient
pretraining", 2024, arXiv 2406.02214; restarts: Glentis et al., "Scalable Parameter and
Memory Efficient Pretraining for LLM", 2025, arXiv 2505.22922.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from lrjax.checks import finite, named, positive_int
from lrjax.parameterizations import factors, sparse
from lrjax.parameterizations.factorized import restart
from lrjax.parameterizations.factors import value
from lrjax.types import Parameterization, PyTree, Split


@value
def sltrain(
  rank: int,
  density: float = 0.03,
  alpha: float | None = 32.0,
  act: factors.Act | None = None,
  restart_every: int | None = None,
  in_shards: int = 1,
  out_shards: int = 1,
  import_support: Literal['random', 'largest'] = 'random',
) -> Parameterization:
  r"""W = s ab + S, where S has trained values on a support drawn once: y = x W.

  .. math::
    s = \alpha / r, \qquad S_{ij} = v_n \text{ at the n-th place } (i, j)
    \text{ of the support, else } 0

  Start: a and v uniform on :math:`\pm` in^-1/2, b = 0, a uniformly random support of
  int(density in out) places. W has full rank in general, if density min(in, out) is well
  above log min(in, out).

  W is formed for each product, and once more in the backward pass: what is kept between
  the two is x, a, b, v and the support, nothing of in * out numbers.

  With `act='silu'` the low-rank branch has a nonlinearity,
  :math:`y = s\, \mathrm{silu}(x a) b + x S`, reported to be stable at extreme sparsity
  where the plain sum is not; no matrix stands for the layer then.

  Memory: r (in + out) + density in out weights, as many of each moment, and 4 bytes for
  each place of the support; while a kernel is used, one W and one gradient of W. Flops
  2 in out a token, as for a dense kernel, and 2 r in out a call to form W.

  Choose it where weights and moments are what does not fit, and you want full rank: at
  equal memory it is better than plain low-rank training, and slower. Published runs have
  rank 128, 256, 256, 512 and alpha 32, 16, 16, 8 at 60M, 130M, 350M and 1B with a rate of
  3e-3; s differs between them by 16, so tune the rate anew after changing alpha or rank.

  Args:
    rank: r, at most min(in, out).
    density: share of all places that are in the support, in (0, 1].
    alpha: s = alpha / r; None: s = tanh(theta) with a trained theta, 1 at the start.
    act: nonlinearity between a and b; None: none.
    restart_every: updates between restarts, which rebalance a and b and have the whole
      optimizer start anew, see `lrjax.factorized`; None: no restarts.
    in_shards: into how many parts a mesh splits `in`, or a multiple of it.
    out_shards: the same for `out`. Each of the in_shards * out_shards blocks then has as
      many places, so that devices add the values of their own blocks; the law is the
      stratified version of the uniform one. Both belong to the meaning of a checkpoint:
      load it with the same.
    import_support: where `from_dense` keeps what ab misses of a kernel: at `random`, as
      at the start, or where that is `largest`.

  Returns:
    A Parameterization; its event is `restart`. Its gradient is of reverse mode only.

  Raises:
    ValueError: for an argument out of range, or at `init` for a rank, density or shards
      that do not fit the shape.
    TypeError: for an argument of another type.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> W = sltrain(2, density=0.25).init(jax.random.key(0), (4, 6), jnp.float32)
    >>> jax.tree.map(jnp.shape, W.train)
    {'a': (4, 2), 'b': (2, 6), 'values': (6,)}
    >>> W.fixed['index'].dtype
    dtype('int32')
  """
  sparse.check_fraction('density', density)
  shards = positive_int('in_shards', in_shards), positive_int('out_shards', out_shards)
  choose_support = named('import_support', import_support, _SUPPORTS)
  activation = None if act is None else named('act', act, factors.ACTS)
  if activation and restart_every is not None:
    raise ValueError(
      'a restart turns the axis between a and b, which `act` does not survive; give'
      f' either act=None or restart_every=None, got {act!r} and {restart_every}'
    )
  if alpha is not None and not finite('alpha', alpha):
    raise ValueError(f'`alpha` must be above 0, or ab would not count, got {alpha}')
  learned = {'theta': 1.0} if alpha is None else {}

  def scale(train: dict) -> float | jax.Array:
    return alpha / rank if alpha is not None else jnp.tanh(train['theta'])

  def add_sparse(W: jax.Array, train: dict, fixed: Mapping) -> jax.Array:
    return sparse.scatter(W, train['values'], fixed['index'], shards)

  def whole(train: dict, fixed: Mapping) -> jax.Array:
    return add_sparse((scale(train) * train['a']) @ train['b'], train, fixed)

  def sparse_part(train: dict, fixed: Mapping) -> jax.Array:
    shape = train['a'].shape[0], train['b'].shape[1]
    return add_sparse(jnp.zeros(shape, train['values'].dtype), train, fixed)

  def init(key: jax.Array, shape: tuple, dtype: jax.typing.DTypeLike) -> Split:
    r = factors.check_rank(rank, shape)
    ka, kv, ki = jax.random.split(key, 3)
    index = sparse.uniform(ki, shape, density, shards)
    a = factors.kaiming(ka, (shape[0], r), shape[0])
    values = factors.kaiming(kv, index.shape, shape[0])
    train = {'a': a, 'b': jnp.zeros((r, shape[1])), 'values': values, **learned}
    return Split(factors.cast(train, dtype), {'index': index})

  def from_dense(key: jax.Array, W: jax.Array) -> tuple[Split, jax.Array]:
    a, b = factors.spectral(W, factors.check_rank(rank, W.shape))
    missed = W.astype(jnp.float32) - factors.product(a, b)
    index = choose_support(key, missed, density, shards)
    values = sparse.gather(missed, index, shards)
    left = sparse.scatter(missed, -values, index, shards)
    root = jnp.sqrt(scale(learned))
    train = {'a': a / root, 'b': b / root, 'values': values, **learned}
    split = Split(factors.cast(train, W.dtype), {'index': index})
    return split, factors.relative_error(W, W.astype(jnp.float32) - left)

  def materialize(split: Split) -> jax.Array:
    train = factors.cast(split.train, jnp.float32)
    W = factors.product(scale(train) * train['a'], train['b'])
    return add_sparse(W, train, split.fixed).astype(split.train['a'].dtype)

  times = _rebuilding(whole if activation is None else sparse_part)

  def apply(split: Split, x: jax.Array) -> jax.Array:
    train = split.train
    y = times(x, dict(train), dict(split.fixed))
    if activation is None:
      return y
    return y + (scale(train) * activation(factors.down(x, train['a']))) @ train['b']

  return Parameterization(
    init=init,
    from_dense=from_dense,
    apply=apply,
    materialize=materialize if activation is None else None,
    axes={'a': ('in', None), 'b': (None, 'out'), 'values': (None,), 'index': (None,)}
    | dict.fromkeys(learned, ()),
    events=() if restart_every is None else (restart(restart_every),),
  )


_SUPPORTS = {
  'random': lambda key, W, *how: sparse.uniform(key, W.shape, *how),
  'largest': lambda key, W, *how: sparse.largest(jnp.abs(W), *how),
}


def _rebuilding(form: Callable[[dict, Mapping], jax.Array]) -> Callable:
  """`(x, train, fixed) -> x @ form(train, fixed)`, which keeps no W for its gradient."""

  @jax.custom_vjp
  def times(x: jax.Array, train: dict, fixed: Mapping) -> jax.Array:
    return x @ form(train, fixed)

  def forward(x: jax.Array, train: dict, fixed: Mapping) -> tuple[jax.Array, PyTree]:
    return times(x, train, fixed), (x, train, fixed)

  def backward(saved: PyTree, dy: jax.Array) -> tuple:
    # Behind the barrier, or the compiler finds that W was formed before and keeps it.
    (x, train, fixed), dy = jax.lax.optimization_barrier((saved, dy))
    W, pull = jax.vjp(lambda train: form(train, fixed), train)
    G = jnp.einsum('...i,...o->io', x, dy).astype(W.dtype)
    return (dy @ W.T).astype(x.dtype), *pull(G), None

  times.defvjp(forward, backward)
  return times
