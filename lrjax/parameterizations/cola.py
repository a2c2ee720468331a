"""CoLA: a nonlinearity between the two factors of every kernel.

Liu et al., "CoLA: Compute-Efficient Pre-Training of LLMs via Low-Rank Activation",
2025, arXiv 2502.10940.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from lrjax.parameterizations import factors
from lrjax.parameterizations.factors import value
from lrjax.types import Parameterization, Split

# Those with act(z) - act(-z) = z, by which a dense import is exact.
_ACTS = {None: lambda z: z} | {n: factors.ACTS[n] for n in ('silu', 'relu', 'gelu')}


@value
def cola(
  rank: int, act: Literal['silu', 'relu', 'gelu'] | None = 'silu'
) -> Parameterization:
  r"""y = act(x a) b with a (in, r) and b (r, out).

  Start: a and b normal of variance :math:`(r (in + out))^{-1/2}`, so that ab has
  entries of variance 1 / (in + out).

  Memory: r (in + out) weights, and as many of each moment. Multiplications 2 r
  (in + out) a token, forward. Training keeps in + 2 r + out numbers a token and kernel;
  with `LlamaConfig(remat='low_rank')` (CoLA-M), of the same parameters and the same
  function, a layer keeps 7 r and twice the residual stream.

  The dense import has units in pairs, because act(z) - act(-z) = z for all three: a is
  (a', -a') and b is (b'; -b') with a'b' the best approximation of rank r // 2, and the
  function is linear, exactly, until training moves it. The last unit of an odd r has
  b = 0.

  Choose it when half the compute of full rank is the aim, at r = hidden / 4: there its
  paper reports the perplexity of full rank, at learning rates, steps, clipping and
  weight decay that its baselines did not have. Not where kernels have to be merged,
  exported or changed in rank later: no matrix stands for the map. At small budgets,
  10 to 30 % of the weights, comparisons by others have it behind sparse plus low-rank.
  LLaMA's own SiLU in the gated layer stays at 60M and 130M and is dropped from 350M on:
  `LlamaConfig(gate_act='none')`. The published runs have AdamW with weight decay 0.01,
  gradients clipped at 0.5, and rates from 6e-3 (60M) to 2e-3 (1B).

  Args:
    rank: r, at most min(in, out). The paper has a quarter of the hidden size.
    act: what is between the factors; None: nothing, and the map is linear.

  Returns:
    A Parameterization. Without `materialize`, unless `act` is None.

  Raises:
    ValueError: for an unknown `act`, or at `init` for a rank that does not fit.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> W = cola(2).init(jax.random.key(0), (4, 3), jnp.float32)
    >>> cola(2).apply(W, jnp.ones((5, 4))).shape
    (5, 3)
  """
  if act not in _ACTS:
    raise ValueError(f'`act` must be one of {", ".join(map(repr, _ACTS))}, got {act!r}')
  between = _ACTS[act]

  def init(key: jax.Array, shape: tuple, dtype: jax.typing.DTypeLike) -> Split:
    r = factors.check_rank(rank, shape)
    std = (r * sum(shape)) ** -0.25
    ka, kb = jax.random.split(key)
    a = std * jax.random.normal(ka, (shape[0], r))
    b = std * jax.random.normal(kb, (r, shape[1]))
    return Split({'a': a.astype(dtype), 'b': b.astype(dtype)})

  def from_dense(key: jax.Array, W: jax.Array) -> tuple[Split, jax.Array]:
    r = factors.check_rank(rank, W.shape)
    a, b = factors.spectral(W, r) if act is None else _pairs(W, r)
    split = Split({'a': a.astype(W.dtype), 'b': b.astype(W.dtype)})
    half = r if act is None else r // 2
    return split, factors.relative_error(W, a[:, :half] @ b[:half])

  return Parameterization(
    init=init,
    from_dense=from_dense,
    apply=lambda s, x: between(factors.down(x, s.train['a'])) @ s.train['b'],
    materialize=(
      (lambda s: factors.product(s.train['a'], s.train['b'])) if act is None else None
    ),
    axes={'a': ('in', None), 'b': (None, 'out')},
  )


def _pairs(W: jax.Array, r: int) -> tuple[jax.Array, jax.Array]:
  """Units of opposite sign, whose nonlinearities cancel."""
  half, odd = divmod(r, 2)
  a, b = factors.spectral(W, half + odd)
  # A unit without a partner would bend the function, so it starts at nothing.
  b = b.at[half:].set(0)
  return jnp.concatenate([a, -a[:, :half]], 1), jnp.concatenate([b, -b[:half]])
