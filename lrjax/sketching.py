"""Bases found by thin products in the backward pass: no gradient is formed for them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lrjax.in_place import over_stack
from lrjax.matrices import MatricesState
from lrjax.projected import enough, thin_gradients
from lrjax.recording import noted
from lrjax.refreshing import due, keys_of
from lrjax.stacks import LARGEST, Slot, Stack, any_of, over, select, squares
from lrjax.types import MatrixTransform, Sketch
from lrjax.views import LeafPlan

OTHER = {'in': 'out', 'out': 'in'}


def sketched_refresh(
  loss: Callable,
  tx: optax.GradientTransformation,
  *,
  has_aux: bool = False,
  seed: int = 0,
) -> Callable:
  r"""Refreshes the bases of an optimizer, and never forms the gradients they are of.

  Subspace iteration and the randomized range finder ask nothing of a gradient
  :math:`G = X^\top \bar Y` but products with thin matrices,

  .. math:: A = G^\top P = \bar Y^\top (X P), \quad Y = G A = X^\top (\bar Y A),
    \quad P \leftarrow \mathrm{orth}(Y)

  each of which is a backward pass that projects, as in `projected_value_and_grad`. So the
  peak of a run is that of its projected steps; the price is one pass over the model for
  each product, two for `basis='subspace_iteration'`, three for `'randomized_svd'`. With
  `stagger=True` that is paid for each matrix: leave it off here.

    refresh = jax.jit(lrjax.sketched_refresh(loss, tx))
    steady = jax.jit(functools.partial(step, lrjax.projected_value_and_grad(loss, tx)))
    for batch in data:
      if lrjax.wants_gradient(opt_state):
        opt_state = refresh(params, opt_state, batch)
      params, opt_state, value = steady(params, opt_state, batch)

  The bases are those that `tx.update` finds of the full gradient, up to rounding
  (subspace iteration; a randomized one draws its own numbers). A matrix whose gradient is
  zero or not finite keeps its basis, and stays due.

  Args:
    loss: `(params, *args) -> value`, or `(value, aux)`.
    tx: the optimizer, all of whose projected leaves are `lrjax.projectable`. What comes
      ahead of it in a chain does not touch these gradients; a basis does not depend on
      their scale.
    has_aux: whether `loss` returns a pair.
    seed: of the random numbers of `'randomized_svd'`.

  Returns:
    `(params, opt_state, *args) -> opt_state`, to be called under jit before an update at
    which `lrjax.wants_gradient` is true.

  Raises:
    TypeError: if a projected leaf needs more than products; its path is named.

  References:
    Halko et al., `Finding structure with randomness
    <https://arxiv.org/abs/0909.4061>`_, 2011

  >>> import lrjax
  >>> tx = lrjax.galore(1e-2, rank=2, basis='subspace_iteration')
  >>> params = {'kernel': jnp.ones((8, 16))}
  >>> loss = lambda params, x: (x @ params['kernel']).sum()
  >>> refresh = sketched_refresh(loss, tx)
  >>> state = refresh(params, tx.init(params), jnp.eye(3, 8))
  >>> bool(lrjax.wants_gradient(state))
  False
  """

  def run(params: Any, opt_state: Any, *args: Any) -> Any:
    rules = _sketched(tx, params)

    def low_of(xs: dict[str, jax.Array], product: str) -> dict[str, jax.Array]:
      compressed = lambda plan: plan.side if product == 'down' else OTHER[plan.side]
      bases = {n: (x, compressed(rules[n][0])) for n, x in xs.items()}
      return thin_gradients(loss, params, bases, args, has_aux=has_aux, others=False)[1]

    def one(m: MatricesState) -> MatricesState:
      here = {n: rules[n] for n in m.slots}
      stacks = [Stack(rule, plan, None, m.slots[n]) for n, (plan, rule) in here.items()]
      flags = dict(zip(here, due(stacks, m.count)))
      sketches: Any = {n: (plan, rule.sketch) for n, (plan, rule) in here.items()}
      slots, good = _refreshed(sketches, m.slots, flags, low_of, m.count, seed)
      left = any_of(flags[n] & ~good[n] for n in here)
      return m._replace(slots=slots, wants_gradient=left)

    is_lift = lambda x: isinstance(x, MatricesState)
    return jax.tree.map(
      lambda m: one(m) if is_lift(m) else m, opt_state, is_leaf=is_lift
    )

  return run


def _sketched(tx: Any, params: Any) -> dict[str, tuple[LeafPlan, MatrixTransform]]:
  """The plans and rules of all projected leaves, every one of which can be sketched."""
  found = enough(tx, params)
  for path, (_, rule) in noted(tx, params)[0].rules.items():
    if path not in found or rule.sketch is None:
      raise TypeError(
        f'leaf {path!r}: this method finds its basis from the gradient in full; those'
        " that need thin products are the lrjax.projectable ones with basis='subspace_"
        "iteration' or 'randomized_svd'"
      )
  return found


def _refreshed(
  sketches: dict[str, tuple[LeafPlan, Sketch]],
  slots: dict[str, Slot],
  flags: dict[str, jax.Array],
  low_of: Callable,
  step: jax.Array,
  seed: int,
) -> tuple[dict[str, Slot], dict[str, jax.Array]]:
  """New slots, and which matrices (*stack) have a new basis."""
  xs, between, good = {}, {}, dict(flags)
  for name, (plan, sketch) in sketches.items():
    start = lambda key, s, f=sketch.start, plan=plan: f(key, s, *plan.matrix)
    xs[name] = over_stack(plan, start)(keys_of(plan, step, seed), slots[name].state)
    between[name] = over_stack(plan, sketch.between)
  products = next((sketch.products for _, sketch in sketches.values()), ())
  for i, product in enumerate(products):
    if i:
      xs = {n: between[n](x) for n, x in xs.items()}
    xs = {n: jnp.swapaxes(x, -1, -2) for n, x in low_of(xs, product).items()}
    for name, x in xs.items():
      energy = squares(x, (-2, -1))
      good[name] &= (energy < LARGEST**2) & (energy > 0)
      xs[name] = jnp.where(over(good[name], 2), x, 0)
  new = {}
  for name, (plan, sketch) in sketches.items():
    finish = lambda y, s, f=sketch.finish, plan=plan: f(y, s, *plan.matrix)
    state, done = over_stack(plan, finish)(xs[name], slots[name].state)
    good[name] &= done
    state = select(good[name], state, slots[name].state)
    overdue = jnp.where(good[name], -1, slots[name].overdue)
    new[name] = Slot(overdue, state)
  return new, good
