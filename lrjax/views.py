"""Which leaves of a tree are matrices, and how each is seen as (d, k)."""

import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lrjax.checks import closest, positive_int
from lrjax.checks import pattern as compiled
from lrjax.types import View

_DEFAULT = View()
SIDES = ('short', 'short_out', 'long', 'in', 'out')
_PLAIN = re.compile(
  r'(^|.*/)([^/]*embed[^/]*|wte|wpe|[^/]*lm_head|head|logits|[^/]*norm[^/]*|ln(_?\w)?'
  r'|bias|scale)(/.*|$)',
  re.IGNORECASE,
)

# Arrays of diagonal state spaces: one vector for each feature.
_S4D = {
  'log_dt',
  'log_a_real',
  'a_imag',
  'b_real',
  'b_imag',
  'c_real',
  'c_imag',
  'skip',
}
# Arrays of parameterized kernels that are vectors, whatever stack they come in.
VECTORS = frozenset({'values', 'sigma', 'beta', 'theta'} | _S4D)

Rules = Sequence[tuple[str, Any]]
Where = str | Callable[[str, Any], bool]


class LeafPlan(NamedTuple):
  """How one leaf is treated.

  Attributes:
    path: the leaf's path, parts joined by '/'.
    shape: the leaf's shape.
    axes: (stack axes, in axes, out axes) of the matrix view; None if not projected.
    side: 'in' or 'out', the compressed side; None if not projected.
    rank: the rank; None if not projected or without a rank.
    reason: why the leaf is not projected; '' if it is.
  """

  path: str
  shape: tuple[int, ...]
  axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None
  side: str | None = None
  rank: int | None = None
  reason: str = ''

  @property
  def stack(self) -> tuple[int, ...]:
    """Sizes of the stack axes."""
    assert self.axes is not None
    return tuple(self.shape[a] for a in self.axes[0])

  @property
  def matrix(self) -> tuple[int, int]:
    """(d, k): the compressed side and the other one."""
    return self.fans if self.side == 'in' else self.fans[::-1]

  @property
  def fans(self) -> tuple[int, int]:
    """(fan_in, fan_out) of each matrix."""
    assert self.axes is not None
    _, ins, outs = self.axes
    size = lambda axes: math.prod(self.shape[a] for a in axes)
    return size(ins), size(outs)

  @property
  def in_order(self) -> bool:
    """Whether the leaf lies as (*stack, in, out), an axis each."""
    n = len(self.shape)
    return self.axes == (tuple(range(n - 2)), (n - 2,), (n - 1,))

  @property
  def one(self) -> 'LeafPlan':
    """The plan of one matrix of the stack, its axes in the leaf's order."""
    assert self.axes is not None
    stack, ins, outs = self.axes
    kept = [a for a in range(len(self.shape)) if a not in stack]
    place = lambda axes: tuple(kept.index(a) for a in axes)
    shape = tuple(self.shape[a] for a in kept)
    return self._replace(shape=shape, axes=((), place(ins), place(outs)))


def leaf_path(path: Sequence[Any]) -> str:
  """A key path as 'layers/attn/q/kernel'; the trailing 'value' of nnx is dropped."""
  text = jax.tree_util.keystr(tuple(path), simple=True, separator='/')
  return text.removesuffix('/value')


def hidden_kernels(path: str, leaf: Any) -> bool:
  """The default choice of leaves: matrices that are not embeddings, heads or norms.

  A leaf is refused if a part of its path holds `embed` or `norm` or is `wte`, `wpe`,
  `lm_head`, `head`, `logits`, `ln`, `bias` or `scale`, and if its last part names a
  vector of a parameterized kernel (`values`, `sigma`, `beta` or `theta`) or of S4D.

  Args:
    path: the leaf's path, parts joined by '/'.
    leaf: the leaf, or anything with a shape.

  Returns:
    Whether the leaf is to be projected.

  >>> import jax.numpy as jnp
  >>> hidden_kernels('layers/attn/q/kernel', jnp.zeros((2, 8, 8)))
  True
  >>> hidden_kernels('lm_head/kernel', jnp.zeros((8, 8)))
  False
  """
  is_vector = path.rpartition('/')[2] in VECTORS
  return len(leaf.shape) >= 2 and not is_vector and not _PLAIN.match(path)


def by_rule(rules: Rules, path: str, default: Any = None) -> Any:
  """The value of the first rule whose pattern is found in `path`."""
  return next((v for pattern, v in rules if re.search(pattern, path)), default)


def planner(
  rank: Any, side: str, where: Where | None, weight_dimension_numbers: Any
) -> Callable[[Any], list[tuple[LeafPlan, jax.Array]]]:
  """Checks the arguments of `on_matrices` and returns `tree -> [(plan, leaf)]`."""
  if side not in SIDES:
    raise ValueError(f'unknown `side` {side!r}; {closest(str(side), SIDES)}')
  check_rank(rank)
  choose = chooser(where)
  views = _views(weight_dimension_numbers)

  def plan_tree(tree: Any) -> list[tuple[LeafPlan, jax.Array]]:
    leaves = [(leaf_path(p), x) for p, x in jax.tree.leaves_with_path(tree)]
    paths = [p for p, _ in leaves]
    if len(set(paths)) < len(paths):
      twice = sorted({p for p in paths if paths.count(p) > 1})
      raise ValueError(f'two leaves share a path: {twice[:3]}; rename one of them')
    view_of = views(tree)
    plans = [(plan_leaf(p, x, view_of, choose, rank, side), x) for p, x in leaves]
    _warn_unmatched('rank', rank, paths)
    _warn_unmatched('weight_dimension_numbers', weight_dimension_numbers, paths)
    return plans

  return plan_tree


def plan_leaf(
  path: str, x: Any, view_of: Callable, choose: Callable, rank: Any, side: str
) -> LeafPlan:
  """Decides whether and how one leaf is projected."""
  check_leaf(path, x)
  shape = tuple(x.shape)
  if not choose(path, x):
    return LeafPlan(path, shape, reason='not chosen')
  view = view_of(path)
  if view is None or len(shape) < 2:
    return LeafPlan(path, shape, reason='not a matrix')
  if view is _DEFAULT and len(shape) == 3 and shape[0] > max(shape[1:]):
    # A stack of very many tiny matrices: a DenseGeneral (D, H, Dh), not scanned layers.
    warnings.warn(
      f'{path} {shape} looks like one matrix with several output axes; it goes to the'
      f' plain optimizer unless weight_dimension_numbers tells its axes, such as'
      f' [({path!r}, lrjax.View(0, (1, 2)))]',
      stacklevel=2,
    )
    return LeafPlan(path, shape, reason='axes not told')
  axes = split_axes(path, shape, view)
  sizes = [math.prod(shape[a] for a in axes[i]) for i in (1, 2)]
  side = {
    'short': 'in' if sizes[0] <= sizes[1] else 'out',
    'short_out': 'in' if sizes[0] < sizes[1] else 'out',
    'long': 'in' if sizes[0] >= sizes[1] else 'out',
  }.get(side, side)
  most = (sizes[0] if side == 'in' else sizes[1]) if callable(rank) else min(sizes)
  r = rank_of(rank, path, most)
  if r is None and rank is not None:
    return LeafPlan(path, shape, reason='no rank rule')
  if r is not None and most <= r:
    if most < r:
      warnings.warn(
        f'{path} {shape}: rank {r} exceeds its short side {most}, so it goes to'
        f' the plain optimizer at no loss',
        stacklevel=2,
      )
    return LeafPlan(path, shape, reason=f'not larger than rank {r}')
  return LeafPlan(path, shape, axes, side, r)


def check_leaf(path: str, x: Any) -> None:
  """Refuses leaves no optimizer can train."""
  if not hasattr(x, 'shape') or not hasattr(x, 'dtype'):
    raise TypeError(f'leaf {path!r} must be an array, got {x!r}')
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(
      f'leaf {path!r} has dtype {x.dtype}; real floating point is needed (exclude it'
      f' with optax.masked or optax.partition)'
    )
  if 0 in x.shape:
    raise ValueError(f'leaf {path!r} of shape {tuple(x.shape)} holds no elements')


def split_axes(path: str, shape: tuple[int, ...], view: Any) -> tuple:
  """(stack, in, out) axes of a view, non-negative, checked against the shape."""
  if not _is_view(view):
    raise TypeError(f'leaf {path!r}: a View or None is needed, got {view!r}')
  tuples = []
  for name in ('reduction_axis', 'output_axis'):
    axes = getattr(view, name)
    axes = tuple(axes) if isinstance(axes, Sequence) else (axes,)
    if not all(hasattr(a, '__index__') for a in axes):
      raise TypeError(f'leaf {path!r}: {name} must hold ints, got {axes!r}')
    if not axes or any(not -len(shape) <= a < len(shape) for a in axes):
      raise ValueError(
        f'leaf {path!r} of shape {shape}: {name} {getattr(view, name)!r} names axes it'
        f' does not have; allowed: {-len(shape)} to {len(shape) - 1}'
      )
    tuples.append(tuple(a % len(shape) for a in axes))
  ins, outs = tuples
  if len({*ins, *outs}) < len(ins) + len(outs):
    raise ValueError(f'leaf {path!r} of shape {shape}: {view} uses an axis twice')
  stack = tuple(a for a in range(len(shape)) if a not in ins and a not in outs)
  return stack, ins, outs


def check_rank(rank: Any) -> None:
  """Accepts None, an int, a fraction in (0, 1), `d -> int`, rules `[(pattern, rank)]`."""
  if callable(rank):
    return
  if isinstance(rank, (list, tuple)):
    if not _is_rules(rank):
      raise TypeError(f'`rank` rules must be pairs (pattern, rank), got {rank!r}')
    for pattern, value in rank:
      compiled('rank', pattern)
      check_rank(value)
  elif isinstance(rank, float) and not rank.is_integer():
    if not 0.0 < rank < 1.0:
      raise ValueError(f'a fractional `rank` must lie between 0 and 1, got {rank}')
  elif rank is not None:
    positive_int('rank', rank)


def rank_of(rank: Any, path: str, most: int) -> int | None:
  """The rank of a matrix that can have `most`."""
  if callable(rank):
    return rank(most)
  if isinstance(rank, (list, tuple)):
    return rank_of(by_rule(rank, path), path, most)
  if isinstance(rank, float):
    return max(1, round(rank * most))
  return rank


def to_matrix(x: jax.Array, plan: LeafPlan) -> jax.Array:
  """A leaf as (*stack, d, k)."""
  assert plan.axes is not None
  stack, ins, outs = plan.axes
  first, second = (ins, outs) if plan.side == 'in' else (outs, ins)
  x = jnp.transpose(x, (*stack, *first, *second))
  return x.reshape(*plan.stack, *plan.matrix)


def from_matrix(x: jax.Array, plan: LeafPlan) -> jax.Array:
  """The inverse of `to_matrix`."""
  assert plan.axes is not None
  stack, ins, outs = plan.axes
  first, second = (ins, outs) if plan.side == 'in' else (outs, ins)
  order = (*stack, *first, *second)
  x = x.reshape([plan.shape[a] for a in order])
  return jnp.transpose(x, sorted(range(len(order)), key=order.__getitem__))


def chooser(where: Where | None) -> Callable[[str, Any], bool]:
  """`(path, leaf) -> bool` of the three forms of `where`."""
  if where is None:
    return hidden_kernels
  if isinstance(where, str):
    pattern = compiled('where', where)
    return lambda path, leaf: len(leaf.shape) >= 2 and bool(pattern.search(path))
  if not callable(where):
    raise TypeError(f'`where` must be a pattern or (path, leaf) -> bool, got {where!r}')
  return where


def _is_view(x: Any) -> bool:
  return hasattr(x, 'reduction_axis') and hasattr(x, 'output_axis')


def _is_rules(x: Any) -> bool:
  return isinstance(x, (list, tuple)) and all(
    isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str)
    for rule in x
  )


def _views(spec: Any) -> Callable[[Any], Callable[[str], Any]]:
  """`tree -> path -> View` for the five forms of `weight_dimension_numbers`."""
  if spec is None or _is_view(spec):
    return lambda tree: lambda path: spec or _DEFAULT
  if _is_rules(spec):
    return lambda tree: lambda path: by_rule(spec, path, _DEFAULT)

  def from_tree(tree: Any) -> Callable[[str], Any]:
    # Kept by path, so that it still fits a tree of which optax masked a part.
    views = spec(tree) if callable(spec) else spec
    leaf = lambda x: x is None or _is_view(x) or isinstance(x, optax.MaskedNode)
    table = {leaf_path(p): v for p, v in jax.tree.leaves_with_path(views, is_leaf=leaf)}

    def view_of(path: str) -> Any:
      if path not in table:
        raise ValueError(
          f'`weight_dimension_numbers` has no entry for leaf {path!r}; it has'
          f' {", ".join(table)}. Give None to leaves that are not to be projected'
        )
      return table[path]

    return view_of

  return from_tree


def _warn_unmatched(name: str, rules: Any, paths: list[str]) -> None:
  """Warns of rules that match no leaf; a tree without leaves is only a placeholder."""
  if not paths or _is_view(rules) or not _is_rules(rules):
    return
  for pattern, _ in rules:
    if not any(re.search(pattern, p) for p in paths):
      warnings.warn(
        f'the `{name}` rule {pattern!r} matches no leaf; leaves: {", ".join(paths)}',
        stacklevel=3,
      )
