"""Any optimizer with its moments stored in 8 bits (Dettmers et al., 2022)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lrjax.codecs.dynamic import Dynamic8, dynamic8, widened
from lrjax.roles import FACTORED, NON_NEGATIVE, SIGNED, map_moments
from lrjax.sharding import outside_explicit


def eight_bit(
  inner: optax.GradientTransformation, *, block: int = 256, min_size: int = 4096
) -> optax.GradientTransformationExtraArgs:
  """Stores the moments of an optimizer as 8-bit codes with a scale for each block.

  At every step moments are decoded to float32, the inner optimizer runs on them, and they
  are rounded to the nearest code again, see `lrjax.dynamic8`. Second moments that are
  positive stay positive. A moment of n numbers takes `n + 4 ceil(n / block)` bytes instead
  of `4 n`; steps are off by about one percent of their size.

  Choose it wherever moments weigh: it serves as the inner optimizer of low-rank methods,
  as `base_optimizer` of `lrjax.galore` for example, and on its own.

  Args:
    inner: any transformation whose moments have names known to `lrjax.roles`: Adam,
      AMSGrad, Lion, momentum, Adafactor and their like, alone or in a chain.
    block: numbers that share a scale, a power of two.
    min_size: arrays with fewer numbers stay as they are: biases and norms matter more
      than they weigh.

  Returns:
    An `optax.GradientTransformationExtraArgs`; its state is that of `inner` with a
    `Dynamic8` in place of each array that is stored.

  Raises:
    ValueError: if `inner` keeps floating-point arrays of the gradient's size that it does
      not know, naming state and field.

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2022

  >>> tx = eight_bit(optax.scale_by_adam())
  >>> state = tx.init(jnp.ones((64, 64)))
  >>> state.mu.codes.dtype, state.nu.scale.shape
  (dtype('uint8'), (16,))
  """
  signed, non_negative = dynamic8(True, block), dynamic8(False, block)
  _check_roles(inner)
  inner = optax.with_extra_args_support(inner)

  def encoded(codec: Any) -> Callable:
    def one(x: jax.Array) -> Any:
      if x.size < min_size or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
      # Blocks know no mesh: placed like the moment, scales on every device.
      place = Dynamic8(x, jnp.zeros([]))  # pyrefly: ignore
      return outside_explicit(codec.encode, place)(x)

    return lambda moment: jax.tree.map(one, moment)

  def init(params: Any) -> Any:
    return _map(inner.init(params), encoded(signed), encoded(non_negative))

  def update(
    updates: Any, state: Any, params: Any = None, **extra: Any
  ) -> tuple[Any, Any]:
    def step(updates: Any, state: Any, params: Any, extra: dict) -> tuple[Any, Any]:
      wide = _map(state, decoded(True), decoded(False))
      out, new = inner.update(updates, wide, params, **extra)
      return out, _map(new, encoded(signed), encoded(non_negative))

    return outside_explicit(step, (updates, state))(updates, state, params, extra)

  return optax.GradientTransformationExtraArgs(init, update)


def decoded(signed: bool) -> Callable:
  """A map of moments to arrays, decoded where they are stored in 8 bits."""
  stored = lambda x: isinstance(x, Dynamic8)
  return lambda moment: jax.tree.map(
    lambda x: widened(x, signed), moment, is_leaf=stored
  )


def _map(state: Any, signed: Callable, non_negative: Callable) -> Any:
  return map_moments(state, signed, non_negative, factored=non_negative)


def _check_roles(inner: optax.GradientTransformation) -> None:
  """Raises ValueError where the state of `inner` grows by a field of unknown role."""
  if not hasattr(inner, 'init') or not hasattr(inner, 'update'):
    raise TypeError(f'eight_bit wraps an optax.GradientTransformation, got {inner!r}')
  unknown: list[tuple[str, str, Any]] = []

  def note(owner: type, name: str, x: Any) -> Any:
    unknown.append((owner.__name__, name, x))
    return x

  same = lambda x: x
  sizes = []
  for shape in ((2, 3), (4, 6)):
    unknown.clear()
    probe = jax.ShapeDtypeStruct(shape, jnp.float32)
    map_moments(jax.eval_shape(inner.init, probe), same, same, note)
    sizes.append([(*x, _floats(x[2])) for x in unknown])
  for (owner, name, _, small), (*_, large) in zip(*sizes):
    if large > small:
      known = ', '.join(sorted(SIGNED | NON_NEGATIVE | FACTORED))
      raise ValueError(
        f'eight_bit does not know what `{name}` of {owner} holds, signed or non-negative'
        f' numbers; it knows {known}. Leave this optimizer in float32, or keep this part'
        ' outside'
      )


def _floats(tree: Any) -> int:
  """How many floating-point numbers a tree holds."""
  return sum(
    x.size for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)
  )
