"""ReLoRA: a frozen kernel that takes up one low-rank update after the other.

Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", 2023, arXiv
2307.05695.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from lrjax.checks import finite, named, positive_int
from lrjax.parameterizations import factors
from lrjax.parameterizations.factors import value
from lrjax.types import Event, Parameterization, Split

Moments = Literal['zero', 'random', 'magnitude']


@value
def relora(
  rank: int,
  merge_every: int,
  alpha: float | None = 32.0,
  moments: Moments = 'zero',
  prune: float = 0.9,
) -> Parameterization:
  r"""W = K + s ab with K frozen: y = x K + s (x a) b, merged into K now and then.

  .. math::
    K \leftarrow K + s\,ab, \quad
    a \sim U(\pm \mathrm{in}^{-1/2}), \quad b \leftarrow 0

  right after the updates T, 2T, ..., counted from 0. The function stays; W moves by rank
  r between merges and by any rank over several. Moments of a and b are then set to

  - `zero`: their start;
  - `random`: their start in each entry with probability `prune`; the public code's
    reset is this with 0.999;
  - `magnitude`: their start but for the entries above the `prune` quantile of
    magnitudes, of each matrix and each moment on its own.

  Adam's count goes on, so that the first step after zeroed moments is 3.2 times too
  long; let the learning rate rise again. The jagged cosine of the paper, which is 0 at the
  update that a merge follows, is

    cosine = optax.warmup_cosine_decay_schedule(0, peak, 500, total, 0.1 * peak)
    rate = lrjax.with_restarts(cosine, every=T, warmup=100)

  Start from trained weights: `lrjax.convert` on a model that was trained densely for a
  quarter of its steps, as in the paper, and count updates from there. Drawn by `init`, K
  is frozen noise, N(0, 0.02^2), that low-rank updates have to outgrow.

  Memory: in out frozen weights without gradient or moments, r (in + out) trained ones
  with two of each. Multiplications a token: in out + r (in + out) forward, and twice the
  last plus in out backward. A merge takes in out r.

  Choose it to go on training a model whose moments or gradient traffic have to shrink.
  Most of its gain is the warm start: in the paper's ablation at 130M that alone takes
  perplexity from 34.2 to 25.5, everything together to 25.0, full training to 23.7.

  Args:
    rank: r, at most min(in, out); 128 in the paper.
    merge_every: T, updates between merges; 1000 to 5000 in the paper.
    alpha: s = alpha / r; None: s = tanh(theta) is trained, and theta is 1 at first and
      after every merge.
    moments: what a merge does to the moments of a and b, see above.
    prune: for `random` and `magnitude`, the fraction of moments that is lost.

  Returns:
    A Parameterization; its event is `merge`.

  Raises:
    ValueError: for an unknown `moments`, `prune` outside [0, 1], or at `init` for a rank
      that does not fit.

  Notes:
    The public code sets a to 0 as well when it wraps trained weights, and theta to 0 when
    it merges: then all gradients are 0, until the first merge or for good. Neither
    happens here. Its dropout of 0.1 on x ahead of a is left out, and so is a K in 4 bits.

    `random` and `magnitude` prune the two moments apart, as the public code does. An entry
    of a that keeps the first and loses the second takes a step of m / eps after a merge,
    where its gradient is 0 because b is: give Adam an eps of the size of gradients with
    them. `zero` leaves no such entries.

    In bfloat16 a merge is summed in float32 and rounded once, which still loses small
    updates; keep the weights in float32.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> split, error = relora(2, 1000).from_dense(jax.random.key(0), jnp.eye(4))
    >>> jax.tree.map(jnp.shape, split.train)
    {'a': (4, 2), 'b': (2, 4)}
  """
  positive_int('rank', rank)
  if finite('prune', prune) > 1:
    raise ValueError(f'`prune` must be at most 1, got {prune}')
  change = named('moments', moments, _CHANGES)(prune)

  def start(key: jax.Array, W: jax.Array) -> dict[str, jax.Array]:
    r = factors.check_rank(rank, W.shape)
    a = factors.kaiming(key, (W.shape[0], r), W.shape[0])
    train = {'a': a.astype(W.dtype), 'b': jnp.zeros((r, W.shape[1]), W.dtype)}
    return train if alpha is not None else train | {'theta': jnp.ones((), W.dtype)}

  def scale(train: dict[str, jax.Array]) -> float | jax.Array:
    return jnp.tanh(train['theta']) if alpha is None else alpha / rank

  def init(key: jax.Array, shape: tuple, dtype: jax.typing.DTypeLike) -> Split:
    key_W, key_a = jax.random.split(key)
    W = factors.dense_init(key_W, shape).astype(dtype)
    return Split(start(key_a, W), {'kernel': W})

  def from_dense(key: jax.Array, W: jax.Array) -> tuple[Split, jax.Array]:
    return Split(start(key, W), {'kernel': jnp.asarray(W)}), jnp.float32(0)

  def materialize(split: Split) -> jax.Array:
    a, b = split.train['a'], split.train['b']
    return factors.fold(split.fixed['kernel'], a, b, scale(split.train))

  def merge(key: jax.Array, split: Split, k: jax.Array) -> tuple[Split, dict]:
    W = materialize(split)
    return Split(start(key, W), {'kernel': W}), dict.fromkeys(split.train, True)

  def apply(split: Split, x: jax.Array) -> jax.Array:
    low = scale(split.train) * factors.down(x, split.train['a'])
    return x @ split.fixed['kernel'] + low @ split.train['b']

  after = factors.periodic(merge_every)
  vectors = {'theta': ()} if alpha is None else {}
  return Parameterization(
    init=init,
    from_dense=from_dense,
    apply=apply,
    materialize=materialize,
    axes={'a': ('in', None), 'b': (None, 'out'), 'kernel': ('in', 'out')} | vectors,
    # Before update T + 1, so that no gradient of the old factors enters new moments.
    events=(Event('merge', merge, lambda k: after(k - 1), change),),
  )


def pruned_at_random(ratio: float) -> Callable:
  """Moments that start anew in each entry with probability `ratio`."""

  def change(key: jax.Array, x: jax.Array, start: jax.Array) -> jax.Array:
    return jnp.where(jax.random.uniform(key, x.shape) > ratio, x, start)

  return _on_moments(change)


def pruned_by_magnitude(ratio: float) -> Callable:
  """Moments that start anew but for the entries above a quantile of magnitudes.

  Matrices of a stack have a quantile each.
  """

  def change(key: jax.Array, x: jax.Array, start: jax.Array) -> jax.Array:
    size = jnp.abs(x.astype(jnp.float32))
    threshold = jnp.quantile(size, ratio, axis=(-2, -1), keepdims=True)
    return jnp.where(size > threshold, x, start)

  return _on_moments(change)


def _on_moments(change: Callable) -> Callable:
  def checked(key: jax.Array, x: jax.Array, start: jax.Array) -> jax.Array:
    if x.dtype == jnp.int32:  # the step counts of `lrjax.scale_by_vector_adam` go on
      return x
    if x.ndim < 2:  # those of theta
      return start
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(
        f'moments stored as {x.dtype} cannot be pruned in part; use moments="zero" or an'
        ' optimizer that keeps those of a and b as numbers'
      )
    return change(key, x, start)

  return checked


_CHANGES = {
  'zero': lambda prune: None,
  'random': pruned_at_random,
  'magnitude': pruned_by_magnitude,
}
