"""Parameterized kernels in a model's trees: events, export to dense, and back.

A plan says which kernels there are: `{'layers/attn/q': parameterization}`. Their trained
arrays are at `<path>/kernel` of the params (a bare array) or `<path>/kernel/<name>`, their
fixed ones at `<path>/fixed/<name>` of the other tree, as both flax shells keep them. Axes
before those that a parameterization describes are a stack of matrices.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lrjax.resets import Touched, reset_moments, restart_all, total
from lrjax.stacks import fold_in_path, stream
from lrjax.types import Event, Parameterization, PyTree, Split

Plan = Mapping[str, Parameterization]


class Weights(NamedTuple):
  """Weights in the course of training.

  Attributes:
    params: nested dicts, what `jax.grad` sees.
    fixed: nested dicts, what nobody differentiates.
    opt_state: of the optimizer; None where there is none yet.
  """

  params: PyTree
  fixed: PyTree
  opt_state: Any = None


def split_at(path: str, params: PyTree, fixed: PyTree) -> Split:
  """The arrays of the kernel at `path`.

  Raises:
    KeyError: if there is none.
  """
  train = _node(params, path)['kernel']
  try:
    return Split(train, _node(fixed, path)['fixed'])
  except (KeyError, TypeError):
    return Split(train, {})


def due_events(plan: Plan, k: int) -> frozenset[str]:
  """Names of the events of the plan that are due after k updates, not of each step's."""
  events = {e for p in plan.values() for e in p.events}
  return frozenset(e.name for e in events if e.due is not None and e.due(k))


def step_events(plan: Plan) -> frozenset[str]:
  """Names of the events of the plan that run at every k."""
  return frozenset(e.name for p in plan.values() for e in p.events if e.due is None)


def run_events(
  plan: Plan,
  names: Collection[str],
  weights: Weights,
  k: int | jax.Array,
  *,
  tx: optax.GradientTransformation | None = None,
  seed: int = 0,
) -> tuple[Weights, dict[str, Touched]]:
  """Runs events of every kernel that has them; a pure function, to be jitted.

  All shapes stay. What an event draws depends on `seed`, its name, the kernel's path and
  k alone, so that a run that is resumed draws the same.

  Args:
    plan: path -> parameterization.
    names: of events, see `due_events` and `step_events`; static under jit.
    weights: their trees, `opt_state` that of `tx`.
    k: updates completed.
    tx: the optimizer, for what its moments are at the start; needed with an opt_state.
    seed: of what events draw.

  Returns:
    The changed `Weights`, and by name of event which moments it touched.

  Raises:
    ValueError: for a name that no kernel has an event of, or an optimizer whose moments
      cannot be changed in part.

  Examples:
    >>> import lrjax
    >>> p = lrjax.factorized(2, restart_every=10)
    >>> train = p.init(jax.random.key(0), (4, 3), jnp.float32).train
    >>> params, plan = {'q': {'kernel': train}}, {'q': p}
    >>> tx = optax.adam(0.1)
    >>> weights = Weights(params, {}, tx.init(params))
    >>> weights, touched = run_events(plan, due_events(plan, 10), weights, 10, tx=tx)
    >>> touched['restart']
    Touched(entries=Array(28., dtype=float32), zeros=Array(28., dtype=float32))
  """
  known = {e.name for p in plan.values() for e in p.events}
  if unknown := {*names} - known:
    listed = ', '.join(sorted(known)) or 'none'
    raise ValueError(f'no kernel has an event {sorted(unknown)}; events: {listed}')
  k, report = jnp.asarray(k, jnp.int32), {}
  for name in sorted(names):
    weights, report[name] = _run_event(plan, name, weights, k, tx, seed)
  return weights, report


def export(plan: Plan, params: PyTree, fixed: PyTree) -> PyTree:
  """The params of the same model with dense kernels.

  Args:
    plan: path -> parameterization.
    params: trained arrays.
    fixed: fixed arrays.

  Returns:
    A tree of params in which each kernel of the plan is one array (..., in, out).

  Raises:
    ValueError: for a kernel that is not linear in its input, naming it.

  Examples:
    >>> import lrjax
    >>> p = lrjax.factorized(2)
    >>> params = {'q': {'kernel': p.init(jax.random.key(0), (4, 3), jnp.float32).train}}
    >>> export({'q': p}, params, {})['q']['kernel'].shape
    (4, 3)
  """
  for path, p in plan.items():
    if p.materialize is None:
      raise ValueError(
        f'{path}: its kernel is not linear in its input, so no matrix stands for it; keep'
        ' its factors (save params and fixed), or make it without its nonlinearity'
      )
    split = split_at(path, params, fixed)
    dense = _over_stack(p.materialize, _stack(path, p, split))(split)
    params = put_at(params, f'{path}/kernel', dense)
  return params


def convert(
  plan: Plan, params: PyTree, key: jax.Array, fixed: PyTree | None = None
) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
  """Turns dense kernels into what a plan says, the inverse of `export`.

  Args:
    plan: path -> parameterization.
    params: a tree with a dense kernel at each path of the plan.
    key: for what `from_dense` draws.
    fixed: fixed arrays of other kernels.

  Returns:
    `(params, fixed, errors)`, the error relative to each kernel's Frobenius norm, one a
    matrix of its stack.

  Raises:
    KeyError: for a path without a dense kernel.

  Examples:
    >>> import lrjax
    >>> params = {'q': {'kernel': jnp.eye(4)}}
    >>> params, fixed, errors = convert(
    ...   {'q': lrjax.factorized(2)}, params, jax.random.key(0)
    ... )
    >>> params['q']['kernel']['a'].shape, round(float(errors['q']), 3)
    ((4, 2), 0.707)
  """
  fixed, errors = fixed or {}, {}
  for path, p in plan.items():
    W = _node(params, path).get('kernel')
    if not hasattr(W, 'shape'):
      raise KeyError(f'{path}: there is no dense kernel to convert')
    stack = W.shape[:-2]
    keys = _keys(fold_in_path(key, path), stack)
    split, errors[path] = _over_stack(p.from_dense, stack)(keys, W)
    params = put_at(params, f'{path}/kernel', split.train)
    if split.fixed:
      fixed = put_at(fixed, f'{path}/fixed', dict(split.fixed))
  return params, fixed, errors


def _run_event(plan, name, weights, k, tx, seed):
  """One event of all kernels that have it."""
  params, fixed, state = weights
  masks, found = {}, []
  for path, p in plan.items():
    for event in (e for e in p.events if e.name == name):
      split = split_at(path, params, fixed)
      stack = _stack(path, p, split)
      key = jax.random.fold_in(stream(seed, f'{name}/{path}'), k)
      new, touched = _on_stack(event, stack, _keys(key, stack), split, k)
      params = put_at(params, f'{path}/kernel', new.train)
      if new.fixed:
        fixed = put_at(fixed, f'{path}/fixed', dict(new.fixed))
      for leaf, mask in touched.items():
        masks['/'.join(filter(None, (path, 'kernel', leaf)))] = mask
      found.append(event)
  if state is None:
    return Weights(params, fixed), total([])
  if tx is None:
    raise ValueError('`tx` is needed to change the moments of its state')
  state, report = _change_moments(found[0], state, tx, params, masks, k, seed)
  return Weights(params, fixed, state), report


def _on_stack(event, stack, keys, split, k):
  """The event over a stack; a mask that is True stays so, whatever moments look like."""
  whole = {}

  def one(key: jax.Array, split: Split) -> tuple[Split, dict, dict]:
    new, touched = event.weights(key, split, k)
    whole.update({leaf: True for leaf, mask in touched.items() if mask is True})
    masks = {leaf: mask for leaf, mask in touched.items() if mask is not True}
    # One flag for a whole leaf is one for the whole stack.
    flags = {leaf: masks.pop(leaf) for leaf in [*masks] if masks[leaf].ndim == 0}
    return new, masks, flags

  new, masks, flags = _over_stack(one, stack, (0, 0, None))(keys, split)
  return new, whole | masks | flags


def _change_moments(event: Event, state, tx, params, masks, k, seed):
  start = tx.init(params)
  if event.everything:
    return restart_all(state, start)
  if not event.moments:
    return reset_moments(state, start, masks)
  key = lambda path: jax.random.fold_in(stream(seed, f'{event.name}/{path}'), k)
  change = lambda path, x, start: event.moments(key(path), x, start)
  return reset_moments(state, start, masks, change)


def _stack(path: str, p: Parameterization, split: Split) -> tuple[int, ...]:
  """Sizes of the axes before those that the parameterization describes."""
  stacks = set()
  for name, x in named_arrays(split).items():
    if name not in p.axes:
      raise ValueError(f'{path}: the plan says nothing of {name!r}, only {[*p.axes]}')
    stacks.add(x.shape[: x.ndim - len(p.axes[name])])
  if len(stacks) != 1:
    raise ValueError(f'{path}: its arrays do not fit the plan: stacks {stacks}')
  return stacks.pop()


def named_arrays(split: Split) -> dict[str, jax.Array]:
  """All arrays of a kernel by name, '' for a bare one."""
  train = split.train if isinstance(split.train, Mapping) else {'': split.train}
  return {**train, **split.fixed}


def _over_stack(f: Callable, stack: tuple[int, ...], out_axes: Any = 0) -> Callable:
  for _ in stack:
    f = jax.vmap(f, out_axes=out_axes)
  return f


def _keys(key: jax.Array, stack: tuple[int, ...]) -> jax.Array:
  return jax.random.split(key, stack) if stack else key


def _node(tree: PyTree, path: str) -> Any:
  for part in path.split('/') if path else ():
    tree = tree[_key(tree, part)]
  return tree


def put_at(tree: PyTree, path: str, value: Any) -> PyTree:
  """The tree with another value at a path; dicts on the way are copied."""
  part, _, rest = path.lstrip('/').partition('/')
  key = _key(tree, part)
  inner = put_at(tree.get(key, {}), rest, value) if rest else value
  return {**tree, key: inner}


def _key(tree: Mapping, part: str) -> Any:
  """Layers of a list have integers for keys."""
  return int(part) if part.isdigit() and part not in tree else part
