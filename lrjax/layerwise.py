r"""Layer-wise update: each layer of a stack learns inside the backward pass.

What hooks on parameters do elsewhere (LOMO, Lv et al., 2023, arXiv 2306.09782; the
`per_layer` optimizers of GaLore) is a loop of our own here: a forward scan keeps the
inputs of the layers; a backward scan recomputes one layer, forms its gradient, updates
its slice of parameters and optimizer state, and hands the cotangent of its input on.
The gradient of the whole stack never exists.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lrjax.checks import finite
from lrjax.types import PyTree

Transform = optax.GradientTransformation


class Parts(NamedTuple):
  """A model in three parts, around a stack of layers that are alike.

  `rest` is the tree of all parameters that are not in the stack. Each part sees all of
  it, so that weights may be tied.

  Attributes:
    embed: `(rest, batch) -> (x, shared)`: the first layer's input, and what every layer
      gets besides (rotary tables, masks); nobody differentiates `shared`.
    layer: `(params, x, shared, index) -> x`, with one layer's parameters and its int32
      index, for example to fold into a dropout key.
    head: `(rest, x, batch) -> (loss, aux)`.
  """

  embed: Callable
  layer: Callable
  head: Callable


class LayerwiseState(NamedTuple):
  """State of `layerwise`: of the stack, every leaf leading with L, and of the rest."""

  layers: PyTree
  rest: PyTree


class Layerwise(NamedTuple):
  """A training step that never holds the gradients of all layers.

  Attributes:
    init: `(params) -> state`.
    step: `(params, state, batch) -> (params, state, loss, aux)`. Jit it, and donate
      params and state, which are then updated in place.
  """

  init: Callable
  step: Callable


def layerwise(
  parts: Parts,
  layers: Transform | Callable[[jax.Array], Transform],
  rest: Transform,
  *,
  max_norm: float | None = None,
) -> Layerwise:
  r"""Backward pass and update in one loop over the layers.

  .. math::
    G_l, \bar x_l = \mathrm{vjp}(f_l; W_l, x_l)(\bar x_{l+1}), \quad
    W_l \leftarrow W_l + \mathrm{update}_l(G_l), \quad l = L-1, \dots, 0

  Gradients take the memory of one layer (and of the rest) instead of L, activations that
  of one layer and of L layer inputs; each layer is computed twice, as under remat. The
  numbers are those of the ordinary step. Choose it where gradients bind: with small
  batches, or an optimizer whose state is small already. Gradients cannot be
  accumulated over micro-batches: they are gone when the step ends.

  Args:
    parts: the model. Parameters are a mapping whose entry `layers` is the stack, every
      leaf with a leading axis L, and whose other entries are the rest.
    layers: what updates a layer, seen as a tree without the axis L: a transformation, or
      `index -> transformation` with a traced index. One that draws random numbers has to
      be given as such a function and use the index: `lambda i: galore(..., seed=i)`.
      Clips and guards inside look at one layer's gradient.
    rest: what updates the rest, after the layers.
    max_norm: clips the norm of all gradients together, by a second backward pass.

  Returns:
    A `Layerwise`, a pair of `init` and `step`.

  Raises:
    TypeError: for a `layers` of another type.
    ValueError: at `init` if parameters have no stack, or one of leaves that disagree on
      L; if layers would share their random numbers.

  References:
    Lv et al., `Full Parameter Fine-tuning for Large Language Models with Limited
    Resources <https://arxiv.org/abs/2306.09782>`_, 2023

  >>> parts = Parts(
  ...   embed=lambda rest, batch: (batch * rest['w'], None),
  ...   layer=lambda p, x, shared, index: x + p['w'],
  ...   head=lambda rest, x, batch: (x.sum(), x),
  ... )
  >>> train = layerwise(parts, optax.sgd(0.1), optax.sgd(0.1))
  >>> params = {'layers': {'w': jnp.zeros(3)}, 'w': jnp.ones(())}
  >>> params, state, loss, x = train.step(params, train.init(params), jnp.ones(2))
  >>> print(loss, params['layers']['w'], params['w'])
  2.0 [-0.2 -0.2 -0.2] 0.8
  """
  make = _per_layer(layers)
  rest = optax.with_extra_args_support(rest)
  if max_norm is not None:
    finite('max_norm', max_norm)

  def init(params: Mapping) -> LayerwiseState:
    stack, others = _split(params)
    indices = jnp.arange(_depth(stack))
    _check_streams(make, stack)
    state = jax.vmap(lambda index, p: make(index).init(p))(indices, stack)
    return LayerwiseState(state, rest.init(others))

  def step(params: Mapping, state: LayerwiseState, batch: Any) -> tuple:
    stack, others = _split(params)
    indices = jnp.arange(_depth(stack))
    embed = lambda others: parts.embed(others, batch)
    x, pull_embed, shared = jax.vjp(embed, others, has_aux=True)
    forward = lambda x, at: (parts.layer(at[1], x, shared, at[0]), x)
    x, inputs = jax.lax.scan(forward, x, (indices, stack))
    head = lambda others, x: parts.head(others, x, batch)
    loss, pull_head, aux = jax.vjp(head, others, x, has_aux=True)

    def backward(index: jax.Array, p: PyTree, x: PyTree, dx: PyTree) -> tuple:
      """One layer's gradient and the cotangent of its input."""
      return jax.vjp(lambda p, x: parts.layer(p, x, shared, index), p, x)[1](dx)

    def norms(at: tuple, layer: tuple) -> tuple:
      (dx, total), (index, p, x) = at, layer
      g, dx = backward(index, p, x, dx)
      return (dx, total + _squares(g)), None

    def learn(at: tuple, layer: tuple) -> tuple:
      (dx, whole, (p, s)), (index, x) = at, layer
      g, dx = backward(index, p, x, dx)
      u, s = make(index).update(g, s, p)
      whole = _put(whole, (optax.apply_updates(p, u), s), index)
      return (dx, whole, _row(whole, index - 1)), None

    # Backward is linear: clipped gradients are those of a scaled cotangent.
    cotangent = jnp.ones_like(loss)
    if max_norm is not None:
      g_head, dx = pull_head(cotangent)
      at, each = (dx, jnp.zeros([])), (indices, stack, inputs)
      (dx, total), _ = jax.lax.scan(norms, at, each, reverse=True)
      g = jax.tree.map(jnp.add, g_head, pull_embed(dx)[0])
      norm = jnp.sqrt(total + _squares(g))
      cotangent = jnp.where(norm > max_norm, max_norm / norm, 1.0).astype(loss.dtype)

    # Parameters and state are carried whole and written row by row, which XLA does in
    # place. The row at hand is carried too: a loop that reads one stack while another is
    # written copies it.
    g_head, dx = pull_head(cotangent)
    whole = (stack, state.layers)
    at = (dx, whole, _row(whole, len(indices) - 1))
    (dx, whole, _), _ = jax.lax.scan(learn, at, (indices, inputs), reverse=True)
    stack, layer_state = whole
    g = jax.tree.map(jnp.add, g_head, pull_embed(dx)[0])
    u, rest_state = rest.update(g, state.rest, others)
    others: Any = optax.apply_updates(others, u)
    state = LayerwiseState(layer_state, rest_state)
    return {'layers': stack, **others}, state, loss, aux

  return Layerwise(init, step)


def _per_layer(layers: Any) -> Callable[[jax.Array], Transform]:
  if hasattr(layers, 'init') and hasattr(layers, 'update'):
    make = lambda index: layers
  elif callable(layers):
    make = layers
  else:
    raise TypeError(
      '`layers` must be an optax.GradientTransformation or a function from a layer index'
      f' to one, got {layers!r}'
    )
  return lambda index: optax.with_extra_args_support(make(index))


def _split(params: Mapping) -> tuple[PyTree, dict]:
  """The stack and everything else."""
  if not isinstance(params, Mapping) or 'layers' not in params:
    names = sorted(params) if isinstance(params, Mapping) else type(params).__name__
    raise ValueError(f'params must be a mapping with an entry `layers`, got {names}')
  return params['layers'], {k: v for k, v in params.items() if k != 'layers'}


def _depth(stack: PyTree) -> int:
  """L, on which all leaves must agree."""
  leaves = jax.tree.leaves_with_path(stack)
  depths = {jax.tree_util.keystr(p, simple=True): x.shape[:1] for p, x in leaves}
  if len(set(depths.values())) != 1 or () in depths.values():
    raise ValueError(
      f'every leaf of `layers` needs the same leading axis, one entry a layer, got'
      f' {depths}; stack the layers (scan_layers=True)'
    )
  return leaves[0][1].shape[0]


def _check_streams(make: Callable, stack: PyTree) -> None:
  """Raises where every layer would draw the same random numbers."""

  def run(index: jax.Array, p: PyTree) -> Any:
    tx = make(index)
    return tx.update(p, tx.init(p), p)

  one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), stack)
  jaxpr = jax.make_jaxpr(run)(jnp.int32(0), one).jaxpr
  index = jaxpr.invars[0]
  used = any(v is index for eqn in jaxpr.eqns for v in eqn.invars)
  if not used and 'random_bits' in str(jaxpr):
    raise ValueError(
      'the transformation of `layers` draws random numbers, the same ones for every'
      ' layer; give a function that uses the layer index, such as'
      ' `lambda index: lrjax.galore(..., seed=index)`'
    )


def _row(tree: PyTree, index: Any) -> PyTree:
  take = lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False)
  return jax.tree.map(take, tree)


def _put(tree: PyTree, row: PyTree, index: jax.Array) -> PyTree:
  put = lambda a, new: jax.lax.dynamic_update_index_in_dim(a, new, index, 0)
  return jax.tree.map(put, tree, row)


def _squares(tree: PyTree) -> jax.Array:
  leaves = (jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree))
  return sum(leaves, jnp.zeros([]))
