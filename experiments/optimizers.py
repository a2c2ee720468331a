"""The methods an experiment can name, and how a config becomes a transformation."""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import lrjax
from experiments.config import Experiment
from lrjax.types import Lifted
from lrjax.views import VECTORS, leaf_path

StateDtype = Literal['float32', 'bfloat16']
Inner = Literal['adam', 'lion', 'momentum', 'adafactor']
Schedule = optax.ScalarOrSchedule
Method = Callable[..., optax.GradientTransformation]


def adamw(
  learning_rate: Schedule,
  weight_decay: float = 0.0,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  matrix_scale: float = 1.0,
  state_dtype: StateDtype = 'float32',
) -> optax.GradientTransformation:
  """AdamW, both moments of one dtype; `optax.adamw` where that is float32.

  `matrix_scale` slows the matrices that GaLore would project, as its `scale` does: with
  it AdamW has the two learning rates of GaLore, and what differs is the rank alone.
  """
  adam = lrjax.adam(b1, b2, eps, mu_dtype=state_dtype, nu_dtype=state_dtype)
  slow = [] if matrix_scale == 1 else [_slower_matrices(matrix_scale)]
  decay = optax.add_decayed_weights(weight_decay)
  return optax.chain(adam, *slow, decay, optax.scale_by_learning_rate(learning_rate))


def adapt(optimizer: Method, **defaults: Any) -> Method:
  """An optimizer of lrjax as a method, whose options a config can express.

  The options are the scalar parameters of the optimizer under their own names, and

  - `matrix_scale`: a further factor on the updates of hidden matrices, decay included;
  - where it takes a `base_optimizer`: `inner` (none: the method's own) with its `b1`,
    `b2`, `eps` and `state_dtype`; a `basis_dtype` that is not given follows the latter.

  Args:
    optimizer: `x(learning_rate, ..., weight_decay=0.0, ...)`.
    **defaults: of options, where they differ from those of the optimizer.

  Returns:
    A function whose signature `experiments.arguments` reads.
  """
  own = inspect.signature(optimizer, eval_str=True).parameters
  parts = _PARTS if 'base_optimizer' in own else {}

  def method(
    learning_rate: Schedule, weight_decay: float = 0.0, **options: Any
  ) -> optax.GradientTransformation:
    options = defaults | options
    scale = options.pop('matrix_scale', 1.0)
    chosen = {n: options.get(n, takes[n].default) for n in parts}
    extra = {n: options.pop(n) for n in parts if n in options and n not in own}
    if chosen.get('inner'):
      options['base_optimizer'] = inner_optimizer(**chosen)
    elif extra := [n for n, value in extra.items() if value != parts[n].default]:
      raise ValueError(f'{extra[0]} needs `inner`: name the optimizer that it is for')
    if chosen.get('state_dtype', 'float32') != 'float32' and 'basis_dtype' in own:
      options.setdefault('basis_dtype', jnp.dtype(chosen['state_dtype']))
    tx = optimizer(learning_rate, weight_decay=weight_decay, **options)
    return tx if scale == 1 else optax.chain(tx, _slower_matrices(scale))

  takes = parts | {n: p.replace(annotation=_annotation(p)) for n, p in own.items()}
  for name in ('where', 'mask'):  # the model is ours, and so is the choice of leaves
    takes.pop(name, None)
  takes['matrix_scale'] = _parameter('matrix_scale', float, 1.0)
  takes |= {n: takes[n].replace(default=value) for n, value in defaults.items()}
  keywords = [p.replace(kind=p.KEYWORD_ONLY) for p in takes.values()]
  signature = inspect.Signature(keywords)
  vars(method).update(__doc__=optimizer.__doc__, __signature__=signature)
  return method


def _slower_matrices(scale: float) -> optax.GradientTransformation:
  """Multiplies the updates of hidden matrices, and of vectors that belong to kernels."""

  def slowed(path: Any, u: Any) -> Any:
    name = leaf_path(path)
    vector = '/kernel/' in name and name.rpartition('/')[2] in VECTORS
    slow = vector or lrjax.hidden_kernels(name, u)
    # A lifted update is a tree of its own.
    return jax.tree.map(lambda x: scale * x, u) if slow else u

  whole = lambda u: isinstance(u, Lifted)
  return optax.stateless(
    lambda updates, params: jax.tree.map_with_path(slowed, updates, is_leaf=whole)
  )


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
  kind = inspect.Parameter.KEYWORD_ONLY
  return inspect.Parameter(name, kind, default=default, annotation=annotation)


_PARTS = {
  'inner': _parameter('inner', Inner | None, None),
  **{n: inspect.signature(adamw).parameters[n] for n in ('b1', 'b2', 'eps')},
  'state_dtype': inspect.signature(adamw).parameters['state_dtype'],
}


def _annotation(p: inspect.Parameter) -> Any:
  """The annotation, for parameters that lrjax annotates by what optax allows."""
  if p.name == 'rank':
    return int | float
  if p.name.endswith('dtype') and p.annotation is Any:
    return StateDtype | None
  return p.annotation


def inner_optimizer(
  inner: Inner, b1: float, b2: float, eps: float, state_dtype: StateDtype
) -> optax.GradientTransformation:
  """The transformation that runs in the low-rank space."""
  makers: dict[str, Callable[[], optax.GradientTransformation]] = {
    'adam': lambda: lrjax.adam(b1, b2, eps, mu_dtype=state_dtype, nu_dtype=state_dtype),
    'lion': lambda: optax.scale_by_lion(b1, b2, mu_dtype=state_dtype),
    'momentum': lambda: optax.trace(b1, accumulator_dtype=state_dtype),
    'adafactor': lrjax.factored_rms,
  }
  return makers[inner]()


# Defaults that differ from those of lrjax, which has none for some.
_DEFAULTS: dict[str, dict[str, Any]] = {
  'galore': {'inner': 'adam'},
  'golore': {'random_after': 100.0},
}
# Every optimizer of lrjax comes as `x` and `scale_by_x`.
METHODS: dict[str, Method] = {'adamw': adamw} | {
  name: adapt(getattr(lrjax, name), **_DEFAULTS.get(name, {}))
  for name in lrjax.__all__
  if f'scale_by_{name}' in lrjax.__all__
}


def schedule(experiment: Experiment) -> optax.Schedule:
  """Learning rate over steps: linear warm-up from 0, then the config's decay."""
  o, warmup = experiment.optimizer, experiment.warmup
  left = max(experiment.steps - warmup, 1)
  decay = {
    'constant': optax.constant_schedule(o.learning_rate),
    'linear': optax.linear_schedule(
      o.learning_rate, o.final_fraction * o.learning_rate, left
    ),
    'cosine': optax.cosine_decay_schedule(o.learning_rate, left, o.final_fraction),
  }[o.schedule]
  rise = optax.linear_schedule(0.0, o.learning_rate, max(warmup, 1))
  rate = optax.join_schedules([rise, decay], [warmup])
  if o.restart_every is None:
    return rate
  return lrjax.with_restarts(rate, o.restart_every, o.restart_warmup, o.restart_start)


def make(experiment: Experiment) -> optax.GradientTransformation:
  """The whole transformation of an experiment: penalty, clip, then the method."""
  o = experiment.optimizer
  method = METHODS[o.name]
  own = inspect.signature(method).parameters
  common = dict(seed=experiment.seed, diagnostics=experiment.diagnostics_every or None)
  tx = method(
    schedule(experiment),
    weight_decay=o.weight_decay,
    **{name: value for name, value in common.items() if name in own},
    **o.options,
  )
  clip = [optax.clip_by_global_norm(o.clip)] if o.clip else []
  decay = [lrjax.frobenius_decay(o.frobenius_decay)] if o.frobenius_decay else []
  return optax.chain(*decay, *clip, tx)


def update_gap(experiment: Experiment) -> int | None:
  """Steps between refreshes of all bases together; None where there is no such gap."""
  o = experiment.optimizer
  parameters = inspect.signature(METHODS[o.name]).parameters
  options = {name: p.default for name, p in parameters.items()} | {**o.options}
  return None if options.get('stagger') else options.get('update_proj_gap')
