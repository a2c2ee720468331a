"""The values that the parts of lrjax exchange; no behaviour.

Letters: a matrix is (d, k) once its compressed axis comes first, r is the rank, so
low-rank quantities are (r, k). Flax kernels are (in, out).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

PyTree = Any


class View(NamedTuple):
  """Which axes of a leaf form the matrix; all other axes are a stack of matrices.

  The default fits Dense `(in, out)`, scanned `(L, in, out)` and expert kernels
  `(L, E, in, out)`. DenseGeneral `(D, H, Dh)` is `View(0, (1, 2))`, a convolution
  `(h, w, i, o)` is `View((0, 1, 2), 3)`. The field names are those of
  `optax.contrib.GaLoreDimensionNumbers`, which is accepted wherever a View is.
  """

  reduction_axis: int | Sequence[int] = -2
  output_axis: int | Sequence[int] = -1


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['low'],
  meta_fields=['shape', 'dtype', 'side'],
)
@dataclasses.dataclass(frozen=True)
class Projected:
  """What a low-rank method needs of a gradient, in the place of the gradient.

  A tree of gradients may hold it at the leaves that `on_matrices` projects; see
  `lrjax.projected_value_and_grad`, which makes such trees.

  Attributes:
    low: :math:`P^\\top G` (*stack, r, k) for the basis P in the optimizer's state.
    shape: of the gradient.
    dtype: of the gradient.
    side: 'in' or 'out', the side of the leaf that P compresses.
  """

  low: Any
  shape: tuple[int, ...]
  dtype: Any
  side: str


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['low', 'decay'],
  meta_fields=['shape', 'dtype'],
)
@dataclasses.dataclass(frozen=True)
class Lifted:
  """An update :math:`P U + c W` of weights W that is not formed, in the place of one.

  P is in the optimizer's state. Both arrays may be multiplied by a number, which multiplies
  the update; see `lrjax.in_place`, which asks for such updates and applies them.

  Attributes:
    low: U (*stack, r, k).
    decay: c, a scalar.
    shape: of the update.
    dtype: of the update.
  """

  low: Any
  decay: Any
  shape: tuple[int, ...]
  dtype: Any


class MatrixTransform(NamedTuple):
  """A gradient method for ONE matrix; `on_matrices` lifts it to any tree.

  Attributes:
    init: `(g) -> state`; `g` (d, k) may be abstract, only shape and dtype are used.
    update: `(g, state) -> (update (d, k), state)`, run at every step.
    due: `(state, step, phase) -> bool[]`, whether `refresh` should run now; None:
      never. `step` is int32 and 0 at the first update; `phase` in [0, 1) spreads the
      matrices of a tree evenly over a period.
    refresh: `(key, g, state) -> (state, bool[])`, the rare and costly part, run
      before `update` when due; the bool says whether it succeeded.
    batched: True when all matrices are due together, so that a stack of them is
      refreshed by one batched factorisation; False loops over those that are due.
    subspace: `(state, d) -> P (d, r)`, where updates come from, for diagnostics; None
      where there is no single P.
    holds: whether `update` takes `ok`, bool[], as a third argument and leaves the state
      as it is where that is false. Of the others both states are computed and one chosen.
    steps: what `update` consists of, where it is made of :math:`P^\\top g` and forms
      nothing of the size of g but its result; None where it does more.
    sketch: what `refresh` consists of, where it needs products with g alone: a `Sketch`
      whose b is the state, and whose `finish` is `(product, state, d, k) -> (state,
      bool[])`.
  """

  init: Callable
  update: Callable
  due: Callable | None = None
  refresh: Callable | None = None
  batched: bool = True
  subspace: Callable | None = None
  holds: bool = False
  steps: 'Steps | None' = None
  sketch: 'Sketch | None' = None


class Parts(NamedTuple):
  """An update :math:`P x + c f` that is not formed, f the gradient g or sign(g - P y).

  Attributes:
    x: (r, k); None: 0.
    c: (1, k), or (1, 1) for all columns; None where there is no f.
    y: (r, k), where f is a sign; else None.
  """

  x: Any
  c: Any = None
  y: Any = None


class Steps(NamedTuple):
  """The three steps of an update.

  Attributes:
    down: `(g (d, k), state) -> low (r, k)`, :math:`P^\\top g`.
    move: `(low, total, state, ok) -> (Parts, state)`; where `ok`, bool[], is false the
      parts are zero and the state as it was. `total` is c -> the sum of squares of c g, c
      (1, k) or (1, 1).
    up: `(x (r, k), state, d) -> P x (d, k)`.
    thin: whether the update is :math:`P x` alone, and nothing of g but low is needed;
      `total` is None then.
  """

  down: Callable
  move: Callable
  up: Callable
  thin: bool


class Sketch(NamedTuple):
  """A fit that asks nothing of g (d, k) but products with thin matrices.

  Attributes:
    start: `(key, b, d, k) -> x`, the first of them.
    products: what is multiplied, in turn: 'down' :math:`g^\\top x` (k, l), x (d, l), or
      'up' :math:`g x` (d, l), x (k, l).
    between: `product -> x` of the next one.
    finish: `(product, b) -> b`, from the last one; not finite where it failed.
  """

  start: Callable
  products: tuple[str, ...]
  between: Callable
  finish: Callable


class Change(NamedTuple):
  """A change of basis: products with :math:`C = P_{new}^\\top P_{old}` (r, r).

  Attributes:
    rotate: `x (r, k) -> C x`.
    square: `x (r, k) -> (C * C) x`.
    start: `() -> inner state` as it was before the first update; set by the loop.
  """

  rotate: Callable
  square: Callable
  start: Callable | None = None


class Basis(NamedTuple):
  """How a subspace is found and stored.

  Attributes:
    init: `(d, k, dtype) -> b`, an orthonormal start; `dtype` is that of the arithmetic.
    fit: `(key, g (d, k), b) -> b`; may start from the previous `b`. A failed
      factorisation is told by a non-finite `b`, which the loop then refuses.
    down: `(b, g (d, k)) -> (r, k)`.
    up: `(b, low (r, k), d) -> (d, k)`.
    matrix: `(b, d) -> P (d, r)`, for transports, policies that measure overlap, and
      diagnostics; None where there is no single P.
    change: `(b_old, b_new, d) -> Change`; None: products with the two P.
    orthonormal: whether `up(down(g))` is a projection, up to rounding.
    per_column: whether column j of `down(g)` comes from column j of g alone.
    sketch: what `fit` consists of, where it needs products with g alone.
  """

  init: Callable
  fit: Callable
  down: Callable
  up: Callable
  matrix: Callable | None = None
  change: Callable | None = None
  orthonormal: bool = True
  per_column: bool = True
  sketch: Sketch | None = None


class Refresh(NamedTuple):
  """When a subspace is found again.

  Attributes:
    init: `() -> s`.
    due: `(s, step, phase) -> bool[]`, see `MatrixTransform.due`.
    after: `(s, P_old (d, r), P_new (d, r)) -> s`; both are None where the basis has no
      single P, and a policy that needs one raises ValueError.
    batched: whether all matrices of a tree are due together.
  """

  init: Callable
  due: Callable
  after: Callable
  batched: bool


class Residual(NamedTuple):
  """What becomes of the part the subspace misses, and how the update is formed.

  Attributes:
    init: `(g (d, k)) -> s`.
    before: `(g, s) -> g`, ahead of the projection.
    after: `(g, low (r, k), u (r, k), up, s) -> (update (d, k), s)`.
    projects: whether it relies on `up(down(g))` being a projection.
    per_column: whether it compares columns of g with those of `down(g)`.
    scale: where the update is `up(scale * u)` and nothing else is kept or read; None
      where more is.
    parts: `(total, low, u, s) -> (Parts, s)`, for `after` where the basis is orthonormal,
      see `Steps` for `total`; None where the update has no such parts.
    any_basis: whether `parts` holds for other bases too.
  """

  init: Callable
  before: Callable
  after: Callable
  projects: bool = False
  per_column: bool = False
  scale: Any = None
  parts: Callable | None = None
  any_basis: bool = False


class Codec(NamedTuple):
  """How an array is stored: `decode(encode(x))` approximates `x` in float32."""

  encode: Callable
  decode: Callable


class Split(NamedTuple):
  """The arrays of one kernel.

  Attributes:
    train: an array or a dict of arrays: what `jax.grad` and the optimizer see.
    fixed: a dict of arrays nobody differentiates (indices, frozen or random bases).
  """

  train: PyTree
  fixed: Mapping[str, jax.Array] = {}


class Event(NamedTuple):
  """A change of the weights themselves, between two updates.

  k is the number of updates completed. An event of k runs on the weights that have k
  updates behind them, before the next one is computed; `lrjax.run_events` runs it on a
  whole model.

  Attributes:
    name: by which it is asked for, logged and counted.
    weights: `(key, Split, k int32[]) -> (Split, touched)`, for ONE matrix; shapes and
      dtypes stay. `touched` maps names of `Split.train` ('' for a bare array) to True,
      or to a bool array that broadcasts against the leaf: whose moments are changed. A
      scalar one follows from k alone and is the same for all matrices of a stack.
    due: `k -> bool` on a Python int; None: at every k, inside the compiled step.
    moments: `(key, moment, start) -> moment`, what moments of touched entries become;
      `start` is their value in a new optimizer. None: `start`.
    everything: whether moments and step counts of ALL parameters start anew, as if the
      optimizer were built again; schedules keep counting.
    preserves: whether the function that the kernel computes stays as it was.
  """

  name: str
  weights: Callable
  due: Callable[[int], bool] | None = None
  moments: Callable | None = None
  everything: bool = False
  preserves: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Parameterization:
  """A weight as a value; all functions are for ONE matrix.

  Attributes:
    init: `(key, shape (in, out), dtype) -> Split`.
    from_dense: `(key, W (in, out)) -> (Split, error)`, exact or the best the method
      allows; `error` is the Frobenius norm of what is lost, relative to that of W.
    apply: `(Split, x (..., in)) -> (..., out)`; forms W only where it must.
    materialize: `(Split) -> W (in, out)`; None where the map is not linear in x.
    axes: name of each array, trained or fixed ('' for a bare one) -> one of 'in', 'out',
      None per axis. Sharding reads it; None marks axes that stay whole, ranks for
      example. What comes before these axes in a model's tree is a stack of matrices.
    events: that change it in the course of training.
  """

  init: Callable
  from_dense: Callable
  apply: Callable
  materialize: Callable | None = None
  axes: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
  events: tuple[Event, ...] = ()
