"""Flax layers over the functions of `lrjax.s4d`: NNX and linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from lrjax.modules import linen
from lrjax.modules.nnx import Dense
from lrjax.parameterizations.dense import dense
from lrjax.s4d import Discretization, s4d_convolve, s4d_step
from lrjax.s4d_starts import Init, s4d_init
from lrjax.types import Parameterization

_DENSE = dense()


class S4D(nnx.Module):
  """An S4D block, causal: y = GLU(gelu(ssm(u)) W), W (H, 2 H) any parameterization.

  The state spaces' arrays are at `ssm/<name>`, see `lrjax.s4d_init`, and W at
  `glu/kernel`. The block of the paper without dropout and bias.

  Args:
    features: H.
    state: N, numbers of the state of each feature.
    init: start of A.
    discretization: how steps are taken.
    kernel: parameterization of W.
    dtype: what W is applied in; None: as inputs come. The state spaces are computed in
      float32 at least.
    param_dtype: dtype of the stored arrays.
    rngs: its `params` stream draws them.

  Examples:
    >>> from flax import nnx
    >>> layer = S4D(3, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 10, 3))).shape
    (2, 10, 3)
    >>> state, y = layer.step(jnp.zeros((2, 3, 32, 2)), jnp.ones((2, 3)))
    >>> y.shape
    (2, 3)
  """

  def __init__(
    self,
    features: int,
    *,
    state: int = 64,
    init: Init = 'lin',
    discretization: Discretization = 'zoh',
    kernel: Parameterization = _DENSE,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    arrays = s4d_init(rngs.params(), features, state, init, dtype=param_dtype)
    self.ssm = nnx.Dict({name: nnx.Param(x) for name, x in arrays.items()})
    self.glu = Dense(
      features,
      2 * features,
      kernel=kernel,
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )
    self.discretization: Discretization = discretization

  def __call__(self, u: jax.Array) -> jax.Array:
    """Maps u (..., L, H) to (..., L, H)."""
    y = s4d_convolve(self._arrays(), u, discretization=self.discretization)
    return _gate(self.glu(jax.nn.gelu(y, approximate=False)))

  def step(self, state: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One position: u (..., H), state (..., H, N/2, 2), to `(state, y)`."""
    state, y = s4d_step(self._arrays(), state, u, self.discretization)
    return state, _gate(self.glu(jax.nn.gelu(y, approximate=False)))

  def _arrays(self):
    return {name: x[...] for name, x in self.ssm.items()}


class LinenS4D(nn.Module):
  """The block of `S4D` in linen, with the same names of parameters.

  Attributes:
    state: N, numbers of the state of each feature.
    init_a: start of A.
    discretization: how steps are taken.
    kernel: parameterization of W.
    dtype: what W is applied in; None: as inputs come.
    param_dtype: dtype of the stored arrays.

  Examples:
    >>> variables = LinenS4D().init(jax.random.key(0), jnp.ones((10, 3)))
    >>> jax.tree.map(jnp.shape, variables['params']['glu'])
    {'kernel': (3, 6)}
  """

  state: int = 64
  init_a: Init = 'lin'
  discretization: Discretization = 'zoh'
  kernel: Parameterization = _DENSE
  dtype: jax.typing.DTypeLike | None = None
  param_dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, u: jax.Array) -> jax.Array:
    """Maps u (..., L, H) to (..., L, H)."""
    H = u.shape[-1]
    draw = lambda key: s4d_init(key, H, self.state, self.init_a, dtype=self.param_dtype)
    arrays = self.param('ssm', draw)
    y = s4d_convolve(arrays, u, discretization=self.discretization)
    glu = linen.Dense(2 * H, self.kernel, self.dtype, self.param_dtype, name='glu')
    return _gate(glu(jax.nn.gelu(y, approximate=False)))


def _gate(x):
  """The first half, times the sigmoid of the second."""
  a, b = jnp.split(x, 2, axis=-1)
  return a * jax.nn.sigmoid(b)
