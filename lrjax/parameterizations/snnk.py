r"""SNNK: a layer f(w.x) as a product of random features of x and of w.

Sehanobish et al., "Scalable Neural Network Kernels", ICLR 2024, arXiv 2310.13225.
"""

import functools
import math

import jax
import jax.numpy as jnp

from lrjax.checks import finite, positive_int
from lrjax.parameterizations import factors
from lrjax.parameterizations import random_features as rf
from lrjax.parameterizations.factors import value
from lrjax.parameterizations.random_features import Features, Kind
from lrjax.types import Parameterization, Split

# Random inputs on which `from_dense` compares the layer with x W.
_PROBES = 64


@value
def snnk(
  features: int | tuple[int, ...],
  kind: Kind = 'relu',
  orthogonal: bool = False,
  normalize: float | None = None,
  threshold: float = 0.0,
  M: float = 0.0,
) -> Parameterization:
  r"""y = Phi(x) R with fixed random features Phi and a trained readout R (l, out).

  R starts as :math:`\Psi(W_0)`, features of each column of
  :math:`W_0 \sim N(0, 0.02^2)`, so that y estimates a kernel of x and these columns. With
  G (l, in) of standard normal rows, fixed for good:

  - `relu`: :math:`\Phi(z) = \Psi(z) = l^{-1/2} \max(G z, c)`. For c = 0 the mean of y is
    :math:`|x| |w| (\sin t + (\pi - t) \cos t) / 2\pi`, t the angle between x and w; it is
    not ReLU(w.x).
  - `cos`, `sin`, `exp`: y is an unbiased estimate of f(w.x), by
    :math:`e^{s w.x} = E_g [e^{s g.x - s^2 |x|^2 / 2} e^{g.w - |w|^2 / 2}]` with s = i for
    waves and 1 for `exp`. Features of x are then 2 l numbers for waves, the real and the
    imaginary part (cos g.x, sin g.x) :math:`e^{|x|^2 / 2} l^{-1/2}`, and l for `exp`;
    R has as many rows.

  The spread of these estimates grows as :math:`e^{|x|^2}`, and the features overflow for
  |x| above 13 in any dtype but float64, so x and w are made shorter: by in^-1/4 as in the
  official code (f is then taken at w.x / sqrt(in)), or to the length `normalize`.

  Several numbers of features are a chain of such layers that was bundled, see `bundle`.

  Memory: l out trained weights (2 l out for waves), l in fixed ones that no optimizer
  keeps moments of. Multiplications l (in + out) a token. A bundled pair trains l1 l2
  in place of out1 l1, and has no second G.

  Choose it for adapters and small uptrained layers, where few trained weights matter and
  l in the tens is enough: the estimate improves as l^-1/2 only, and G costs the memory of
  a frozen kernel of rank l. As the kernel of a whole language model it is a curiosity.
  Nothing here is linear in x, so it cannot be exported to dense kernels.

  Args:
    features: l, or (l1, l2, ...) for a bundled chain, whose dropped widths are `in` at
      the start.
    kind: which function or kernel.
    orthogonal: blocks of `in` rows of G are orthogonal, their lengths those of
      independent normal vectors; less spread, still unbiased.
    normalize: length that x and columns of W0 are given; None: as they come, for `relu`,
      and times in^-1/4 for the others.
    threshold: c of `relu`; below 0 lets some negative features pass.
    M: above -1/4, for `cos`, `sin` and `exp`: the variance-reduced features of the paper,
      :math:`\sqrt{1 + 4 M} g.z` in place of g.z; the constants
      :math:`e^{-2 M |g|^2} (1 + 4 M)^{in/2}`, about :math:`e^{-4 M^2 in}`, are in R, so it
      is for a small M or few inputs.

  Returns:
    A Parameterization. `from_dense` puts W in the place of W0; its error is that of y
    against x W for standard normal x.

  Raises:
    TypeError: for a number of features that is no int.
    ValueError: for an unknown `kind`, a number out of range, or one the kind has no use
      for.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> W = snnk(8).init(jax.random.key(0), (4, 3), jnp.float32)
    >>> W.train['readout'].shape, W.fixed['proj'].shape
    ((8, 3), (4, 8))

    An adapter that is the identity at the start, x + zero(snnk(x)):

    >>> import lrjax
    >>> from lrjax.modules.nnx import Dense
    >>> from flax import nnx
    >>> zero, rngs = lrjax.dense(jax.nn.initializers.zeros), nnx.Rngs(0)
    >>> down = Dense(6, 2, kernel=snnk(8), rngs=rngs)
    >>> up = Dense(2, 6, kernel=zero, rngs=rngs)
    >>> x = jnp.ones((1, 6))
    >>> bool((x + up(down(x)) == x).all())
    True
  """
  counts = features if isinstance(features, tuple) else (features,)
  counts = [positive_int('features', count) for count in counts]
  if not counts:
    raise ValueError('`features` must hold at least one number, got ()')
  o = rf.checked(Features(kind, normalize, threshold, M))
  joints = range(len(counts) - 1)

  def one(key: jax.Array, count: int, W: jax.Array) -> Split:
    G = rf.gaussian(key, len(W), count, orthogonal)
    return Split({'readout': rf.of_weights(o, W, G)}, {'proj': G})

  def start(key: jax.Array, W: jax.Array, dtype: jax.typing.DTypeLike) -> Split:
    keys = jax.random.split(key, (2, len(counts)))
    hidden = [factors.dense_init(keys[1, i], (len(W), len(W))) for i in joints]
    layers = map(one, keys[0], counts, [*hidden, W.astype(jnp.float32)])
    join = functools.partial(bundle, kind=kind, normalize=normalize)
    return jax.tree.map(lambda x: x.astype(dtype), functools.reduce(join, layers))

  def init(key: jax.Array, shape: tuple, dtype: jax.typing.DTypeLike) -> Split:
    k1, k2 = jax.random.split(key)
    return start(k2, factors.dense_init(k1, shape), dtype)

  def from_dense(key: jax.Array, W: jax.Array) -> tuple[Split, jax.Array]:
    k1, k2 = jax.random.split(key)
    split, x = start(k1, W, W.dtype), jax.random.normal(k2, (_PROBES, len(W)))
    return split, factors.relative_error(x @ W.astype(x.dtype), apply(split, x))

  def apply(split: Split, x: jax.Array) -> jax.Array:
    length2 = rf.square(x) if o.need_length else None
    p = factors.down(x, split.fixed['proj'])
    phi = rf.of_inputs(o, p, length2, o.factor(x.shape[-1]))
    for i in joints:
      p = rf.times(phi, split.train[f'omega_{i}'], x.dtype)
      if o.need_length:
        length2 = rf.square(rf.times(phi, split.train[f'root_{i}'], x.dtype))
      phi = rf.of_inputs(o, p, length2)
    return rf.times(phi, split.train['readout'], x.dtype)

  names = ('omega', 'root') if o.need_length else ('omega',)
  inner = {f'{name}_{i}': (None, None) for name in names for i in joints}
  axes = {'proj': ('in', None), **inner, 'readout': (None, 'out')}
  return Parameterization(init, from_dense, apply, axes=axes)


def bundle(
  first: Split, second: Split, kind: Kind = 'relu', normalize: float | None = None
) -> Split:
  r"""Two consecutive SNNK layers as one, which computes the same function.

  Of :math:`y_1 = \Phi_1(x) R_1` the second layer's features see :math:`G_2 y_1` only, so
  one trained matrix :math:`\Omega = R_1 G_2^\top` (l1, l2) takes the place of R1 and the
  fixed G2, and the width between the layers disappears. Features that need the length of
  :math:`y_1` get it from a root of the Gram matrix, trained too:
  :math:`|y_1| = |\Phi_1(x) C|`, :math:`C C^\top = R_1 R_1^\top` (l1, l1).

  Args:
    first: arrays of `snnk(l1, ...)`, or of a chain.
    second: arrays of `snnk(l2, ...)` whose input the first one's output is.
    kind: of both layers.
    normalize: of both layers.

  Returns:
    Arrays of `snnk((l1, l2), ...)`.

  Raises:
    ValueError: if sizes do not fit, or `second` is a chain itself.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> k1, k2 = jax.random.split(jax.random.key(0))
    >>> one = snnk(8).init(k1, (4, 100), jnp.float32)
    >>> two = snnk(6).init(k2, (100, 3), jnp.float32)
    >>> both = bundle(one, two)
    >>> jax.tree.map(jnp.shape, both.train)
    {'omega_0': (8, 6), 'readout': (6, 3)}
  """
  R, G = first.train['readout'], second.fixed['proj']
  if R.shape[1] != len(G) or {*second.train} != {'readout'}:
    raise ValueError(
      f'`second` must be one layer of {R.shape[1]} inputs, as many as `first` has'
      f' outputs; got arrays {sorted(second.train)} for {len(G)} inputs'
    )
  o = rf.checked(Features(kind, normalize))
  scale = o.factor(len(G))
  i = sum(name.startswith('omega') for name in first.train)
  train = {**first.train, f'omega_{i}': scale * factors.product(R, G)}
  if o.need_length:
    # C' of R' = Q C', with rows of zeros where R has fewer columns than rows.
    C = jnp.linalg.qr(R.astype(jnp.float32).T)[1]
    C = jnp.pad(C, ((0, len(R) - len(C)), (0, 0)))
    train[f'root_{i}'] = (scale * C.T).astype(R.dtype)
  return Split({**train, 'readout': second.train['readout']}, first.fixed)


def solve_last_layer(
  kernel: Parameterization,
  split: Split,
  x: jax.Array,
  targets: jax.Array,
  ridge: float = 0.0,
) -> Split:
  r"""The readout of least squared error, :math:`(F^\top F + \rho I)^{-1} F^\top Y`.

  Args:
    kernel: `snnk(...)`, a chain too.
    split: its arrays.
    x: inputs (n, in).
    targets: Y (n, out).
    ridge: :math:`\rho`, at least 0.

  Returns:
    The arrays with another readout; where it is not unique, the smallest.

  Raises:
    ValueError: for a negative `ridge`.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> p, x = snnk(8), jax.random.normal(jax.random.key(1), (5, 4))
    >>> split = p.init(jax.random.key(0), (4, 3), jnp.float32)
    >>> split = solve_last_layer(p, split, x, jnp.ones((5, 3)))
    >>> bool(jnp.allclose(p.apply(split, x), 1, atol=1e-4))
    True
  """
  R, root = split.train['readout'], math.sqrt(finite('ridge', ridge))
  put = lambda readout: split._replace(train={**split.train, 'readout': readout})
  F = kernel.apply(put(jnp.eye(len(R), dtype=R.dtype)), x)
  # As one system, because F'F has the square of its condition number.
  F = jnp.concatenate([F, root * jnp.eye(len(R), dtype=F.dtype)])
  Y = jnp.concatenate([targets, jnp.zeros((len(R), R.shape[1]), targets.dtype)])
  return put(jnp.linalg.lstsq(F, Y)[0].astype(R.dtype))
