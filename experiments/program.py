"""The compiled parts of a run, and where its arrays live on a mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import lrjax
from experiments.computation import Computation
from experiments.config import Experiment
from experiments.errors import ConfigError
from lrjax.models.llama_params import param_specs


class Program(NamedTuple):
  """The compiled parts of one experiment.

  Attributes:
    mesh: of devices, axes data, fsdp, tensor.
    batch_sharding: of token arrays (batch, positions).
    state: the state's tree of `ShapeDtypeStruct`s with shardings, see `Computation`.
    weights: the tree of `ShapeDtypeStruct`s of the weights in a step.
    init: `() -> state`.
    start: `params with dense kernels -> state`.
    step: jitted `(state, tokens) -> (state, metrics)`; donates the state.
    projected_step: the same for steps at which `lrjax.wants_gradient` is false; None if
      the config does not ask for it.
    refresh: jitted `(state, tokens) -> state`, ahead of projected steps at all others, in
      the place of `step`; None if the config does not ask for it.
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
  projected_step: Any
  refresh: Any
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


def build(experiment: Experiment, mesh: Mesh | None = None) -> Program:
  """Everything an experiment computes; nothing is compiled or allocated yet.

  Args:
    experiment: the config.
    mesh: of other devices than those at hand, to compile for them; none: `make_mesh`.
  """
  mesh = make_mesh(experiment) if mesh is None else mesh
  c = Computation(experiment, mesh)
  abstract = jax.eval_shape(c.init)
  specs = _state_specs(c, abstract, mesh)
  shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  batch = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
  everywhere = NamedSharding(mesh, PartitionSpec())

  def jit(f: Callable, *ins: Any, out: Any, donate: tuple = ()) -> Callable:
    return jax.jit(f, in_shardings=ins, out_shardings=out, donate_argnums=donate)

  step = functools.partial(jit, out=(shardings, everywhere), donate=(0,))

  @functools.cache
  def events(names: frozenset[str]) -> Callable:
    return step(lambda state: c.run_events(names, state, state['step']), shardings)

  projected = experiment.optimizer.projected_backward
  if projected:
    _check_projected(c, abstract)
  weights = shardings['params'], shardings['fixed']
  refresh = jit(c.refresh, shardings, batch, out=shardings, donate=(0,))
  return Program(
    mesh=mesh,
    batch_sharding=batch,
    state=jax.tree.map(place, abstract, shardings),
    weights=c.params,
    init=jit(c.init, out=shardings),
    start=jax.jit(c.start, out_shardings=shardings),
    step=step(c.step, shardings, batch),
    projected_step=step(c.projected_step, shardings, batch) if projected else None,
    refresh=refresh if experiment.optimizer.sketched_refresh else None,
    evaluate=jit(c.evaluate, *weights, batch, batch, out=everywhere),
    gradients=jit(c.gradients, *weights, batch, out=None),
    tx=c.tx,
    due=functools.partial(lrjax.due_events, c.plan),
    events=events,
  )


def _check_projected(c: Computation, abstract: Any) -> None:
  """Raises ConfigError where method or kernel cannot do with projected gradients."""
  o, kernel, data = (getattr(c.experiment, x) for x in ('optimizer', 'kernel', 'data'))
  if not lrjax.projectable(c.tx, c.params):
    raise ConfigError(
      f'optimizer.projected_backward: {o.name} with these options needs all gradients in'
      f' full, or projects nothing of kernel {kernel.name}'
    )
  tokens = jax.ShapeDtypeStruct((data.batch_size, data.seq_len + 1), 'int32')
  if o.sketched_refresh:
    try:
      jax.eval_shape(
        lrjax.sketched_refresh(lambda *_: 0.0, c.tx), c.params, abstract['opt']
      )
    except TypeError as e:
      raise ConfigError(f'optimizer.sketched_refresh: {e}') from e
  try:
    jax.eval_shape(c.projected_step, abstract, tokens)
  except TypeError as e:
    raise ConfigError(
      f'optimizer.projected_backward: kernel {kernel.name} does more with its arrays than'
      f' multiply by them: {e}'
    ) from e


def _state_specs(c: Computation, abstract: Any, mesh: Mesh) -> Any:
  """The partition specs of a run's state."""
  whole = jax.tree.map(lambda _: PartitionSpec(), abstract)
  return dict(
    whole,
    params=c.storage.specs(c.params, c.specs),
    fixed=param_specs(c.fixed, c.kernel),
    opt=lrjax.state_specs(c.tx, c.params, c.specs, mesh),
  )
