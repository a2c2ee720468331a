"""What every ready-to-use optimizer adds to its rule."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypedDict, TypeVar

import jax
import jax.numpy as jnp
import optax

from lrjax.checks import finite
from lrjax.matrices import nodes, on_matrices
from lrjax.sampling import COUNTED
from lrjax.types import Lifted
from lrjax.views import Where

P = ParamSpec('P')
T = TypeVar('T')


class Lift(TypedDict, total=False):
  """Keywords that every `scale_by_*` hands to `lrjax.on_matrices`; see there."""

  side: str
  where: Where | None
  weight_dimension_numbers: Any
  seed: int
  guard: str
  diagnostics: int | None


class Ready(Protocol):
  """What `ready` returns."""

  def __call__(
    self,
    learning_rate: optax.ScalarOrSchedule,
    *args: Any,
    weight_decay: float = 0.0,
    mask: Any = None,
    **kwargs: Any,
  ) -> optax.GradientTransformationExtraArgs: ...


def lifted(scale_by: Callable[P, T]) -> Callable[P, T]:
  """Spells `**lift: Unpack[Lift]` out in a function's signature, with defaults.

  `optax.inject_hyperparams` and configs read signatures; docs and errors gain too.
  """
  signature = inspect.signature(scale_by)
  own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
  known = inspect.signature(on_matrices).parameters
  more = [known[name] for name in Lift.__annotations__ if name in known]
  more = [p for p in more if p.name not in signature.parameters]
  spelled = signature.replace(parameters=[*own, *more])

  @functools.wraps(scale_by)
  def checked(*args: P.args, **kwargs: P.kwargs) -> T:
    spelled.bind(*args, **kwargs)
    return scale_by(*args, **kwargs)

  checked.__signature__ = spelled  # pyrefly: ignore
  return checked


def ready(scale_by: Callable[..., optax.GradientTransformation]) -> Ready:
  """The optimizer `x` of a rule `scale_by_x`: decoupled weight decay, learning rate.

  Args:
    scale_by: makes the rule; its name starts with `scale_by_`.

  Returns:
    `x(learning_rate, <arguments of scale_by>, weight_decay=0.0, mask=None)`, whose
    learning rate is a number or a schedule, whose weight decay acts in full space times
    the learning rate, on the leaves that `mask` chooses. Under
    `optax.inject_hyperparams` name ints that fix shapes, and functions that are no
    schedules, in `static_args`.
  """
  signature = inspect.signature(scale_by)
  name = scale_by.__name__.removeprefix('scale_by_')

  def make(
    learning_rate: optax.ScalarOrSchedule,
    *args: Any,
    weight_decay: float = 0.0,
    mask: Any = None,
    **kwargs: Any,
  ) -> optax.GradientTransformationExtraArgs:
    return assemble(scale_by(*args, **kwargs), learning_rate, weight_decay, mask)

  plain, keyword = (
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
  )
  before = [inspect.Parameter('learning_rate', plain)]
  after = [
    inspect.Parameter('weight_decay', keyword, default=0.0),
    inspect.Parameter('mask', keyword, default=None),
  ]
  make.__name__ = make.__qualname__ = name
  make.__module__ = scale_by.__module__
  make.__signature__ = signature.replace(  # pyrefly: ignore
    parameters=[*before, *signature.parameters.values(), *after]
  )
  first = (scale_by.__doc__ or '').partition('\n')[0]
  make.__doc__ = f"""{first}

  Ready to use: `{scale_by.__name__}`, decoupled weight decay, learning rate.

  Args:
    learning_rate: a number or a schedule.
    weight_decay: strength of decoupled decay, in full space, times the learning rate.
    mask: which leaves decay: a tree of bools or a function from params to one.
    others: see `{scale_by.__name__}`.

  Returns:
    An `optax.GradientTransformationExtraArgs`.
  """
  return make


def assemble(
  rule: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: float = 0.0,
  mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """A rule, then decoupled weight decay in full space, then the learning rate.

  On a step the rule does not take, weights do not decay and schedules stand still.

  Args:
    rule: a transformation made by `on_matrices` or `sampled_layers`, without learning rate.
    learning_rate: a number or a schedule.
    weight_decay: strength of the decay, times the learning rate; 0 leaves it out, and
      with it the need for params at `update`.
    mask: which leaves decay: a tree of bools or a function from params to one.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError, TypeError: if a number is negative, not finite, or not a number.
  """
  if not callable(learning_rate):
    finite('learning_rate', learning_rate)
  finite('weight_decay', weight_decay)
  decay = []
  if not isinstance(weight_decay, (int, float)) or weight_decay > 0:
    decay = [_decayed_weights(weight_decay, mask)]
  rule = optax.with_extra_args_support(rule)
  tail = optax.chain(*decay, optax.scale_by_learning_rate(learning_rate))

  def init(params: Any) -> tuple:
    return rule.init(params), tail.init(params)

  def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple:
    u, rule_state = rule.update(updates, state[0], params, **extra)
    out, tail_state = tail.update(u, state[1], params, **extra)
    old, new = (nodes(s, COUNTED)[0].count for s in (state[0], rule_state))
    taken = old != new
    out = jax.tree.map(lambda x: jnp.where(taken, x, 0), out)
    held = jax.tree.map(lambda n, o: jnp.where(taken, n, o), tail_state, state[1])
    return out, (rule_state, held)

  return optax.GradientTransformationExtraArgs(init, update)


def _decayed_weights(weight_decay: Any, mask: Any) -> optax.GradientTransformation:
  """`optax.add_decayed_weights`, which knows updates that are not formed."""
  plain = optax.add_decayed_weights(weight_decay, mask)

  def add(u: Any, w: jax.Array, chosen: bool = True) -> Any:
    if not chosen:
      return u
    if isinstance(u, Lifted):
      return dataclasses.replace(u, decay=u.decay + weight_decay)
    return u + jnp.asarray(weight_decay * w, u.dtype)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    is_lifted = lambda x: isinstance(x, Lifted)
    if not any(map(is_lifted, jax.tree.leaves(updates, is_leaf=is_lifted))):
      return plain.update(updates, state, params)
    chosen = mask(params) if callable(mask) else mask
    trees = (params,) if mask is None else (params, chosen)
    return jax.tree.map(add, updates, *trees, is_leaf=is_lifted), state

  return optax.GradientTransformation(plain.init, update)
