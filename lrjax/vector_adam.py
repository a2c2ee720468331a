"""Adam for factors whose vectors start anew one at a time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lrjax.checks import finite
from lrjax.views import leaf_path


class VectorAdamState(NamedTuple):
  """Counts of updates, one for each factor vector, first and second moments."""

  vector_count: Any
  mu: Any
  nu: Any


def scale_by_vector_adam(
  b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
  r"""Adam with a bias correction of its own for each column of a and each row of b.

  .. math::
    M \leftarrow b_1 M + (1 - b_1) G, \quad V \leftarrow b_2 V + (1 - b_2) G^2, \quad
    U_{:,i} = \frac{M_{:,i} / (1 - b_1^{t_i})}
    {\sqrt{V_{:,i} / (1 - b_2^{t_i})} + \epsilon}

  with :math:`t_i` the updates since vector i started. Events that reset single vectors,
  such as those of `lrjax.switchlora`, reset its count too. While all counts are equal it
  is `optax.scale_by_adam`. A vector that is frozen for N = 5 updates still counts: its
  first step is then 0.522 of the learning rate, and that of a vector which is not
  frozen 1; with one count for the whole matrix it were up to 3.2.

  State: two moments, and r counts for each factor. Leaves named `a` (..., in, r) and `b`
  (..., r, out) have counts of shape (..., 1, r) and (..., r, 1), all others one.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.

  Returns:
    An `optax.GradientTransformation`, without learning rate.

  Raises:
    ValueError, TypeError: for decays outside [0, 1) or a negative eps.

  References:
    Zhou et al., `SwitchLoRA <https://arxiv.org/abs/2406.06564>`_, 2024

  >>> params = {'a': jnp.ones((4, 2)), 'b': jnp.ones((2, 3))}
  >>> jax.tree.map(jnp.shape, scale_by_vector_adam().init(params).vector_count)
  {'a': (1, 2), 'b': (2, 1)}
  """
  finite('b1', b1, below=1.0)
  finite('b2', b2, below=1.0)
  finite('eps', eps)
  wide = lambda x: jnp.promote_types(x.dtype, jnp.float32)

  def init(params: Any) -> VectorAdamState:
    counts = lambda path, x: jnp.zeros(_count_shape(leaf_path(path), x), jnp.int32)
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=wide(x)), params)
    return VectorAdamState(jax.tree.map_with_path(counts, params), zeros, zeros)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    count = jax.tree.map(optax.safe_increment, state.vector_count)
    blend = lambda b, m, g: b * m + (1 - b) * g
    grads = jax.tree.map(lambda g: g.astype(wide(g)), updates)
    mu = jax.tree.map(lambda g, m: blend(b1, m, g), grads, state.mu)
    nu = jax.tree.map(lambda g, v: blend(b2, v, g**2), grads, state.nu)

    def direction(g: jax.Array, t: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
      u = (m / (1 - b1**t)) / (jnp.sqrt(v / (1 - b2**t)) + eps)
      return u.astype(g.dtype)

    out = jax.tree.map(direction, updates, count, mu, nu)
    return out, VectorAdamState(count, mu, nu)

  return optax.GradientTransformation(init, update)


def vector_adam(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  *,
  weight_decay: float = 0.0,
  mask: Any = None,
) -> optax.GradientTransformation:
  """`scale_by_vector_adam`, decoupled weight decay, learning rate.

  Args:
    learning_rate: a number or a schedule.
    b1: see `scale_by_vector_adam`.
    b2: see there.
    eps: see there.
    weight_decay: strength of decoupled decay, times the learning rate.
    mask: which leaves decay: a tree of bools or a function from params to one.

  Returns:
    An `optax.GradientTransformation`.

  >>> tx = vector_adam(0.1)
  >>> grads = {'a': jnp.ones((2, 1))}
  >>> updates, _ = tx.update(grads, tx.init(grads), grads)
  >>> [round(float(u), 3) for u in updates['a'][:, 0]]
  [-0.1, -0.1]
  """
  return optax.chain(
    scale_by_vector_adam(b1, b2, eps),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def _count_shape(path: str, x: Any) -> tuple[int, ...]:
  name = path.rpartition('/')[2]
  if x.ndim < 2 or name not in ('a', 'b'):
    return ()
  *stack, rows, columns = x.shape
  return (*stack, 1, columns) if name == 'a' else (*stack, rows, 1)
