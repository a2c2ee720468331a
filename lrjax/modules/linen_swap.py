"""Parameterized kernels in a linen model that somebody else wrote."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from lrjax.modules.linen import plain_dense
from lrjax.modules.nnx import applied, in_dtype
from lrjax.modules.rules import Rules, check_rules, choose
from lrjax.types import Parameterization, PyTree, Split
from lrjax.views import by_rule
from lrjax.weights import Plan, split_at

_INITS = itertools.count()
# Path of each nn.Dense met in a trace -> shapes of one kernel of it, {} if left alone.
Met = dict[str, PyTree]


class Swapped:
  """A linen module with other kernels in its `nn.Dense` layers, see `swap`.

  Attributes:
    module: the module as it was written.
    rules: pairs of a pattern and a parameterization or None.
  """

  def __init__(self, module: nn.Module, rules: Rules):
    self.module = module
    self.rules = check_rules(rules)

  def init(self, rngs: PyTree, *args: Any, **kwargs: Any) -> dict[str, PyTree]:
    """`module.init`, with fixed arrays in the collection `fixed`."""
    return self.init_with_output(rngs, *args, **kwargs)[1]

  def init_with_output(self, rngs: PyTree, *args: Any, **kwargs: Any) -> tuple:
    """`module.init_with_output`, with fixed arrays in the collection `fixed`."""
    out, variables, _ = self._init(rngs, args, kwargs)
    return out, variables

  def apply(self, variables: Mapping, *args: Any, **kwargs: Any) -> Any:
    """`module.apply` on `{'params': ..., 'fixed': ..., ...}`."""
    joined, fixed = _join(variables)
    kwargs = _traced_apart(self.rules, kwargs)
    with nn.intercept_methods(_interceptor(self.rules, {})):
      out = self.module.apply(joined, *args, **kwargs)
    if kwargs.get('mutable', False) is False:
      return out
    return out[0], _part(out[1], fixed)

  def plan(self, rngs: PyTree, *args: Any, **kwargs: Any) -> Plan:
    """Path of each swapped layer -> its parameterization; nothing is computed.

    Args:
      rngs: as those of `init`.
      *args: as those of `init`, or their `jax.ShapeDtypeStruct`s.
      **kwargs: likewise.

    Returns:
      What `lrjax.run_events`, `lrjax.export` and `lrjax.convert` ask for.

    Raises:
      ValueError: for a rule that decides no layer, or a stack that is not leading.
    """
    leaves, treedef = jax.tree.flatten((rngs, args, kwargs))
    traced = {i: x for i, x in enumerate(leaves) if hasattr(x, 'shape')}
    plans = []

    def init(traced: dict) -> PyTree:
      filled = [traced.get(i, x) for i, x in enumerate(leaves)]
      _, variables, plan = self._init(*jax.tree.unflatten(treedef, filled))
      plans.append(plan)
      return variables

    jax.eval_shape(init, traced)
    return plans[0]

  def _init(self, rngs: PyTree, args: tuple, kwargs: dict) -> tuple[Any, dict, Plan]:
    met: Met = {}
    # A new number, because what is found in a cache meets no layers.
    kwargs = _traced_apart(next(_INITS), kwargs)
    with nn.intercept_methods(_interceptor(self.rules, met)):
      out, variables = self.module.init_with_output(rngs, *args, **kwargs)
    plan = choose(self.rules, met)
    variables = _part(variables, [_node(path) for path in plan])
    for path in plan:
      _check_stack(path, met[path], variables)
    return out, variables, plan


def swap(module: nn.Module, rules: Rules) -> Swapped:
  """A linen model with other kernels in its `nn.Dense` layers.

  Trained arrays are where the kernel was, at `params/<path>/kernel` or
  `params/<path>/kernel/<name>`, fixed ones at `fixed/<path>/fixed/<name>`; all other paths
  stay, and so do biases, dtypes and precision. Inside the model fixed arrays travel with
  the parameters, so that `nn.scan`, `nn.vmap` and `nn.remat` need not know of them; a
  stack must be the leading axis. Subclasses of `nn.Dense` and `nn.DenseGeneral` are left
  alone.

  With `plan = model.plan(key, x)`, `lrjax.convert` turns parameters of the module into
  those of the new model, and `lrjax.export` turns them back; both want them unboxed
  (`nn.unbox`) where `nn.with_partitioning` named their axes. New arrays have the names of
  the axes they share with the matrix.

  Args:
    module: any linen module.
    rules: pairs of a pattern, searched in a layer's path such as `layers/mlp/up`, and a
      parameterization; the first that matches decides, None leaves the layer.

  Returns:
    An object with `init`, `init_with_output` and `apply` of the module, and `plan`.

  Raises:
    TypeError: for rules that are not such pairs.
    ValueError: at `init`, for a rule that decides no layer, a layer with a `dot_general`
      or dtypes of its own, or one that a parameterization does not fit; at `apply`, for
      variables that are not those of the rules.

  Examples:
    >>> import lrjax
    >>> model = swap(nn.Sequential([nn.Dense(6), nn.relu]), [('', lrjax.factorized(2))])
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 8)))
    >>> jax.tree.map(jnp.shape, variables['params']['layers_0'])
    {'bias': (6,), 'kernel': {'a': (8, 2), 'b': (2, 6)}}
    >>> model.apply(variables, jnp.ones((1, 8))).shape
    (1, 6)
  """
  return Swapped(module, rules)


def _traced_apart(key: Any, kwargs: Mapping) -> dict[str, Any]:
  """Arguments of init and apply with which `nn.jit` traces anew for another key.

  It tells by the flags of a scope whether it has traced this before, and knows nothing of
  interceptors.
  """
  method = kwargs.get('method') or '__call__'

  def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    assert module.scope is not None
    module.scope.flags = flax.core.freeze({**module.scope.flags, 'lrjax': key})
    if isinstance(method, str):
      return getattr(module, method)(*args, **kwargs)
    return getattr(method, '__func__', method)(module, *args, **kwargs)

  return {**kwargs, 'method': run}


def _interceptor(rules: Rules, met: Met) -> Callable:
  """Replaces calls of chosen `nn.Dense` layers; tells which layers it met."""

  def intercept(f: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    layer = context.module
    # Not subclasses: what they compute besides would be lost.
    if type(layer) is not nn.Dense or context.method_name != '__call__':
      return f(*args, **kwargs)
    path = '/'.join(layer.path)
    p = by_rule(rules, path)
    if p is None:
      met.setdefault(path, {})
      return f(*args, **kwargs)
    return _call(layer, path, p, met, *args, **kwargs)

  return intercept


def _call(
  layer: nn.Dense, path: str, p: Parameterization, met: Met, inputs: jax.Array
) -> jax.Array:
  """What `nn.Dense` does, with another kernel."""
  plain_dense(layer, path)
  inputs = jnp.asarray(inputs)
  shape = (inputs.shape[-1], layer.features)

  def draw(key: jax.Array) -> Split:
    try:
      return p.init(key, shape, layer.param_dtype)
    except ValueError as error:
      error.add_note(f'in the layer {path}')
      raise

  if layer.is_initializing() and not layer.has_variable('params', 'kernel'):
    drawn = _named(layer, p, shape, draw(layer.make_rng('params')))
    layer.put_variable('params', 'kernel', drawn.train)
    if drawn.fixed:
      layer.put_variable('params', 'fixed', dict(drawn.fixed))
  held = lambda name, none=None: nn.unbox(layer.get_variable('params', name, none))
  split = Split(held('kernel'), held('fixed', {}))
  met[path] = _shapes(jax.eval_shape(draw, jax.random.key(0)))
  if _shapes(split) != met[path]:
    raise ValueError(
      f'{path}: its rule needs arrays of shapes {met[path]}, its variables have'
      f' {_shapes(split)}. Dense parameters become those of the rules by lrjax.convert('
      'model.plan(...), params, key); apply needs {"params": ..., "fixed": ...}'
    )
  y = applied(p, split, inputs, layer.dtype, layer.precision)
  if not layer.use_bias:
    return y
  bias = layer.param('bias', layer.bias_init, (layer.features,), layer.param_dtype)
  return y + jnp.broadcast_to(in_dtype(bias, layer.dtype), y.shape)


def _named(
  layer: nn.Dense, p: Parameterization, shape: tuple[int, int], split: Split
) -> Split:
  """The arrays in boxes that name their axes, if those of the dense kernel had names."""
  key = jax.random.key(0)
  box = jax.eval_shape(lambda: layer.kernel_init(key, shape, layer.param_dtype))
  if not isinstance(box, nn.Partitioned):
    return split
  names = dict(zip(('in', 'out'), box.names))

  def boxed(path: tuple, x: jax.Array) -> nn.Partitioned:
    axes = p.axes[path[-1].key if path else '']
    return box.replace(value=x, names=tuple(names.get(axis) for axis in axes))

  return Split(*(jax.tree.map_with_path(boxed, part) for part in split))


def _shapes(split: Split) -> PyTree:
  return jax.tree.map(jnp.shape, Split(split.train, dict(split.fixed)))


def _check_stack(path: str, one: PyTree, variables: dict) -> None:
  """Whether kernels of a stack are found where the tree functions look for them."""
  plain = jax.eval_shape(nn.unbox, variables)
  whole = _shapes(split_at(path, plain['params'], plain.get('fixed', {})))
  is_shape = lambda x: isinstance(x, tuple) and not isinstance(x, Split)
  pairs = zip(*(jax.tree.leaves(tree, is_leaf=is_shape) for tree in (whole, one)))
  for stacked, shape in pairs:
    if stacked[len(stacked) - len(shape) :] != shape:
      raise ValueError(
        f'{path}: kernels of shape {shape} are stacked as {stacked}; the axis of the stack'
        " must lead: variable_axes={'params': 0}"
      )


def _join(variables: Mapping) -> tuple[dict[str, Any], list[tuple]]:
  """Puts fixed arrays among the parameters, where all that lifts these lifts them."""
  params, fixed = (_flat(variables.get(name, {})) for name in ('params', 'fixed'))
  if not fixed:
    return {**variables}, []
  return {**variables, 'params': unflatten_dict({**params, **fixed})}, [*fixed]


def _part(variables: Mapping, nodes: list[tuple]) -> dict[str, Any]:
  """Takes the fixed arrays, those at or under the nodes, out of the parameters."""
  params, fixed = (_flat(variables.get(name, {})) for name in ('params', 'fixed'))
  for path in [*params]:
    if any(path[: len(node)] == node for node in nodes):
      # A collection of that name which the module changed itself has the newer value.
      fixed.setdefault(path, params.pop(path))
  parts = {'params': unflatten_dict(params), 'fixed': unflatten_dict(fixed)}
  return {**variables, **{name: tree for name, tree in parts.items() if tree}}


def _node(path: str) -> tuple[str, ...]:
  return (*filter(None, path.split('/')), 'fixed')


def _flat(tree: Mapping) -> dict[tuple, Any]:
  return flatten_dict(tree, keep_empty_nodes=True)
