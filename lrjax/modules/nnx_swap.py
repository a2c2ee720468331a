"""Parameterized kernels in an NNX model that somebody else wrote."""

import collections
import inspect
from collections.abc import Collection
from typing import Any, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from lrjax import weights
from lrjax.modules.nnx import Dense, kernels, split
from lrjax.modules.rules import Rules, check_rules, choose
from lrjax.parameterizations.dense import dense
from lrjax.resets import Touched
from lrjax.stacks import fold_in_path
from lrjax.types import Parameterization, PyTree, Split

M = TypeVar('M', bound=nnx.Module)
Layer = nnx.Linear | Dense


class Replacement(Dense):
  """A Dense in the place of another layer, whose bias, dtype and precision it keeps."""

  def __init__(self, layer: Layer, kernel: Parameterization, arrays: Split):
    self.in_features, self.out_features = layer.in_features, layer.out_features
    self.dtype, self.precision = layer.dtype, layer.precision
    self.hold(kernel, arrays)
    self.bias = layer.bias
    if isinstance(layer, nnx.Linear):
      self._name_axes(layer.kernel.get_metadata().get('out_sharding'))

  def _name_axes(self, names: tuple | None) -> None:
    """Gives each array the names of the axes it shares with the matrix (..., in, out)."""
    if names is None:
      return
    of = dict(zip(('in', 'out'), names[-2:]))
    trained = self.kernel if isinstance(self.kernel, nnx.Dict) else {'': self.kernel}
    for name, variable in {**trained, **self.fixed}.items():
      own = tuple(of.get(axis) for axis in self.parameterization.axes[name])
      variable.set_metadata(out_sharding=(*names[:-2], *own))


def swap(
  model: M, rules: Rules, *, rngs: nnx.Rngs, keep_weights: bool = True
) -> tuple[M, dict[str, jax.Array]]:
  """A copy of a model with other kernels in its `nnx.Linear` and `Dense` layers.

  Biases, dtypes, precision, names of axes and the paths of all other parameters stay. A
  stack of layers, as `nnx.vmap` makes it, becomes a stack of kernels. Subclasses of
  `nnx.Linear` and layers of more than two axes are left alone. A layer found in two places
  stays one and has the path that is alphabetically first. The model itself does not
  change.

  Args:
    model: any NNX module.
    rules: pairs of a pattern, searched in a layer's path such as `layers/mlp/up`, and a
      parameterization; the first that matches decides, None leaves the layer.
    rngs: its `params` stream draws what is drawn.
    keep_weights: take over the layers' matrices, as far as the method can; False: draw
      new kernels.

  Returns:
    The new model, whose plan is `kernels(model)`, and by path what was lost of each kept
    matrix, relative to its norm.

  Raises:
    TypeError: for rules that are not such pairs.
    ValueError: for a rule that decides no layer, a layer with a `dot_general` or dtypes
      of its own, a kernel that several layers share, or one that does not fit.

  Examples:
    >>> import jax.numpy as jnp, lrjax
    >>> model = nnx.Sequential(nnx.Linear(8, 6, rngs=nnx.Rngs(0)), nnx.relu)
    >>> low, lost = swap(model, [('layers/0', lrjax.factorized(6))], rngs=nnx.Rngs(1))
    >>> bool(jnp.allclose(low(jnp.ones(8)), model(jnp.ones(8)), atol=1e-5))
    True
    >>> [*lost], [*kernels(low)]
    (['layers/0'], ['layers/0'])
  """
  rules = check_rules(rules)
  layers = {_name(path): m for path, m in nnx.iter_modules(model) if _swappable(m)}
  plan = choose(rules, layers)
  _refuse_shared(model, {path: layers[path] for path in plan})
  key, errors = rngs.params(), {}
  params = _dense_params(model, plan) if keep_weights else {}

  def replace(path: tuple, node: Any) -> Any:
    name = _name(path)
    if name not in plan or not _swappable(node):
      return node
    p = plan[name]
    _refuse_custom(name, node)
    try:
      if not keep_weights:
        return Replacement(node, p, _drawn(node, p, fold_in_path(key, name)))
      trained, fixed, lost = weights.convert({name: p}, params, key)
    except ValueError as error:
      error.add_note(f'in the layer {name}')
      raise
    errors.update(lost)
    return Replacement(node, p, weights.split_at(name, trained, fixed))

  # Cloned, because otherwise both models would hold the same variables.
  return nnx.recursive_map(replace, nnx.clone(model)), errors


def run_events(
  model: nnx.Module,
  optimizer: nnx.Optimizer,
  names: Collection[str],
  k: int | jax.Array,
  *,
  seed: int = 0,
) -> dict[str, Touched]:
  """`lrjax.run_events` in place, on a model and its `nnx.Optimizer`.

  Args:
    model: with parameterized kernels.
    optimizer: made with `wrt=nnx.Param`.
    names: of events, see `lrjax.due_events`; static under `nnx.jit`.
    k: updates completed.
    seed: of what events draw.

  Returns:
    By name of event which moments it touched.

  Examples:
    >>> import lrjax, optax
    >>> kernel = lrjax.factorized(2, restart_every=10)
    >>> model = Dense(8, 6, kernel=kernel, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    >>> due = lrjax.due_events(kernels(model), 10)
    >>> int(run_events(model, optimizer, due, 10)['restart'].entries)
    56
  """
  _, params, rest = split(model)
  state = nnx.as_pure(optimizer.opt_state)
  before = weights.Weights(params, rest, _plain(state))
  after, touched = weights.run_events(
    kernels(model), names, before, k, tx=optimizer.tx, seed=seed
  )
  nnx.update(model, after.params, after.fixed)
  leaves = jax.tree.leaves(after.opt_state)
  state = jax.tree.unflatten(jax.tree.structure(state), leaves)
  nnx.update(optimizer.opt_state, nnx.state(state))
  return touched


def _swappable(node: Any) -> TypeGuard[Layer]:
  # Not subclasses: what they add, as LoRALinear does, would be lost.
  return type(node) is nnx.Linear or isinstance(node, Dense)


def _name(path: tuple) -> str:
  return '/'.join(map(str, path))


def _dense_params(model: nnx.Module, plan: weights.Plan) -> PyTree:
  """The model's params, with a matrix at each path of the plan."""
  _, params, rest = split(model)
  own = {path: p for path, p in kernels(model).items() if path in plan}
  return weights.export(own, params, rest)


def _drawn(layer: Layer, kernel: Parameterization, key: jax.Array) -> Split:
  """New arrays for a layer or a stack of them, in the dtype of the old ones."""
  shape = layer.in_features, layer.out_features
  linear = isinstance(layer, nnx.Linear)
  init = dense().init if linear else layer.parameterization.init
  arrays = Split(layer.kernel[...]) if linear else layer.arrays()
  one = jax.eval_shape(lambda: init(key, shape, jnp.float32))
  old, one = (jax.tree.leaves(s.train)[0] for s in (arrays, one))
  stack = old.shape[: old.ndim - one.ndim]
  draw = lambda key: kernel.init(key, shape, old.dtype)
  for _ in stack:
    draw = jax.vmap(draw)
  return draw(jax.random.split(key, stack) if stack else key)


def _refuse_custom(path: str, layer: Layer) -> None:
  """What a parameterized kernel would silently not do."""
  if isinstance(layer, Dense):
    return
  usual = inspect.signature(nnx.Linear.__init__).parameters
  for name in ('dot_general', 'promote_dtype', 'preferred_element_type'):
    if getattr(layer, name) is not usual[name].default:
      raise ValueError(
        f'{path}: its own `{name}` would not be used by a parameterized kernel; leave the'
        f' layer by a rule ({path!r}, None) ahead of the others'
      )


def _refuse_shared(model: nnx.Module, layers: dict[str, Layer]) -> None:
  held = collections.Counter(
    id(value)
    for _, module in nnx.iter_modules(model)
    for value in vars(module).values()
  )
  for path, layer in layers.items():
    if held[id(layer.kernel)] > 1:
      raise ValueError(
        f'{path}: another layer has the same kernel, and would no longer share it; leave'
        f' the layer by a rule ({path!r}, None) ahead of the others'
      )


def _plain(tree: PyTree) -> PyTree:
  """Nested dicts for every `nnx.State` in a tree."""
  is_state = lambda x: isinstance(x, nnx.State)
  return jax.tree.map(
    lambda x: nnx.to_pure_dict(x) if is_state(x) else x, tree, is_leaf=is_state
  )
