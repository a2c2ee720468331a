"""Adam on moments in 8 bits, one pass over them: decoded, updated, encoded in a kernel."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lrjax.codecs.dynamic import Dynamic8, block_of, stored_like, widened
from lrjax.kernels import blocks, codes
from lrjax.kernels.dispatch import Operation, dispatch
from lrjax.kernels.tiles import Tile
from lrjax.moments import AdamState, BiasCorrection, adam, late_correction

LANES = 128
# Moments, behind tables, numbers and g, to the results behind u.
IN_PLACE = {3: 1, 4: 2, 5: 3, 6: 4}


def adam_8bit(
  g: jax.Array,
  state: AdamState,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  bias_correction: BiasCorrection = 'moments',
  implementation: str | None = None,
) -> tuple[jax.Array, AdamState]:
  r"""One step of `lrjax.adam` on moments that are stored by `lrjax.dynamic8`.

  .. math::
    M = b_1 \hat M + (1 - b_1) G, \quad V = b_2 \hat V + (1 - b_2) G^2, \quad
    U = \frac{M / c_1}{\sqrt{V / c_2} + \epsilon}

  with :math:`\hat M`, :math:`\hat V` as decoded, and M, V encoded again, each block by
  its own new maximum. The kernels move one byte a moment each way, where XLA writes
  moments of float32 between decoding and encoding. They serve ranks that divide the
  block, and multiples of it; then a tile of columns holds whole blocks.

  Both kernels are checked by interpretation, and by lowering for TPU and CUDA; neither
  has run on a device.

  Args:
    g: (r, k), float32 or bfloat16.
    state: `count` of the updates so far; `mu` and `nu`, a `Dynamic8` each of codes
      (r, k), the first with signs.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    bias_correction: see `lrjax.adam`.
    implementation: see `lrjax.kernels.dispatch`.

  Returns:
    (U (r, k) in the dtype of g, new state).

  Raises:
    ValueError: for moments in another form or of another shape, options unknown to
      `lrjax.adam`, and implementations that the device or the sizes do not allow.

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2022

  >>> from lrjax.eight_bit import eight_bit
  >>> g = jnp.array([[1.0, -2.0], [0.5, 4.0]])
  >>> state = jax.jit(eight_bit(adam(), min_size=0).init)(g)
  >>> u, state = jax.jit(adam_8bit)(g, state)
  >>> print(u.round(3), state.mu.codes)
  [[ 1. -1.]
   [ 1.  1.]] [[201  35]
   [192 255]]
  """
  for name, x in (('mu', state.mu), ('nu', state.nu)):
    if not isinstance(x, Dynamic8) or x.codes.shape != g.shape:
      raise ValueError(
        f'`{name}` must be a Dynamic8 of codes {g.shape}, the shape of g, got'
        f' {jax.tree.map(jnp.shape, x)}; lrjax.eight_bit makes them'
      )
  adam(b1, b2, eps, bias_correction=bias_correction)  # refuses what it does not know
  r, k = g.shape
  sizes = {'k': k, 'r': r, 'block': block_of(state.mu)}
  options = dict(b1=b1, b2=b2, eps=eps, bias_correction=bias_correction)
  return dispatch(ADAM_8BIT, implementation, sizes, g.dtype, g, state, **options)


def _xla(g: jax.Array, state: AdamState, **options: Any) -> tuple[jax.Array, AdamState]:
  wide = state._replace(mu=widened(state.mu, True), nu=widened(state.nu, False))
  u, new = cast(tuple[Any, AdamState], adam(**options).update(g, wide))
  mu = stored_like(new.mu, state.mu, True)
  nu = stored_like(new.nu, state.nu, False)
  return u, AdamState(new.count, mu, nu)


def _step(
  g: jax.Array,  # (rows, columns)
  mu: Dynamic8,  # scale: (1, columns)
  nu: Dynamic8,
  numbers: Any,  # see `_numbers`
  tables: Callable,  # see `codes.maps`
  largest: Callable,  # (rows, columns) -> (1, columns), maxima of the columns' blocks
) -> tuple[jax.Array, Dynamic8, Dynamic8]:
  first, second = codes.maps(tables)
  b1, rest1, b2, rest2, eps, c1, c2, late = (numbers[0, i] for i in range(8))
  decode = lambda x, of: of.values(x.codes.astype(jnp.int32)) * x.scale
  g = g.astype(jnp.float32)
  # In the order of `adam`, and with its divisions: codes are to be equal.
  m = b1 * decode(mu, first) + rest1 * g
  v = b2 * decode(nu, second) + rest2 * jnp.square(g)
  u = (m / c1) / (jnp.sqrt(v / c2) + eps) * late
  return u, codes.encode(m, first, largest), codes.encode(v, second, largest)


def _tpu_kernel(tables: Any, numbers: Any, *refs: Any, columns: int, k: int) -> None:
  def lookup(row: int) -> Callable:
    # A gather stays within 128 lanes: 256 values are two of them.
    def take(i: jax.Array) -> jax.Array:
      half = lambda at: jnp.take_along_axis(
        jnp.broadcast_to(tables[at : at + 1, :], i.shape),
        i & (LANES - 1),
        axis=1,
        mode='promise_in_bounds',
      )
      return jnp.where(i < LANES, half(2 * row), half(2 * row + 1))

    return take

  start = pl.program_id(1) * LANES

  def largest(x: jax.Array) -> jax.Array:
    top = jnp.max(blocks.inside(x, 1, start, k), axis=0, keepdims=True)
    lane = jax.lax.broadcasted_iota(jnp.int32, top.shape, 1)
    hop = 1
    while hop < columns:  # with the lane whose number differs in one bit
      other = pltpu.roll(top, LANES - hop, 1), pltpu.roll(top, hop, 1)
      top = jnp.maximum(top, jnp.where((lane & hop) == 0, *other))
      hop *= 2
    return top

  g, mu, mu_scale, nu, nu_scale, *out = refs
  moments = Dynamic8(mu[...], mu_scale[0]), Dynamic8(nu[...], nu_scale[0])
  u, m, v = _step(g[...], *moments, numbers, lookup, largest)
  for ref, x in zip(out, (u, m.codes, m.scale[None], v.codes, v.scale[None])):
    ref[...] = x.astype(ref.dtype)


def _gpu_kernel(
  tables: Any,
  numbers: Any,
  *refs: Any,
  columns: int,
  k: int,
  rows: int,
  tile: Tile,
) -> None:
  row, ks = pl.program_id(0), blocks.span(pl.program_id(1), tile['k'])
  here, scale = (blocks.span(row, rows), ks), (blocks.span(row, 1), ks)
  lookup = lambda row: lambda i: tables[i + 256 * row]

  def largest(x: jax.Array) -> jax.Array:
    top = jnp.max(jnp.where((ks < k)[None], x, 0), axis=0)
    top = jnp.max(top.reshape(-1, columns), axis=1)
    shape = top.shape[0], columns
    return jnp.broadcast_to(top[:, None], shape).reshape(1, -1)

  g, mu, mu_scale, nu, nu_scale, *out = refs
  stored = lambda x, s: Dynamic8(blocks.read(x, *here), blocks.read(s, *scale))
  moments = stored(mu, mu_scale), stored(nu, nu_scale)
  g = blocks.read(g, *here)
  u, m, v = _step(g, *moments, numbers, lookup, largest)
  for ref, at, x in zip(out, (here, *(here, scale) * 2), (u, *m, *v), strict=True):
    blocks.store(ref, *at, x)


def _kernel(
  call: Callable,
  g: jax.Array,
  state: AdamState,
  *,
  bias_correction: str,
  b1: float,
  b2: float,
  eps: float,
  **how: Any,
) -> tuple[jax.Array, AdamState]:
  r, k = g.shape
  block = block_of(state.mu)
  rows, columns = min(r, block), max(block // r, 1)  # of a block
  count = state.count + 1
  # One scale a column and block: (r / rows, k).
  spread = lambda s: jnp.repeat(s.reshape(-1, r // rows).T, columns, axis=1)[:, :k]
  gather = lambda s: s[:, ::columns].T.reshape(-1)
  stored = lambda x: (x.codes, spread(x.scale))
  u, m, ms, v, vs = call(
    jnp.asarray(codes.table()),
    _numbers(count, bias_correction, b1, b2, eps),
    (g, *stored(state.mu), *stored(state.nu)),
    rows=rows,
    common=dict(columns=columns, k=k),
    **how,
  )
  return u, AdamState(count, Dynamic8(m, gather(ms)), Dynamic8(v, gather(vs)))


def _tpu(
  tables: jax.Array,
  numbers: jax.Array,
  arrays: tuple,
  *,
  rows: int,
  common: dict,
  tile: Tile,
  interpret: Any,
) -> tuple:
  # Rows of scales are blocks of one row, which need an axis of their own.
  arrays = tuple(x[:, None] if i in (2, 4) else x for i, x in enumerate(arrays))
  r, k = arrays[0].shape
  tables = tables.reshape(-1, LANES)
  whole = pl.BlockSpec(tables.shape, lambda i, j: (0, 0))
  matrix = pl.BlockSpec((rows, tile['k']), lambda i, j: (i, j))
  scale = pl.BlockSpec((1, 1, tile['k']), lambda i, j: (i, 0, j))
  specs = [matrix, matrix, scale, matrix, scale]
  u, m, ms, v, vs = pl.pallas_call(
    functools.partial(_tpu_kernel, **common),
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays],
    grid=(r // rows, pl.cdiv(k, tile['k'])),
    in_specs=[whole, blocks.scalars_spec(numbers), *specs],
    out_specs=specs,
    input_output_aliases=IN_PLACE,
    compiler_params=blocks.tpu_params('parallel', 'parallel'),
    interpret=interpret,
  )(tables, numbers, *arrays)
  return u, m, ms[:, 0], v, vs[:, 0]


def _gpu(
  tables: jax.Array,
  numbers: jax.Array,
  arrays: tuple,
  *,
  rows: int,
  common: dict,
  tile: Tile,
  interpret: Any,
) -> list:
  r, k = arrays[0].shape
  return pl.pallas_call(
    functools.partial(_gpu_kernel, rows=rows, tile=tile, **common),
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays],
    grid=(r // rows, pl.cdiv(k, tile['k'])),
    input_output_aliases=IN_PLACE,
    compiler_params=blocks.gpu_params(),
    interpret=interpret,
  )(tables.reshape(-1), numbers, *arrays)


def _numbers(count: jax.Array, kind: str, b1: Any, b2: Any, eps: Any) -> jax.Array:
  """b1, 1 - b1, b2, 1 - b2, eps, divisors of M and V, and a factor of U, as one row."""
  c1, c2 = (1 - b1**count, 1 - b2**count) if kind == 'moments' else (1.0, 1.0)
  late = late_correction(count, b1, b2) if kind == 'step' else 1.0
  numbers = b1, 1 - b1, b2, 1 - b2, eps, c1, c2, late
  return jnp.stack([jnp.asarray(x, jnp.float32) for x in numbers])[None]


def _fits(platform: str, tile: Tile, sizes: Mapping[str, int], **options: Any) -> bool:
  """Whether blocks are columns, or parts of one, and a tile holds whole blocks."""
  r, block = sizes['r'], sizes['block']
  if r % block and block % r:
    return False
  # Of a tile that a GPU keeps in registers.
  small = platform == 'tpu' or min(r, block) * tile['k'] <= 16384
  return small and tile['k'] % max(block // r, 1) == 0


ADAM_8BIT = Operation(
  'adam_8bit',
  _xla,
  functools.partial(_kernel, _tpu),
  functools.partial(_kernel, _gpu),
  _fits,
)
