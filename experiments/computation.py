"""What a run computes, as pure functions that know nothing of devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

import lrjax
from experiments import kernels, optimizers
from experiments.config import Experiment
from experiments.errors import ConfigError
from experiments.storage import storage
from lrjax.models.llama import Llama, next_token_loss
from lrjax.models.llama_params import param_specs
from lrjax.modules.nnx import kernels as plan_of
from lrjax.modules.nnx import split


class Computation:
  """The functions of one experiment, to be jitted.

  The state of a run is a dict: params (as they are stored), fixed, opt, step (updates
  tried), skipped and bad (not taken: in all, in a row).

  Args:
    experiment: what to compute.
    mesh: over whose axes low-rank moments are divided; none: they are not.

  Attributes:
    tx: the optimizer.
    kernel: the parameterization of the layers' kernels.
    plan: where it is in the model.
    storage: how weights are kept between steps.
    params: the tree of `ShapeDtypeStruct`s of the weights in a step.
    specs: the tree of the weights' partition specs.
    fixed: that of the arrays nobody differentiates.

  Raises:
    ConfigError: for a kernel that does not fit the model, a mesh that does not divide it.
  """

  def __init__(self, experiment: Experiment, mesh: Mesh | None = None):
    self.experiment = experiment
    self.tx = optimizers.make(experiment)
    self.rate = optimizers.schedule(experiment)
    self.kernel = kernels.make(experiment)
    try:
      model = nnx.eval_shape(self._model)
    except ValueError as e:  # a rank or a density that no kernel has
      raise ConfigError(f'kernel {experiment.kernel.name}: {e}') from e
    self._graphdef, self.params, self.fixed = split(model)
    self.specs = param_specs(self.params, self.kernel)
    if mesh is not None:
      self.tx = self._divided(mesh)
    self.storage = storage(experiment, self.tx)
    self.plan = plan_of(model)
    self._each_step = lrjax.step_events(self.plan)

  def init(self) -> Any:
    """The state before the first step."""
    return self._state_of(*split(self._model())[1:])

  def start(self, dense: Any) -> Any:
    """The state before the first step, from params with dense kernels."""
    key = jax.random.key(self.experiment.seed)
    return self._state_of(*lrjax.convert(self.plan, dense, key)[:2])

  def loss(self, params: Any, fixed: Any, tokens: jax.Array) -> jax.Array:
    """Nats a token."""
    logits = nnx.merge(self._graphdef, params, fixed)(tokens[:, :-1])
    nats, count = next_token_loss(logits, tokens[:, 1:])
    return nats / count

  def step(self, state: Any, tokens: jax.Array) -> tuple[Any, dict[str, Any]]:
    """One training step: `(state, tokens) -> (state, metrics)`."""
    full = lambda params, opt, *rest: jax.value_and_grad(self.loss)(params, *rest)
    return self._step(full, state, tokens)

  def projected_step(self, state: Any, tokens: jax.Array) -> tuple[Any, dict[str, Any]]:
    """The same where no basis is to be found: gradients are projected as they arise."""
    return self._step(lrjax.projected_value_and_grad(self.loss, self.tx), state, tokens)

  def refresh(self, state: Any, tokens: jax.Array) -> Any:
    """The state with bases found for these tokens, ahead of a projected step on them."""
    find = lrjax.sketched_refresh(self.loss, self.tx, seed=self.experiment.seed)
    params = self.storage.decode(state['params'])
    return state | dict(opt=find(params, state['opt'], state['fixed'], tokens))

  def run_events(
    self, names: frozenset[str], state: Any, k: jax.Array
  ) -> tuple[Any, Any]:
    """The state after events; they act on weights as stored, and int8 ones have none."""
    if not names:
      return state, {}
    weights = lrjax.Weights(state['params'], state['fixed'], state['opt'])
    seed = self.experiment.seed
    new, report = lrjax.run_events(self.plan, names, weights, k, tx=self.tx, seed=seed)
    changed = dict(params=new.params, fixed=new.fixed, opt=new.opt_state)
    return state | changed, report

  def evaluate(
    self, stored: Any, fixed: Any, tokens: jax.Array, mask: jax.Array
  ) -> tuple:
    """Summed nats and their count."""
    params = self.storage.decode(stored)
    model = nnx.merge(self._graphdef, params, lrjax.full_width(fixed))
    return next_token_loss(model(tokens[:, :-1]), tokens[:, 1:], mask)

  def gradients(self, stored: Any, fixed: Any, tokens: jax.Array) -> Any:
    """The gradients in full, to look into failures."""
    return jax.grad(self.loss)(self.storage.decode(stored), fixed, tokens)

  def _model(self) -> Llama:
    e = self.experiment
    return Llama(e.model, kernel=self.kernel, rngs=nnx.Rngs(e.seed))

  def _divided(self, mesh: Mesh) -> optax.GradientTransformation:
    try:
      return lrjax.divided(self.tx, self.params, self.specs, mesh)
    except ValueError as e:
      raise ConfigError(f'mesh {dict(mesh.shape)}: {e}') from e

  def _state_of(self, params: Any, fixed: Any) -> Any:
    zero = jnp.zeros([], jnp.int32)
    counts = dict(step=zero, skipped=zero, bad=zero)
    stored = self.storage.encode(params)
    state = dict(params=stored, fixed=fixed, opt=self.tx.init(params), **counts)
    return self.run_events(self._each_step, state, zero)[0]

  def _step(self, differentiate: Callable, state: Any, tokens: jax.Array) -> tuple:
    stored, fixed = state['params'], state['fixed']
    params = self.storage.decode(stored)
    value, grads = differentiate(params, state['opt'], fixed, tokens)
    norm = global_norm(grads)
    # Only rounding draws from it.
    key = jax.random.fold_in(jax.random.key(self.experiment.seed), state['step'])
    moved, opt = self.storage.move(key, stored, params, grads, state['opt'])
    new = dict(params=moved, opt=opt)
    ok = jnp.isfinite(value) & jnp.isfinite(norm)
    old = {k: state[k] for k in new}
    new = jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
    bad = ~ok
    new |= dict(
      fixed=fixed,
      step=state['step'] + 1,
      skipped=state['skipped'] + bad,
      bad=jnp.where(ok, 0, state['bad'] + 1),
    )
    new, _ = self.run_events(self._each_step, new, new['step'])
    return new, self._metrics(new, value, norm)

  def _metrics(self, new: Any, value: jax.Array, norm: jax.Array) -> dict[str, Any]:
    health = lrjax.health(new['opt'])
    skipped = new['skipped'] + health['skipped_steps']
    measured = subspaces(new['opt']) if self.experiment.diagnostics_every else {}
    return dict(
      loss=value,
      grad_norm=norm,
      learning_rate=jnp.asarray(self.rate(new['step'] - 1 - skipped)),
      skipped_steps=skipped,
      bad=new['bad'],
      overdue_refreshes=health['overdue_refreshes'],
      subspaces=measured,
    )


def global_norm(tree: Any) -> jax.Array:
  """Euclidean norm of all leaves together, summed in float32."""
  squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
  return jnp.sqrt(sum(squares, jnp.float32(0)))


def subspaces(opt: Any) -> dict[str, jax.Array]:
  """The diagnostics of an optimizer state: means over all matrices and over each leaf."""
  found = lrjax.diagnostics(opt)
  if not found:
    return {}
  fields = next(iter(found.values()))._fields
  of = lambda field: {path: getattr(d, field) for path, d in found.items()}
  flat = lambda arrays: jnp.concatenate([x.reshape(-1) for x in arrays])
  whole = {f: flat(of(f).values()).mean() for f in fields}
  return whole | {f'{f}/{path}': x.mean() for f in fields for path, x in of(f).items()}
