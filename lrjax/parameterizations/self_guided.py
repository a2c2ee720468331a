"""Self-guided training: a dense guide that fades out of a factorized kernel.

Wei et al., "Building on Efficient Foundations: Effectively Training LLMs with Structured
Feedforward Layers", 2024, arXiv 2406.16450.
"""

import jax
import jax.numpy as jnp

from lrjax.checks import positive_int
from lrjax.parameterizations import factors
from lrjax.parameterizations.factorized import Init, factorized
from lrjax.parameterizations.factors import value
from lrjax.types import Event, Parameterization, Split


@value
def self_guided(
  rank: int,
  guide_steps: int,
  init: Init = 'spectral',
  skip: bool = False,
) -> Parameterization:
  r"""A dense guide G beside the factors: :math:`y = \alpha x G + (1 - \alpha) (x a) b`.

  .. math::
    \alpha_k = \tfrac12 (1 + \cos(\pi k / T)) \text{ for } k < T, \text{ then } 0

  G (in, out) starts as ab, so at first both branches are the same function, and is
  trained along. The event `guide` sets :math:`\alpha` before each update. After T updates
  nothing depends on G: drop it with
  `weights = lrjax.resize(plan, lrjax.strip_guide, weights, tx=tx)`, and go on with
  `lrjax.factorized(rank)`.

  Memory while guided: in out + r (in + out) weights, and as many of each moment, so more
  than dense; 2 (in out + r (in + out)) multiplications a token. `skip` saves half of
  those of the guide on average: at each step G is left out with probability
  :math:`1 - \alpha`, and then y = (x a) b, as `reduce_flop` in the public code.

  Choose it where the final model must be factorized but training may cost as much as
  dense: it ends better than factors trained alone from the start.

  Args:
    rank: r, at most min(in, out).
    guide_steps: T; the paper has half of all updates.
    init: how a and b are drawn, see `lrjax.factorized`.
    skip: leave the guide out at random; costs a conditional in each layer.

  Returns:
    A Parameterization; its event is `guide`, and changes the function. A dense matrix
    given to `from_dense` becomes the guide itself, so nothing is lost before it fades.

  Raises:
    ValueError: for an unknown `init`, or at `init` for a rank that does not fit.

  Examples:
    >>> p = self_guided(2, guide_steps=100)
    >>> W = p.init(jax.random.key(0), (4, 3), jnp.float32)
    >>> jax.tree.map(jnp.shape, W.train), float(W.fixed['alpha'])
    ({'a': (4, 2), 'b': (2, 3), 'guide': (4, 3)}, 1.0)
  """
  positive_int('guide_steps', guide_steps)
  low = factorized(rank, init)

  def guided(split: Split, guide: jax.Array) -> Split:
    fixed = {'alpha': jnp.float32(1), 'rest': jnp.float32(0)}
    return Split({**split.train, 'guide': guide}, fixed)

  def start(key: jax.Array, shape: tuple, dtype: jax.typing.DTypeLike) -> Split:
    split = low.init(key, shape, dtype)
    return guided(split, factors.product(split.train['a'], split.train['b']))

  def from_dense(key: jax.Array, W: jax.Array) -> tuple[Split, jax.Array]:
    split, _ = low.from_dense(key, W)
    return guided(split, jnp.asarray(W)), jnp.float32(0)

  def apply(split: Split, x: jax.Array) -> jax.Array:
    y = low.apply(split, x)
    mixed = lambda: _mix(split, x @ split.train['guide'], y)
    return jax.lax.cond(split.fixed['alpha'] > 0, mixed, lambda: y) if skip else mixed()

  def materialize(split: Split) -> jax.Array:
    ab = factors.product(split.train['a'], split.train['b'])
    return _mix(split, split.train['guide'], ab)

  return Parameterization(
    init=start,
    from_dense=from_dense,
    apply=apply,
    materialize=materialize,
    axes={
      'a': ('in', None),
      'b': (None, 'out'),
      'guide': ('in', 'out'),
      'alpha': (),
      'rest': (),
    },
    events=(_fade(guide_steps, skip),),
  )


def strip_guide(split: Split) -> Split:
  """Drops the guide; what is left is a kernel of `lrjax.factorized`.

  Args:
    split: of one kernel or of a stack; others come back as they are.

  Returns:
    A Split without `guide`, `alpha` and `rest`.

  >>> split = self_guided(2, 9).init(jax.random.key(0), (4, 3), jnp.float32)
  >>> [*strip_guide(split).train]
  ['a', 'b']
  """
  if not {'alpha', 'rest'} <= split.fixed.keys():
    return split
  return Split({name: split.train[name] for name in ('a', 'b')})


def _fade(steps: int, skip: bool) -> Event:
  def weights(key: jax.Array, split: Split, k: jax.Array) -> tuple[Split, dict]:
    angle = 0.5 * jnp.pi * k.astype(jnp.float32) / steps
    # Both are stored: in bfloat16 1 - alpha would be 0 for the first 3 % of the way, and
    # the factors would not move.
    alpha, rest = jnp.cos(angle) ** 2, jnp.sin(angle) ** 2
    use = k < steps
    if skip:
      use &= jax.random.uniform(key) < alpha
    fixed = {'alpha': jnp.where(use, alpha, 0), 'rest': jnp.where(use, rest, 1)}
    return split._replace(fixed=fixed), {}

  return Event('guide', weights, preserves=False)


def _mix(split: Split, guide: jax.Array, low: jax.Array) -> jax.Array:
  alpha, rest = split.fixed['alpha'], split.fixed['rest']
  return (alpha * guide + rest * low).astype(low.dtype)
