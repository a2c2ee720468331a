"""Projection, moments and bias correction of Adam in one: R is never written out."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lrjax.checks import closest
from lrjax.kernels import blocks, stored
from lrjax.kernels.blocks import Side
from lrjax.kernels.dispatch import Operation, dispatch
from lrjax.kernels.project import gpu_sum, tpu_add
from lrjax.kernels.stored import Form
from lrjax.kernels.tiles import Tile
from lrjax.moments import BiasCorrection, late_correction

CORRECTIONS = ('moments', 'step', 'none')


def low_rank_adam(
  p: Any,
  g: jax.Array,
  mu: jax.Array,
  nu: jax.Array,
  count: jax.Array,
  *,
  b1: Any = 0.9,
  b2: Any = 0.999,
  eps: Any = 1e-8,
  bias_correction: BiasCorrection = 'moments',
  side: Side = 'in',
  bits: int = 8,
  group: int = 256,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  r"""What `lrjax.adam` makes of a projected gradient.

  .. math::
    R = P^\top G, \quad M \leftarrow b_1 M + (1 - b_1) R, \quad
    V \leftarrow b_2 V + (1 - b_2) R^2

  .. math:: N = (M / c_1) / (\sqrt{V / c_2} + \epsilon), \quad c_i = 1 - b_i^t

  or as `bias_correction` says, see `lrjax.adam`. G is read once, the moments are read and
  written once and in place if they are donated. Where and how checked: as
  `lrjax.kernels.project`.

  Args:
    p: P (d, r), as in `lrjax.kernels.project`.
    g: the gradient as its leaf lies.
    mu: M (r, k), stored in any floating-point type; the arithmetic is in float32.
    nu: V (r, k), likewise.
    count: int32[], updates before this one, t - 1.
    b1: decay of the first moment; may be traced, as those below.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    bias_correction: 'moments', 'step' or 'none'.
    side: which axis of the leaf is compressed.
    bits: those of the `lrjax.affine` that stored P.
    group: likewise.
    implementation: see `lrjax.kernels.dispatch`.

  Returns:
    N (r, k) in float32 or wider, and the new M and V.

  Raises:
    ValueError: as `lrjax.kernels.project`; for moments of another shape, and an unknown
      `bias_correction`.
    TypeError: for a basis stored in another form.

  >>> p, g, zeros = jnp.eye(3, 2), jnp.ones((3, 2)), jnp.zeros((2, 2))
  >>> n, mu, nu = low_rank_adam(p, g, zeros, zeros, jnp.int32(0))
  >>> print(n.round(3), mu[0, 0], nu[0, 0])
  [[1. 1.]
   [1. 1.]] 0.1 0.001
  """
  form, shape = stored.read(p, bits, group)
  sizes = blocks.sizes_of(shape, g.shape, side)
  want = (sizes['r'], sizes['k'])
  if mu.shape != want or nu.shape != want:
    raise ValueError(f'moments must be (r, k) = {want}, got {mu.shape} and {nu.shape}')
  if bias_correction not in CORRECTIONS:
    raise ValueError(
      f'unknown `bias_correction` {bias_correction!r};'
      f' {closest(str(bias_correction), CORRECTIONS)}'
    )
  numbers = _numbers(count, b1, b2, eps, bias_correction)
  numbers = numbers.astype(jnp.promote_types(g.dtype, jnp.float32))
  arrays = (p, g, mu, nu, numbers)
  return dispatch(ADAM, implementation, sizes, g.dtype, *arrays, side=side, form=form)


def _numbers(count: Any, b1: Any, b2: Any, eps: Any, bias_correction: str) -> jax.Array:
  """b1, 1 - b1, b2, 1 - b2, eps and the factors of M and V in N, as one row."""
  t = count + 1
  of_m, of_v = 1.0, 1.0
  if bias_correction == 'moments':
    of_m, of_v = 1 / (1 - b1**t), 1 / (1 - b2**t)
  elif bias_correction == 'step':
    of_m = late_correction(t, b1, b2)
  numbers = (b1, 1 - b1, b2, 1 - b2, eps, of_m, of_v)
  return jnp.stack([jnp.asarray(x, jnp.float32) for x in numbers])[None]


def _step(low: jax.Array, mu: Any, nu: Any, numbers: Any) -> tuple:
  """(N, M, V) from R and the old moments; entry by entry, so also of a block."""
  b1, one_b1, b2, one_b2, eps, of_m, of_v = (numbers[0, i] for i in range(7))
  m = b1 * mu.astype(low.dtype) + one_b1 * low
  v = b2 * nu.astype(low.dtype) + one_b2 * (low * low)
  n = (of_m * m) / (jnp.sqrt(of_v * v) + eps)
  return n, m.astype(mu.dtype), v.astype(nu.dtype)


def _xla(
  p: Any, g: Any, mu: Any, nu: Any, numbers: Any, *, side: Side, form: Form
) -> tuple:
  return _step(blocks.down(stored.decode(p, form), g, side), mu, nu, numbers)


def _tpu(
  p: Any,
  g: Any,
  mu: Any,
  nu: Any,
  numbers: Any,
  *,
  side: Side,
  form: Form,
  tile: Tile,
  interpret: Any,
) -> tuple:
  (d, k), r = blocks.along(side, *g.shape), mu.shape[0]
  bd, bk = min(tile['d'], d), min(tile['k'], k)
  basis = stored.tpu_operands(p, form)
  low = pl.BlockSpec((r, bk), lambda j, i: (0, j))
  return pl.pallas_call(
    functools.partial(_tpu_kernel, side=side, form=form, d=d),
    out_shape=_results(mu, nu),
    grid=(pl.cdiv(k, bk), pl.cdiv(d, bd)),
    in_specs=[
      *stored.tpu_specs(basis, bd, lambda j, i: i),
      blocks.leaf_spec(side, bd, bk, lambda j, i: (i, j)),
      low,
      low,
      blocks.scalars_spec(numbers),
    ],
    out_specs=[low] * 3,
    input_output_aliases={len(basis) + 1: 1, len(basis) + 2: 2},
    compiler_params=blocks.tpu_params('parallel', 'arbitrary'),
    interpret=interpret,
  )(*basis, g, mu, nu, numbers)


def _tpu_kernel(*refs: Any, side: Side, form: Form, d: int) -> None:
  *p_refs, g_ref, mu_ref, nu_ref, numbers_ref, n_ref, m_ref, v_ref = refs
  i = pl.program_id(1)

  @pl.when(i == 0)
  def _():
    n_ref[...] = jnp.zeros_like(n_ref)

  tpu_add(p_refs, g_ref, n_ref, side, form, d)

  @pl.when(i == pl.num_programs(1) - 1)
  def _():
    results = _step(n_ref[...], mu_ref[...], nu_ref[...], numbers_ref)
    n_ref[...], m_ref[...], v_ref[...] = results


def _gpu(
  p: Any,
  g: Any,
  mu: Any,
  nu: Any,
  numbers: Any,
  *,
  side: Side,
  form: Form,
  tile: Tile,
  interpret: Any,
) -> tuple:
  basis = stored.operands(p, form)
  r, k = mu.shape
  return pl.pallas_call(
    functools.partial(_gpu_kernel, side=side, form=form, tile=tile),
    out_shape=_results(mu, nu),
    grid=(pl.cdiv(k, tile['k']), pl.cdiv(r, tile['r'])),
    input_output_aliases={len(basis) + 1: 1, len(basis) + 2: 2},
    compiler_params=blocks.gpu_params(),
    interpret=interpret,
  )(*basis, g, mu, nu, numbers)


def _gpu_kernel(*refs: Any, side: Side, form: Form, tile: Tile) -> None:
  *p_refs, g_ref, mu_ref, nu_ref, numbers_ref, n_ref, m_ref, v_ref = refs
  ks = blocks.span(pl.program_id(0), tile['k'])
  rs = blocks.span(pl.program_id(1), tile['r'])
  low = gpu_sum(p_refs, g_ref, rs, ks, side, form, tile)
  mu, nu = blocks.read(mu_ref, rs, ks), blocks.read(nu_ref, rs, ks)
  for ref, x in zip((n_ref, m_ref, v_ref), _step(low, mu, nu, numbers_ref)):
    blocks.store(ref, rs, ks, x)


def _results(mu: jax.Array, nu: jax.Array) -> list[jax.ShapeDtypeStruct]:
  n = jax.ShapeDtypeStruct(mu.shape, jnp.float32)
  return [n, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (mu, nu))]


def _fits(platform: str, tile: Tile, sizes: Any, *, form: Form, **options: Any) -> bool:
  if not stored.readable(form, platform, sizes['r']):
    return False
  d, k, r = tile['d'], tile['k'], tile.get('r', sizes['r'])
  basis = stored.words(form) * d * r
  if platform == 'gpu':
    return 4 * blocks.STAGES * (basis + d * k) <= blocks.SHARED
  # Of (r, k) there are N, and the moments before and after.
  return 4 * (basis + d * k + 5 * r * k) <= blocks.VMEM


ADAM = Operation('low_rank_adam', _xla, _tpu, _gpu, _fits)
