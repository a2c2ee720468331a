"""Maestro: factors whose columns are ordered by importance, and shrink in training.

Horvath et al., "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition",
2023, arXiv 2308.14929.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lrjax.checks import finite
from lrjax.ordered_dropout import has_widths
from lrjax.parameterizations import factors
from lrjax.parameterizations.factors import value
from lrjax.types import Event, Parameterization, Split


@value
def maestro(
  rank: int | None = None,
  chance: float = 1.0,
  shrink_every: int | None = None,
  threshold: float = 1e-5,
) -> Parameterization:
  r"""W = ab, applied with only its first columns: :math:`y = (x a)_{:w}\, b_{:w}`.

  a (in, p) and b (p, out) start from the SVD of the dense start, split evenly. Two
  numbers are fixed: `width`, how many columns are kept, and `sampled`, the w of this
  step. Ordered dropout (event `sample`) draws w anew before each update,

  .. math::
    w \sim \mathrm{Unif}\{1, \dots, \mathrm{width}\} \text{ with probability } q,
    \text{ else } w = \mathrm{width}

  so that early columns learn what matters most; `hierarchical_group_lasso` pulls late
  ones to zero, and the event `shrink` counts those that are left:

  .. math::
    \mathrm{width} = \#\{k : \|a_{:, k:}\|_F\, \|b_{k:, :}\|_F \ge \varepsilon\}

  Columns beyond the width are not applied and get no gradient, but they stay, may drift
  by momentum and come back at the next shrink, as in the public code; `lrjax.compact`
  removes them for good. `q = 1` is that code's sampler `across_layers`. The paper's,
  `per_layer`, has one kernel of the model below its width at each step: with
  `chance=0` and `lrjax.sample_widths` in the step exactly so, and about so with chance
  = 1 / (number of kernels).

  Evaluate with `lrjax.full_width(fixed)`, or w of the last step is what is measured. The
  paper can also train the full width along: add the loss with `full_width(fixed)`, and
  let its softmax, under `stop_gradient`, be the targets of the sampled pass.

  Memory: p (in + out) weights, twice the dense ones where in = out, and as many of each
  moment; 2 p (in + out) multiplications a token whatever w is, until `compact`. In the
  end w (in + out), less than dense below w = in out / (in + out); export those above it.

  Choose it to learn each layer's rank, or for one model that can be cut to many sizes,
  not to save memory while training. Nothing is published for large language models.

  Args:
    rank: p; None: min(in, out).
    chance: q, of being sampled at a step; 0: never, there is no event `sample`.
    shrink_every: updates between shrinks (an epoch in the paper); None: no shrinking.
    threshold: the least importance of a column that is kept.

  Returns:
    A Parameterization; its events are `sample`, at every step, and `shrink`. Both change
    the function.

  Raises:
    ValueError: for a chance outside [0, 1], or at `init` for a rank that does not fit.

  Examples:
    >>> W = maestro(chance=0.1).init(jax.random.key(0), (4, 3), jnp.float32)
    >>> W.train['a'].shape, int(W.fixed['width'])
    ((4, 3), 3)
  """
  if finite('chance', chance) > 1:
    raise ValueError(f'chance must be at most 1, got {chance}')
  finite('threshold', threshold)

  def split_of(W: jax.Array, dtype: jax.typing.DTypeLike) -> tuple:
    p = min(W.shape) if rank is None else factors.check_rank(rank, W.shape)
    a, b = factors.spectral(W, p)
    # Two arrays: one buffer cannot be donated twice.
    fixed = {'width': jnp.array(p, jnp.int32), 'sampled': jnp.array(p, jnp.int32)}
    return Split({'a': a.astype(dtype), 'b': b.astype(dtype)}, fixed), a @ b

  def start(key: jax.Array, shape: tuple, dtype: jax.typing.DTypeLike) -> Split:
    return split_of(factors.dense_init(key, shape), dtype)[0]

  def from_dense(key: jax.Array, W: jax.Array) -> tuple[Split, jax.Array]:
    split, product = split_of(W, W.dtype)
    return split, factors.relative_error(W, product)

  def apply(split: Split, x: jax.Array) -> jax.Array:
    h = _first(split.fixed['sampled'], factors.down(x, split.train['a']))
    return h @ split.train['b']

  def materialize(split: Split) -> jax.Array:
    a, b = split.train['a'], split.train['b']
    return factors.product(_first(split.fixed['width'], a), b)

  sample = (_sample(chance),) if chance else ()
  shrinks = () if shrink_every is None else (_shrink(shrink_every, threshold),)
  return Parameterization(
    init=start,
    from_dense=from_dense,
    apply=apply,
    materialize=materialize,
    axes={'a': ('in', None), 'b': (None, 'out'), 'width': (), 'sampled': ()},
    events=(*sample, *shrinks),
  )


def hierarchical_group_lasso(kernel: Mapping[str, jax.Array]) -> jax.Array:
  r""":math:`\sum_k \|a_{:, k:}\|_F + \|b_{k:, :}\|_F`, over all columns.

  For `lrjax.add_penalty(hierarchical_group_lasso, 1e-6)`. Its gradient is zero at a
  suffix that is exactly zero, where the public code has NaN.

  Args:
    kernel: `a` (..., in, p) and `b` (..., p, out).

  Returns:
    A scalar, the sum over a stack.

  >>> kernel = {'a': jnp.array([[3.0, 4.0]]), 'b': jnp.zeros((2, 1))}
  >>> print(hierarchical_group_lasso(kernel))
  9.0
  """
  return sum((jnp.sum(x) for x in _suffix_norms(kernel)), jnp.float32(0))


def importance(kernel: Mapping[str, jax.Array]) -> jax.Array:
  r""":math:`\|a_{:, k:}\|_F\, \|b_{k:, :}\|_F` (..., p), which falls with k."""
  a, b = _suffix_norms(kernel)
  return a * b


def compact(split: Split) -> Split:
  """Cuts the columns beyond the width off, on the host; no output changes.

  A stack keeps as many as its widest kernel, with zeros in the others; at least one
  stays. The rest is a kernel of `lrjax.factorized` too. Use
  `weights = lrjax.resize(plan, lrjax.compact, weights, tx=tx)` on a whole model: the
  step compiles once more.

  Args:
    split: of one kernel or of a stack; others than Maestro's come back as they are.

  Returns:
    A Split with smaller `a` and `b`.

  >>> split = maestro().init(jax.random.key(0), (4, 3), jnp.float32)
  >>> small = compact(Split(split.train, split.fixed | {'width': jnp.array(2)}))
  >>> small.train['a'].shape, small.train['b'].shape
  ((4, 2), (2, 3))
  """
  if not has_widths(split.fixed):
    return split
  width = split.fixed['width']
  w = max(1, int(width.max()))
  columns = jax.lax.broadcasted_iota(jnp.int32, (*width.shape, w), width.ndim)
  kept = columns < jnp.expand_dims(width, -1)
  a = jnp.where(jnp.expand_dims(kept, -2), split.train['a'][..., :w], 0)
  b = jnp.where(jnp.expand_dims(kept, -1), split.train['b'][..., :w, :], 0)
  return split._replace(train={'a': a, 'b': b})


def _sample(chance: float) -> Event:
  def weights(key: jax.Array, split: Split, k: jax.Array) -> tuple[Split, dict]:
    often, which = jax.random.split(key)
    width = split.fixed['width']
    # A whole number, because ceil(width * (j / width)) may be j + 1.
    drawn = jax.random.randint(which, (), 1, jnp.maximum(width, 1) + 1)
    use = jax.random.bernoulli(often, chance)
    sampled = jnp.where(use, jnp.minimum(drawn, width), width)
    return split._replace(fixed={**split.fixed, 'sampled': sampled}), {}

  return Event('sample', weights, preserves=False)


def _shrink(every: int, threshold: float) -> Event:
  def weights(key: jax.Array, split: Split, k: jax.Array) -> tuple[Split, dict]:
    was, sampled = split.fixed['width'], split.fixed['sampled']
    width = jnp.sum(importance(split.train) >= threshold, dtype=jnp.int32)
    # What was drawn for the coming step stays drawn.
    sampled = jnp.where(sampled == was, width, jnp.minimum(sampled, width))
    return split._replace(fixed={'width': width, 'sampled': sampled}), {}

  return Event('shrink', weights, factors.periodic(every), preserves=False)


def _first(w: jax.Array, x: jax.Array) -> jax.Array:
  """x with zeros in all but its first w columns."""
  columns = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
  return jnp.where(columns < w, x, 0)


def _suffix_norms(kernel: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Norms (..., p) of a and b from each column, or row, to the last."""
  squares = lambda name, axis: jnp.sum(kernel[name].astype(jnp.float32) ** 2, axis)

  def norms(x: jax.Array) -> jax.Array:
    x = jax.lax.cumsum(x, axis=x.ndim - 1, reverse=True)
    # Twice, because a root has no gradient at 0 and NaN would leak through one `where`.
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)

  return norms(squares('a', -2)), norms(squares('b', -1))
