"""W <- W - rate (scale P N + decay W): W read and written once, P N never written out."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lrjax.kernels import blocks, rounding, stored
from lrjax.kernels.blocks import Side
from lrjax.kernels.dispatch import Operation, dispatch
from lrjax.kernels.stored import Form
from lrjax.kernels.tiles import Tile


def lift_and_apply(
  w: jax.Array,
  p: Any,
  n: jax.Array,
  *,
  rate: Any,
  scale: Any = 1.0,
  decay: Any = 0.0,
  side: Side = 'in',
  key: jax.Array | None = None,
  bits: int = 8,
  group: int = 256,
  implementation: str | None = None,
) -> jax.Array:
  r"""Moves weights along a low-rank update, in place if they are donated.

  .. math:: W \leftarrow W - \eta\, (\alpha P N + \lambda W)

  Where and how checked: as `lrjax.kernels.project`. By default a TPU v5p keeps arrays
  whose last axis is not a multiple of 128 transposed, and copies them for a kernel; to
  have W updated in place there, give it a row-major `jax.experimental.layout`.

  Weights of `lrjax.int8_weights` are not taken: each step lays a new grid through the
  least and the largest new value of a group, whose size follows from the width of the
  weights (230 for 1376 columns) and is not that of any tile.

  Args:
    w: weights as the leaf lies: (d, k) for side 'in', (k, d) for 'out'.
    p: P (d, r), as in `lrjax.kernels.project`.
    n: N (r, k).
    rate: eta; may be traced, as those below.
    scale: alpha.
    decay: lambda.
    side: which axis of the leaf is compressed.
    key: for weights in bfloat16: rounds up with the probability of the fraction, by
      random numbers that are the same on every platform. None: to the nearest.
    bits: those of the `lrjax.affine` that stored P.
    group: likewise.
    implementation: see `lrjax.kernels.dispatch`.

  Returns:
    The new weights; the arithmetic is in float32 or wider.

  Raises:
    ValueError: as `lrjax.kernels.project`; for an N that does not fit, and a key for
      weights that are not in bfloat16.
    TypeError: for a basis stored in another form.

  >>> w, p, n = jnp.ones((3, 2)), jnp.eye(3, 1), jnp.ones((1, 2))
  >>> print(lift_and_apply(w, p, n, rate=0.5))
  [[0.5 0.5]
   [1.  1. ]
   [1.  1. ]]
  """
  form, shape = stored.read(p, bits, group)
  sizes = blocks.sizes_of(shape, w.shape, side)
  if n.shape != (sizes['r'], sizes['k']):
    raise ValueError(f'N must be (r, k) = {sizes["r"], sizes["k"]}, got {n.shape}')
  if key is not None and w.dtype != jnp.bfloat16:
    raise ValueError(f'`key` is for weights in bfloat16, these are in {w.dtype}')
  wide = jnp.promote_types(w.dtype, jnp.float32)
  numbers = [jnp.asarray(x, wide) for x in (rate * scale, rate * decay)]
  numbers = jnp.stack(numbers)[None]
  # Two words that nobody reads keep the kernels' arguments alike.
  words = jnp.zeros((1, 2), jnp.uint32) if key is None else rounding.words(key)
  return dispatch(
    LIFT,
    implementation,
    sizes,
    w.dtype,
    *(w, p, n, numbers, words),
    side=side,
    form=form,
    stochastic=key is not None,
  )


def _moved(w: jax.Array, update: jax.Array, numbers: Any) -> jax.Array:
  """The new weights in `update`'s type; entry by entry, so also of a block."""
  w = w.astype(update.dtype)
  return w - numbers[0, 0] * update - numbers[0, 1] * w


def _indices(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
  """The row and the column of every entry of a block."""
  rows, cols = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
  return rows, cols


def _xla(
  w: jax.Array,
  p: Any,
  n: jax.Array,
  numbers: jax.Array,
  words: jax.Array,
  *,
  side: Side,
  form: Form,
  stochastic: bool,
) -> jax.Array:
  new = _moved(w, blocks.up(stored.decode(p, form), n, side), numbers)
  if stochastic:
    at = rounding.positions(*_indices(w.shape), w.shape[1])
    new = rounding.stochastic_bf16(new, rounding.random_bits(at, words))
  return new.astype(w.dtype)


def _tpu(
  w: jax.Array,
  p: Any,
  n: jax.Array,
  numbers: jax.Array,
  words: jax.Array,
  *,
  side: Side,
  form: Form,
  stochastic: bool,
  tile: Tile,
  interpret: Any,
) -> jax.Array:
  (d, k), r = blocks.along(side, *w.shape), n.shape[0]
  bd, bk = min(tile['d'], d), min(tile['k'], k)
  basis = stored.tpu_operands(p, form)
  leaf = blocks.leaf_spec(side, bd, bk, lambda j, i: (i, j))
  return pl.pallas_call(
    functools.partial(
      _tpu_kernel, side=side, form=form, stochastic=stochastic, columns=w.shape[1]
    ),
    out_shape=jax.ShapeDtypeStruct(w.shape, w.dtype),
    grid=(pl.cdiv(k, bk), pl.cdiv(d, bd)),
    in_specs=[
      leaf,
      pl.BlockSpec((r, bk), lambda j, i: (0, j)),
      blocks.scalars_spec(numbers),
      blocks.scalars_spec(words),
      *stored.tpu_specs(basis, bd, lambda j, i: i),
    ],
    out_specs=leaf,
    input_output_aliases={0: 0},
    compiler_params=blocks.tpu_params('parallel', 'parallel'),
    interpret=interpret,
  )(w, n, numbers, words, *basis)


def _tpu_kernel(
  w_ref: Any,
  n_ref: Any,
  numbers_ref: Any,
  words_ref: Any,
  *refs: Any,
  side: Side,
  form: Form,
  stochastic: bool,
  columns: int,
) -> None:
  *p_refs, out_ref = refs
  basis = stored.tpu_load(p_refs, form)
  low = stored.split_rows(n_ref[...], len(basis))
  update, *more = (blocks.up(p, x, side) for p, x in zip(basis, low, strict=True))
  for part in more:
    update += part
  new = _moved(w_ref[...], update, numbers_ref)
  if stochastic:
    row, col = blocks.along(side, pl.program_id(1), pl.program_id(0))
    rows, cols = _indices(new.shape)
    row, col = row * new.shape[0] + rows, col * new.shape[1] + cols
    at = rounding.positions(row, col, columns)
    new = rounding.stochastic_bf16(new, rounding.random_bits(at, words_ref))
  out_ref[...] = new.astype(out_ref.dtype)


def _gpu(
  w: jax.Array,
  p: Any,
  n: jax.Array,
  numbers: jax.Array,
  words: jax.Array,
  *,
  side: Side,
  form: Form,
  stochastic: bool,
  tile: Tile,
  interpret: Any,
) -> jax.Array:
  d, k = blocks.along(side, *w.shape)
  return pl.pallas_call(
    functools.partial(
      _gpu_kernel, side=side, form=form, stochastic=stochastic, tile=tile
    ),
    out_shape=jax.ShapeDtypeStruct(w.shape, w.dtype),
    grid=(pl.cdiv(k, tile['k']), pl.cdiv(d, tile['d'])),
    input_output_aliases={0: 0},
    compiler_params=blocks.gpu_params(),
    interpret=interpret,
  )(w, n, numbers, words, *stored.operands(p, form))


def _gpu_kernel(
  w_ref: Any,
  n_ref: Any,
  numbers_ref: Any,
  words_ref: Any,
  *refs: Any,
  side: Side,
  form: Form,
  stochastic: bool,
  tile: Tile,
) -> None:
  *p_refs, out_ref = refs
  ks = blocks.span(pl.program_id(0), tile['k'])
  ds = blocks.span(pl.program_id(1), tile['d'])

  def add(i: jax.Array, update: jax.Array) -> jax.Array:
    rs = blocks.span(i, tile['r'])
    p = stored.gpu_load(p_refs, form, ds, rs)
    return update + blocks.up(p, blocks.read(n_ref, rs, ks), side)

  zeros = jnp.zeros(blocks.along(side, tile['d'], tile['k']), jnp.float32)
  steps = pl.cdiv(n_ref.shape[0], tile['r'])
  update = jax.lax.fori_loop(0, steps, add, zeros)
  rows, cols = blocks.along(side, ds, ks)
  new = _moved(blocks.read(w_ref, rows, cols), update, numbers_ref)
  if stochastic:
    at = rounding.positions(rows[:, None], cols[None, :], w_ref.shape[1])
    new = rounding.stochastic_bf16(new, rounding.random_bits(at, words_ref))
  blocks.store(out_ref, rows, cols, new)


def _fits(platform: str, tile: Tile, sizes: Any, *, form: Form, **options: Any) -> bool:
  if not stored.readable(form, platform, sizes['r']):
    return False
  d, k, r = tile['d'], tile['k'], tile.get('r', sizes['r'])
  basis = stored.words(form) * d * r
  if platform == 'gpu':
    return 4 * blocks.STAGES * (basis + r * k) <= blocks.SHARED
  # Of W there are the old one, the update, and the new one.
  return 4 * (basis + r * k + 3 * d * k) <= blocks.VMEM


LIFT = Operation('lift_and_apply', _xla, _tpu, _gpu, _fits)
