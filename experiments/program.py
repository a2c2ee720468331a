"""What a run computes: its state, one training step, one evaluation step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import lrjax
from experiments import kernels, optimizers
from experiments.config import Experiment
from experiments.errors import ConfigError
from lrjax import int8_weights
from lrjax.models.llama import Llama, next_token_loss
from lrjax.models.llama_params import param_specs
from lrjax.modules.nnx import kernels as plan_of
from lrjax.modules.nnx import split


class Storage(NamedTuple):
  """How weights are kept between steps.

  Attributes:
    encode: weights -> what the state holds.
    decode: its inverse, the weights of a step.
    move: (key, stored, updates) -> stored.
    specs: (weights, their specs) -> specs of what is stored.
  """

  encode: Callable[[Any], Any]
  decode: Callable[[Any], Any]
  move: Callable[[jax.Array, Any, Any], Any]
  specs: Callable[[Any, Any], Any]


def storage(experiment: Experiment) -> Storage:
  """What the config says of the weights."""
  if experiment.optimizer.weights == 'int8':
    dtype = experiment.model.param_dtype
    return Storage(
      int8_weights.quantize,
      lambda stored: int8_weights.dequantize(stored, dtype),
      int8_weights.apply_updates,
      int8_weights.weight_specs,
    )
  return Storage(
    encode=lambda params: params,
    decode=lambda stored: stored,
    move=lambda key, stored, updates: optax.apply_updates(stored, updates),
    specs=lambda params, specs: specs,
  )


class Program(NamedTuple):
  """The compiled parts of one experiment.

  Attributes:
    mesh: of devices, axes data, fsdp, tensor.
    batch_sharding: of token arrays (batch, positions).
    state: the state's tree of `ShapeDtypeStruct`s with shardings: params (as they are
      stored), fixed, opt, step (updates tried), skipped and bad (not taken: in all, in a
      row).
    weights: the tree of `ShapeDtypeStruct`s of the weights in a step.
    init: `() -> state`.
    start: `params with dense kernels -> state`.
    step: jitted `(state, tokens) -> (state, metrics)`; donates the state.
    evaluate: jitted `(params, fixed, tokens, mask) -> (nats, count)`.
    gradients: jitted `(params, fixed, tokens) -> gradients`, to look into failures.
    tx: the optimizer.
    due: `k -> names` of the events that run after k updates, outside of `step`.
    events: `names -> (state -> (state, report))`, jitted; donates the state.
  """

  mesh: Mesh
  batch_sharding: NamedSharding
  state: Any
  weights: Any
  init: Callable[[], Any]
  start: Callable[[Any], Any]
  step: Any
  evaluate: Callable
  gradients: Callable
  tx: optax.GradientTransformation
  due: Callable[[int], frozenset[str]]
  events: Callable[[frozenset[str]], Callable]


def make_mesh(experiment: Experiment) -> Mesh:
  """The mesh a config asks for.

  Raises:
    ConfigError: it needs more devices than there are.
  """
  m = experiment.mesh
  need, have = m.data * m.fsdp * m.tensor, jax.device_count()
  if need > have or (jax.process_count() > 1 and need != have):
    raise ConfigError(
      f'mesh.data * mesh.fsdp * mesh.tensor = {need} devices, but there are {have}'
    )
  return jax.make_mesh(
    (m.data, m.fsdp, m.tensor),
    ('data', 'fsdp', 'tensor'),
    devices=jax.devices()[:need],
    axis_types=(AxisType.Auto,) * 3,
  )


def build(experiment: Experiment) -> Program:
  """Everything an experiment computes; nothing is compiled or allocated yet."""
  mesh, tx = make_mesh(experiment), optimizers.make(experiment)
  rate = optimizers.schedule(experiment)
  kept = storage(experiment)
  kernel = kernels.make(experiment)

  def model() -> Llama:
    return Llama(experiment.model, kernel=kernel, rngs=nnx.Rngs(experiment.seed))

  try:
    abstract_model = nnx.eval_shape(model)
  except ValueError as e:  # a rank or a density that no kernel has
    raise ConfigError(f'kernel {experiment.kernel.name}: {e}') from e
  graphdef, params, fixed = split(abstract_model)
  plan = plan_of(abstract_model)
  each_step = lrjax.step_events(plan)

  def run_events(names: frozenset[str], state: Any, k: jax.Array) -> tuple[Any, Any]:
    """The state after events; they act on weights as stored, and int8 ones have none."""
    if not names:
      return state, {}
    weights = lrjax.Weights(state['params'], state['fixed'], state['opt'])
    new, report = lrjax.run_events(plan, names, weights, k, tx=tx, seed=experiment.seed)
    changed = dict(params=new.params, fixed=new.fixed, opt=new.opt_state)
    return state | changed, report

  def init() -> Any:
    return state_of(*split(model())[1:])

  def start(dense: Any) -> Any:
    key = jax.random.key(experiment.seed)
    return state_of(*lrjax.convert(plan, dense, key)[:2])

  def state_of(params: Any, fixed: Any) -> Any:
    zero = jnp.zeros([], jnp.int32)
    counts = dict(step=zero, skipped=zero, bad=zero)
    stored = kept.encode(params)
    state = dict(params=stored, fixed=fixed, opt=tx.init(params), **counts)
    return run_events(each_step, state, zero)[0]

  def loss(params: Any, fixed: Any, tokens: jax.Array) -> jax.Array:
    logits = nnx.merge(graphdef, params, fixed)(tokens[:, :-1])
    nats, count = next_token_loss(logits, tokens[:, 1:])
    return nats / count

  def step(state: Any, tokens: jax.Array) -> tuple[Any, dict[str, Any]]:
    stored, fixed = state['params'], state['fixed']
    params = kept.decode(stored)
    value, grads = jax.value_and_grad(loss)(params, fixed, tokens)
    norm = global_norm(grads)
    updates, opt = tx.update(grads, state['opt'], params)
    # Only rounding draws from it.
    key = jax.random.fold_in(jax.random.key(experiment.seed), state['step'])
    new = dict(params=kept.move(key, stored, updates), opt=opt)
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
    new, _ = run_events(each_step, new, new['step'])
    health = lrjax.health(new['opt'])
    skipped = new['skipped'] + health['skipped_steps']
    measured = subspaces(new['opt']) if experiment.diagnostics_every else {}
    return new, dict(
      loss=value,
      grad_norm=norm,
      learning_rate=jnp.asarray(rate(new['step'] - 1 - skipped)),
      skipped_steps=skipped,
      bad=new['bad'],
      overdue_refreshes=health['overdue_refreshes'],
      subspaces=measured,
    )

  def evaluate(params: Any, fixed: Any, tokens: jax.Array, mask: jax.Array) -> tuple:
    model = nnx.merge(graphdef, kept.decode(params), lrjax.full_width(fixed))
    logits = model(tokens[:, :-1])
    return next_token_loss(logits, tokens[:, 1:], mask)

  def gradients(params: Any, fixed: Any, tokens: jax.Array) -> Any:
    return jax.grad(loss)(kept.decode(params), fixed, tokens)

  specs = param_specs(params, kernel)
  try:
    opt_specs = lrjax.state_specs(tx, params, specs, mesh)
  except ValueError as e:  # an axis that does not divide a parameter
    raise ConfigError(f'mesh {dict(mesh.shape)}: {e}') from e
  abstract = jax.eval_shape(init)
  whole = lambda tree: jax.tree.map(lambda _: PartitionSpec(), tree)
  state_specs = dict(
    whole(abstract),
    params=kept.specs(params, specs),
    fixed=param_specs(fixed, kernel),
    opt=opt_specs,
  )
  shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), state_specs)
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  batch = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
  everywhere = NamedSharding(mesh, PartitionSpec())

  def jit(f: Callable, *ins: Any, out: Any, donate: tuple = ()) -> Callable:
    return jax.jit(f, in_shardings=ins, out_shardings=out, donate_argnums=donate)

  @functools.cache
  def events(names: frozenset[str]) -> Callable:
    run = lambda state: run_events(names, state, state['step'])
    return jit(run, shardings, out=(shardings, everywhere), donate=(0,))

  weights = shardings['params'], shardings['fixed']
  return Program(
    mesh=mesh,
    batch_sharding=batch,
    state=jax.tree.map(place, abstract, shardings),
    weights=params,
    init=jit(init, out=shardings),
    start=jax.jit(start, out_shardings=shardings),
    step=jit(step, shardings, batch, out=(shardings, everywhere), donate=(0,)),
    evaluate=jit(evaluate, *weights, batch, batch, out=everywhere),
    gradients=jit(gradients, *weights, batch, out=None),
    tx=tx,
    due=functools.partial(lrjax.due_events, plan),
    events=events,
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
