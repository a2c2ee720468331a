"""Gradients that are projected in the backward pass, for optimizers that ask no more."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from lrjax.checks import closest
from lrjax.matrices import MatricesState, nodes
from lrjax.probes import Probed
from lrjax.recording import noted
from lrjax.stacks import Slot, is_thin
from lrjax.types import MatrixTransform, Projected
from lrjax.views import LeafPlan, leaf_path

KEEP = ('input', 'projection')


def projected_value_and_grad(
  loss: Callable,
  tx: optax.GradientTransformation,
  *,
  has_aux: bool = False,
  keep: str = 'input',
) -> Callable:
  r"""`jax.value_and_grad`, with gradients projected before they are formed.

  Where `tx` needs of a kernel's gradient :math:`G = X^\top \bar Y` no more than
  :math:`P^\top G`, for N tokens and a kernel (m, n),

  .. math::
    P^\top G = (X P)^\top \bar Y, \quad \text{or}\ (\bar Y P)^\top X

  costs `2 N r (m + n)` flops in place of `2 N m n`; no array (m, n) is formed, summed over
  micro-batches or sent between devices, only (r, k). The numbers are those of projecting
  the full gradient, up to rounding. Between refreshes that is all that GaLore, GaLore in 8
  bits, Q-GaLore and their like need; Fira, FRUGAL, APOLLO and error feedback read the
  whole gradient, and get it.

  `loss` gets parameters in which such kernels are `Probed`: they can be cast, and
  multiplied from the left, `x @ kernel`, also inside a scan over layers. The layers of
  `lrjax.modules` do nothing else with them; see `lrjax.modules.linen.reads_probes` for
  the `nn.Dense` of other models. Whatever else is done with one raises TypeError.

  Refreshes need gradients in full, from `jax.value_and_grad`; `wants_gradient` tells when:

    steady, full = (jax.jit(functools.partial(step, f)) for f in (
      lrjax.projected_value_and_grad(loss, tx), full_value_and_grad))
    for batch in data:
      step = full if lrjax.wants_gradient(opt_state) else steady
      params, opt_state, value = step(params, opt_state, batch)

  where `full_value_and_grad` is `lambda params, opt_state, batch:
  jax.value_and_grad(loss)(params, batch)`.

  Args:
    loss: `(params, *args) -> value`, or `(value, aux)`.
    tx: the optimizer, alone or within `optax.chain`. What comes ahead of it in the chain
      sees projected gradients: a clip by global norm clips by their norm.
    has_aux: see `jax.value_and_grad`.
    keep: 'input' keeps the layers' inputs for the backward pass as usual; 'projection'
      keeps X P where P compresses the inputs, which saves memory where nothing else
      needs X.

  Returns:
    `(params, opt_state, *args) -> (value, gradients)`, to be called under jit; gradients
    hold `Projected` at the leaves concerned, arrays at all others.

  Raises:
    ValueError: for an unknown `keep`.

  >>> import lrjax
  >>> tx = lrjax.galore(1e-2, rank=2)
  >>> params = {'kernel': jnp.ones((8, 16)), 'bias': jnp.zeros(16)}
  >>> loss = lambda params, x: (x @ params['kernel'] + params['bias'][None]).sum()
  >>> state = tx.init(params)
  >>> _, grads = projected_value_and_grad(loss, tx)(params, state, jnp.ones((3, 8)))
  >>> grads['kernel'].low.shape, grads['bias'].shape
  ((2, 16), (16,))
  >>> updates, state = tx.update(grads, state, params)
  """
  if keep not in KEEP:
    raise ValueError(f'unknown `keep` {keep!r}; {closest(str(keep), KEEP)}')

  def run(params: Any, opt_state: Any, *args: Any) -> tuple[Any, Any]:
    bases = bases_of(tx, params, opt_state)
    own = noted(tx, params)[0].own
    how = dict(keep=keep, has_aux=has_aux, own=own)
    value, found = thin_gradients(loss, params, bases, args, **how)

    def gradient(path: Any, x: jax.Array) -> Any:
      name = leaf_path(path)
      if name not in bases:
        return found[name]
      return Projected(found[name], x.shape, x.dtype, bases[name][1])

    return value, jax.tree.map_with_path(gradient, params)

  return run


def projectable(tx: optax.GradientTransformation, params: Any) -> tuple[str, ...]:
  """The leaves of whose gradients an optimizer needs only a projection.

  Args:
    tx: any optax transformation.
    params: arrays or `jax.ShapeDtypeStruct`s.

  Returns:
    Their paths.

  >>> import lrjax
  >>> params = {'kernel': jnp.ones((8, 16)), 'bias': jnp.zeros(16)}
  >>> projectable(lrjax.galore(1e-2, rank=2), params)
  ('kernel',)
  >>> projectable(lrjax.fira(1e-2, rank=2), params)
  ()
  """
  return (*enough(tx, params),)


def wants_gradient(opt_state: Any) -> jax.Array:
  """Whether the next update finds a basis, and so needs gradients in full.

  Args:
    opt_state: the state of any optax transformation that holds lrjax ones.

  Returns:
    bool[]; false if there is no lrjax state.

  >>> import lrjax
  >>> tx = lrjax.galore(1e-2, rank=1, update_proj_gap=10)
  >>> params = {'kernel': jnp.ones((2, 3))}
  >>> state = tx.init(params)
  >>> _, later = tx.update(params, state, params)
  >>> bool(wants_gradient(state)), bool(wants_gradient(later))
  (True, False)
  """
  flags = [m.wants_gradient for m in nodes(opt_state, MatricesState)]
  return jnp.any(jnp.array([False, *flags]))


def thin_gradients(
  loss: Callable,
  params: Any,
  bases: dict[str, tuple[jax.Array, str]],
  args: tuple,
  *,
  keep: str = 'input',
  has_aux: bool = False,
  others: bool = True,
  own: Mapping[str, NamedSharding] = {},
) -> tuple[Any, dict[str, jax.Array]]:
  """The value of a loss and its gradients by path, some of them projected only.

  Args:
    loss: `(params, *args) -> value`, or `(value, aux)`.
    params: its parameters.
    bases: path -> P (*stack, d, r) and the side of the kernel that it compresses.
    args: the rest of its arguments.
    keep: see `projected_value_and_grad`.
    has_aux: see `jax.value_and_grad`.
    others: whether to differentiate the leaves that have no basis.
    own: path -> where P'G is to be; so it is placed in the backward pass already.

  Returns:
    What `loss` returns, and path -> P'G (*stack, r, k) or G.
  """
  leaves, treedef = jax.tree.flatten_with_path(params)
  arrays = {leaf_path(path): x for path, x in leaves}

  def start(name: str, x: jax.Array) -> jax.Array:
    if name not in bases:
      return x
    p, side = bases[name]
    other = x.shape[-1 if side == 'in' else -2]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.zeros((*x.shape[:-2], p.shape[-1], other), wide)

  def value(trained: dict) -> Any:
    def put(name: str, x: jax.Array) -> Any:
      if name not in bases:
        return trained.get(name, x)
      (p, side), probe = bases[name], trained[name]
      if name in own:
        # Of a constraint the gradient is constrained likewise.
        probe = jax.lax.with_sharding_constraint(probe, own[name])
      return Probed(x, p, probe, side, keep)

    return loss(treedef.unflatten([put(*each) for each in arrays.items()]), *args)

  trained = {n: start(n, x) for n, x in arrays.items() if others or n in bases}
  return jax.value_and_grad(value, has_aux=has_aux)(trained)


def bases_of(tx: Any, params: Any, opt_state: Any) -> dict[str, tuple[jax.Array, str]]:
  """Path -> P (*stack, d, r) and side of the leaves whose projection is enough."""
  slots = slots_of(opt_state)
  found = {}
  for path, (plan, rule) in enough(tx, params).items():
    subspace: Any = rule.subspace
    matrix: Callable = lambda s, f=subspace, d=plan.matrix[0]: f(s, d)
    for _ in plan.stack:
      matrix = jax.vmap(matrix)
    found[path] = matrix(slots[path].state), plan.side or ''
  return found


def slots_of(opt_state: Any) -> dict[str, Slot]:
  """The state of all projected leaves, by path."""
  return {k: v for m in nodes(opt_state, MatricesState) for k, v in m.slots.items()}


def enough(tx: Any, params: Any) -> dict[str, tuple[LeafPlan, MatrixTransform]]:
  """The leaves where P'G is enough, and is found in a product with the last two axes."""
  shapes = {leaf_path(p): x.shape for p, x in jax.tree.leaves_with_path(params)}

  def is_enough(plan: LeafPlan, rule: MatrixTransform) -> bool:
    # Where only some layers train, the leaf that a method sees is another one.
    whole = plan.shape == shapes[plan.path]
    return plan.in_order and whole and is_thin(rule)

  seen, _ = noted(tx, params)
  return {path: found for path, found in seen.rules.items() if is_enough(*found)}
