"""A basis as kernels read it: floats, or codes that are decoded tile by tile.

What `lrjax.int8` and `lrjax.affine` store is read as it lies; P as floats exists only on
chip. Two codes of four bits share a byte: columns 0 and 1, 2 and 3, ... A TPU takes them
apart as two parts, the even and the odd columns; a GPU loads a byte for each of the two.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from lrjax.codecs import affine, int8
from lrjax.kernels import blocks

LANES = 128


class Form(NamedTuple):
  """How the arrays of a basis are read; `bits` and `group` are those of `affine`.

  Attributes:
    kind: 'float': (P,). 'linear': (codes, scale), from `int8`. 'affine': (codes, scale,
      zero), from `affine`.
    bits: of a code.
    group: codes that share scale and zero.
  """

  kind: str
  bits: int
  group: int


def read(p: Any, bits: int, group: int) -> tuple[Form, tuple[int, int]]:
  """How `p` is stored, and the shape (d, r) it stands for.

  Raises:
    TypeError: if `p` is neither an array nor what `int8` or `affine` stores.
    ValueError: for other bits, and shapes that `affine(bits, group)` does not store.
  """
  if not isinstance(p, dict):
    return Form('float', 32, 1), p.shape
  if p.keys() == {'codes', 'scale'}:
    return Form('linear', 8, 1), p['codes'].shape
  if not {'scale', 'zero'} < p.keys() <= {'codes', 'odd', 'scale', 'zero'}:
    raise TypeError(
      f'a basis must be an array or what lrjax.int8 or lrjax.affine stores, got a dict'
      f' of {sorted(p)}'
    )
  if bits not in (4, 8):
    raise ValueError(f'`bits` must be 4 or 8, got {bits!r}')
  d = (p['codes'] if 'codes' in p else p['odd']).shape[0]
  r = p['codes'].shape[1] * (8 // bits) if 'codes' in p else 0
  r += p['odd'].shape[1] if 'odd' in p else 0
  if p['scale'].shape != (-(-d * r // group),):
    raise ValueError(
      f'scales {p["scale"].shape} do not fit a basis {(d, r)} stored by lrjax.affine('
      f'bits={bits}, group={group}); give `bits` and `group` as they were when it was'
    )
  return Form('affine', bits, group), (d, r)


def decode(p: Any, form: Form) -> jax.Array:
  """P (d, r) as floats."""
  if form.kind == 'float':
    return p
  codec = int8() if form.kind == 'linear' else affine(form.bits, form.group)
  return codec.decode(p)


def readable(form: Form, platform: str, r: int) -> bool:
  """Whether the kernels of a platform can decode P on the way."""
  if form.kind != 'affine':
    return True
  if r % parts(form):
    return False
  # A TPU has no gather: every row must lie in one group, or hold whole ones of full lanes.
  whole = r % form.group == 0 and form.group // parts(form) % LANES == 0
  return platform == 'gpu' or form.group % r == 0 or whole


def parts(form: Form) -> int:
  """How many parts a TPU decodes P to; part s of n has the columns s, s + n, ..."""
  return 8 // form.bits if form.kind == 'affine' else 1


def words(form: Form) -> int:
  """At most so many words of 4 bytes a number of P takes on chip."""
  return 3 if form.kind == 'affine' else 1


def operands(p: Any, form: Form) -> list[jax.Array]:
  """The arrays that a kernel is given."""
  if form.kind == 'float':
    return [p]
  return [p[name] for name in ('codes', 'scale', 'zero') if name in p]


def tpu_operands(p: Any, form: Form) -> list[jax.Array]:
  """Likewise, with scale and zero as columns (d, groups of a row)."""
  codes, *grid = operands(p, form)
  if form.kind != 'affine':
    return [codes, *grid]
  d, r = codes.shape[0], codes.shape[1] * parts(form)
  if r % form.group == 0:
    return [codes, *(x.reshape(d, -1) for x in grid)]
  return [codes, *(jnp.repeat(x, form.group // r)[:d, None] for x in grid)]


def tpu_specs(arrays: list[jax.Array], bd: int, row: Callable) -> list[pl.BlockSpec]:
  """Blocks of `bd` rows of `tpu_operands`; `row`: grid indices -> block."""

  def spec(x: jax.Array) -> pl.BlockSpec:
    if x.shape[0] == 1:
      return pl.BlockSpec(x.shape, lambda *at: (0, 0))
    return pl.BlockSpec((bd, x.shape[1]), lambda *at: (row(*at), 0))

  return [spec(x) for x in arrays]


def tpu_load(refs: list, form: Form) -> list[jax.Array]:
  """The parts of the block of P that `refs` hold, each (bd, r / parts)."""
  values, *grid = [ref[...] for ref in refs]
  if form.kind == 'float':
    return [values]
  # Shifts and masks are done in 32 bits: 8-bit ones are not native.
  codes = values.astype(jnp.int32)
  if form.kind == 'linear':
    return [codes.astype(jnp.float32) * (grid[0] / 127)]
  scale, zero = grid
  halves = [codes] if form.bits == 8 else [codes & 15, codes >> 4]
  width = codes.shape[1] // scale.shape[1]

  def part(codes: jax.Array) -> jax.Array:
    codes = codes.astype(jnp.float32)
    columns = [
      scale[:, j : j + 1] * (codes[:, j * width : (j + 1) * width] - zero[:, j : j + 1])
      for j in range(scale.shape[1])
    ]
    return jnp.concatenate(columns, axis=1) if len(columns) > 1 else columns[0]

  return [part(half) for half in halves]


def join_rows(low: list[jax.Array]) -> jax.Array:
  """(r, k) from its rows that belong to the parts of P."""
  if len(low) == 1:
    return low[0]
  rows, k = low[0].shape
  return jnp.stack(low, axis=1).reshape(len(low) * rows, k)


def split_rows(low: jax.Array, parts: int) -> list[jax.Array]:
  """The rows of (r, k) that belong to each part of P."""
  if parts == 1:
    return [low]
  pairs = low.reshape(-1, parts, low.shape[1])
  return [pairs[:, s] for s in range(parts)]


def gpu_load(refs: list, form: Form, rows: jax.Array, cols: jax.Array) -> jax.Array:
  """Entries (rows, cols) of P, zeros past its edges."""
  if form.kind == 'float':
    return blocks.read(refs[0], rows, cols)
  if form.kind == 'linear':
    codes, scale = refs
    # One scale a column, or one a row: its other axis is of size 1.
    at = (rows * (scale.shape[0] > 1), cols * (scale.shape[1] > 1))
    codes = blocks.read(codes, rows, cols)
    return codes.astype(jnp.float32) * (blocks.read(scale, *at) / 127)
  packed, scale, zero = refs
  per_byte = parts(form)
  d, r = packed.shape[0], packed.shape[1] * per_byte
  codes = blocks.read(packed, rows, cols // per_byte).astype(jnp.int32)
  if per_byte == 2:
    codes = (codes >> (cols % 2 * 4)[None, :]) & 15
  group = (rows[:, None] * r + cols[None, :]) // form.group
  mask = blocks.within(rows, d, cols, r)
  take = lambda ref: pltriton.load(ref.at[group], mask=mask, other=0)
  return take(scale) * (codes.astype(jnp.float32) - take(zero))
