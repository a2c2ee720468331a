"""R = P^T G: a gradient projected as it lies, P dequantized on the way."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lrjax.kernels import blocks, stored
from lrjax.kernels.blocks import Side
from lrjax.kernels.dispatch import Operation, dispatch
from lrjax.kernels.stored import Form
from lrjax.kernels.tiles import Tile


def project(
  p: Any,
  g: jax.Array,
  *,
  side: Side = 'in',
  bits: int = 8,
  group: int = 256,
  implementation: str | None = None,
) -> jax.Array:
  r"""Projects a gradient onto a basis.

  .. math:: R = P^\top G

  The kernels read G once, tile by tile, decode P on the way if it is stored in 8 or 4
  bits, and accumulate in float32. They are for one device, or for the inside of a
  `jax.shard_map(..., check_vma=False)`. They are checked by interpretation, lowering and
  compilation, see `lrjax.kernels.blocks`, and have not run on a TPU or GPU yet.

  Args:
    p: P (d, r): an array, or what `lrjax.int8` or `lrjax.affine` stores of it.
    g: the gradient as its leaf lies: (d, k) for side 'in', (k, d) for 'out'.
    side: which axis of the leaf is compressed.
    bits: those of the `lrjax.affine` that stored P.
    group: likewise.
    implementation: see `lrjax.kernels.dispatch`.

  Returns:
    R (r, k), float32 or wider.

  Raises:
    ValueError: for shapes that do not fit, unknown names, and kernels that the device or
      the sizes do not allow.
    TypeError: for a basis stored in another form.

  >>> p, g = jnp.eye(3, 2), jnp.arange(6.0).reshape(3, 2)
  >>> print(project(p, g))
  [[0. 1.]
   [2. 3.]]
  """
  form, shape = stored.read(p, bits, group)
  sizes = blocks.sizes_of(shape, g.shape, side)
  return dispatch(
    PROJECT, implementation, sizes, g.dtype, p, g, side=side, form=form, r=sizes['r']
  )


def _xla(p: Any, g: jax.Array, *, side: Side, form: Form, r: int) -> jax.Array:
  return blocks.down(stored.decode(p, form), g, side)


def _tpu(
  p: Any, g: jax.Array, *, side: Side, form: Form, r: int, tile: Tile, interpret: Any
) -> jax.Array:
  d, k = blocks.along(side, *g.shape)
  bd, bk = min(tile['d'], d), min(tile['k'], k)
  basis = stored.tpu_operands(p, form)
  return pl.pallas_call(
    functools.partial(_tpu_kernel, side=side, form=form, d=d),
    out_shape=jax.ShapeDtypeStruct((r, k), jnp.float32),
    grid=(pl.cdiv(k, bk), pl.cdiv(d, bd)),
    in_specs=[
      *stored.tpu_specs(basis, bd, lambda j, i: i),
      blocks.leaf_spec(side, bd, bk, lambda j, i: (i, j)),
    ],
    out_specs=pl.BlockSpec((r, bk), lambda j, i: (0, j)),
    compiler_params=blocks.tpu_params('parallel', 'arbitrary'),
    interpret=interpret,
  )(*basis, g)


def _tpu_kernel(*refs: Any, side: Side, form: Form, d: int) -> None:
  *p_refs, g_ref, out_ref = refs

  @pl.when(pl.program_id(1) == 0)
  def _():
    out_ref[...] = jnp.zeros_like(out_ref)

  tpu_add(p_refs, g_ref, out_ref, side, form, d)


def tpu_add(
  p_refs: list, g_ref: Any, out_ref: Any, side: Side, form: Form, d: int
) -> None:
  """Adds what this block of d gives to R; the blocks follow the grid's second axis."""
  start = pl.program_id(1) * p_refs[0].shape[0]
  g = blocks.inside(g_ref[...], blocks.along(side, 0, 1)[0], start, d)
  basis = [blocks.inside(p, 0, start, d) for p in stored.tpu_load(p_refs, form)]
  out_ref[...] += stored.join_rows([blocks.down(p, g, side) for p in basis])


def _gpu(
  p: Any, g: jax.Array, *, side: Side, form: Form, r: int, tile: Tile, interpret: Any
) -> jax.Array:
  _, k = blocks.along(side, *g.shape)
  return pl.pallas_call(
    functools.partial(_gpu_kernel, side=side, form=form, tile=tile),
    out_shape=jax.ShapeDtypeStruct((r, k), jnp.float32),
    grid=(pl.cdiv(k, tile['k']), pl.cdiv(r, tile['r'])),
    compiler_params=blocks.gpu_params(),
    interpret=interpret,
  )(*stored.operands(p, form), g)


def _gpu_kernel(*refs: Any, side: Side, form: Form, tile: Tile) -> None:
  *p_refs, g_ref, out_ref = refs
  ks = blocks.span(pl.program_id(0), tile['k'])
  rs = blocks.span(pl.program_id(1), tile['r'])
  blocks.store(out_ref, rs, ks, gpu_sum(p_refs, g_ref, rs, ks, side, form, tile))


def gpu_sum(
  p_refs: list,
  g_ref: Any,
  rs: jax.Array,
  ks: jax.Array,
  side: Side,
  form: Form,
  tile: Tile,
) -> jax.Array:
  """Entries (rs, ks) of R, summed over all blocks of d."""

  def add(i: jax.Array, out: jax.Array) -> jax.Array:
    ds = blocks.span(i, tile['d'])
    p = stored.gpu_load(p_refs, form, ds, rs)
    g = blocks.read(g_ref, *blocks.along(side, ds, ks))
    return out + blocks.down(p, g, side)

  d = blocks.along(side, *g_ref.shape)[0]
  zeros = jnp.zeros((tile['r'], tile['k']), jnp.float32)
  return jax.lax.fori_loop(0, pl.cdiv(d, tile['d']), add, zeros)


def _fits(platform: str, tile: Tile, sizes: Any, *, form: Form, **options: Any) -> bool:
  if not stored.readable(form, platform, sizes['r']):
    return False
  d, k, r = tile['d'], tile['k'], tile.get('r', sizes['r'])
  basis = stored.words(form) * d * r
  if platform == 'gpu':
    return 4 * blocks.STAGES * (basis + d * k) <= blocks.SHARED
  return 4 * (basis + d * k + r * k) <= blocks.VMEM


PROJECT = Operation('project', _xla, _tpu, _gpu, _fits)
