"""What kernels share: blocks of a leaf on either side, edges, products in float32.

A leaf (d, k) whose compressed side is 'in' is the matrix G itself; one (k, d) of side
'out' is its transpose. Kernels read either as it lies.

No kernel of this package has run on a TPU or GPU yet. Their arithmetic is checked by
interpretation and their lowering to both by the tests; the compilers of TPU v5e, v5p and
v6e and Triton's for compute capability 8.0 and 9.0 have accepted those of `project`,
`low_rank_adam` and `lift_and_apply`, those of v5e and 9.0 `lift_and_add`.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton

Side = Literal['in', 'out']
SIDES = ('in', 'out')
# Bytes of blocks a kernel may hold at once on a TPU, and what it claims: Pallas keeps two
# copies of each block, to load one while it works on the other.
VMEM = 12 * 2**20
VMEM_LIMIT = 32 * 2**20
# Bytes of shared memory that a kernel may fill on a GPU (all since Ampere have 99 KiB or
# more), and how many blocks of each operand Triton keeps there to load ahead.
SHARED = 96 * 2**10
STAGES = 3


def along(side: Side, d: Any, k: Any) -> tuple[Any, Any]:
  """What belongs to the axes d and k, in the order in which the leaf has them."""
  return (d, k) if side == 'in' else (k, d)


def sizes_of(p_shape: tuple, leaf_shape: tuple, side: Side) -> dict[str, int]:
  """The sizes d, k and r of a leaf and a basis (d, r), checked against each other.

  Raises:
    ValueError: for an unknown side, other numbers of axes, or sizes that do not agree.
  """
  if side not in SIDES:
    raise ValueError(f"`side` must be 'in' or 'out', got {side!r}")
  if len(leaf_shape) != 2 or len(p_shape) != 2:
    raise ValueError(
      f'one matrix and one basis at a time, got shapes {leaf_shape} and {p_shape}; use'
      f' jax.vmap for a stack'
    )
  d, k = along(side, *leaf_shape)
  if p_shape[0] != d:
    raise ValueError(
      f'a basis {p_shape} does not fit side {side!r} of a leaf {leaf_shape}: that side'
      f' has {d} rows'
    )
  return dict(d=d, k=k, r=p_shape[1])


def down(p: jax.Array, leaf: jax.Array, side: Side) -> jax.Array:
  """P^T G (r, k) in float32 or wider, of a leaf as it lies."""
  axis = 0 if side == 'in' else 1
  return _dot(p, leaf, (((0,), (axis,)), ((), ())))


def up(p: jax.Array, low: jax.Array, side: Side) -> jax.Array:
  """P N in float32 or wider, as the leaf lies."""
  if side == 'in':
    return _dot(p, low, (((1,), (0,)), ((), ())))
  return _dot(low, p, (((0,), (1,)), ((), ())))


def _dot(a: jax.Array, b: jax.Array, dims: Any) -> jax.Array:
  dtype = jnp.promote_types(a.dtype, b.dtype)
  wide = jnp.promote_types(dtype, jnp.float32)
  return jax.lax.dot_general(
    a.astype(dtype), b.astype(dtype), dims, preferred_element_type=wide
  )


def leaf_spec(side: Side, bd: int, bk: int, index: Callable) -> pl.BlockSpec:
  """Blocks of a leaf on a TPU; `index`: grid indices -> (block of d, block of k)."""
  return pl.BlockSpec(along(side, bd, bk), lambda *at: along(side, *index(*at)))


def scalars_spec(x: jax.Array) -> pl.BlockSpec:
  """A row (1, n) of numbers that a TPU's kernel reads as scalars.

  As a vector (n,) it would be refused once `vmap` has stacked it.
  """
  return pl.BlockSpec(x.shape, lambda *at: (0, 0), memory_space=pltpu.SMEM)


def inside(block: jax.Array, axis: int, start: Any, size: int) -> jax.Array:
  """Zeros in a block where its `axis`, from `start` on, is past the array's `size`."""
  if size % block.shape[axis] == 0:
    return block
  at = start + jax.lax.broadcasted_iota(jnp.int32, block.shape, axis)
  return jnp.where(at < size, block, jnp.zeros_like(block))


def span(block: Any, size: int) -> jax.Array:
  """Positions of a block on a GPU, in an axis."""
  return block * size + jnp.arange(size, dtype=jnp.int32)


def within(rows: jax.Array, n: int, cols: jax.Array, m: int) -> jax.Array:
  """Which of the entries (rows, cols) an array (n, m) has."""
  return (rows < n)[:, None] & (cols < m)[None, :]


def read(ref: Any, rows: jax.Array, cols: jax.Array) -> jax.Array:
  """Entries (rows, cols) of an array on a GPU, zeros past its edges."""
  mask = within(rows, ref.shape[0], cols, ref.shape[1])
  return pltriton.load(ref.at[rows[:, None], cols[None, :]], mask=mask, other=0)


def store(ref: Any, rows: jax.Array, cols: jax.Array, x: jax.Array) -> None:
  """Writes entries (rows, cols) on a GPU, as far as the array has them."""
  mask = within(rows, ref.shape[0], cols, ref.shape[1])
  x = x.astype(ref.dtype)
  pltriton.store(ref.at[rows[:, None], cols[None, :]], x, mask=mask)


def gpu_params() -> Any:
  """How a GPU runs each program of the grid; asks for Triton, which JAX 0.12 deprecates."""
  return pltriton.CompilerParams(num_warps=4, num_stages=STAGES)


def tpu_params(*semantics: Literal['parallel', 'arbitrary']) -> Any:
  """How a TPU runs the grid: each axis 'parallel' or 'arbitrary' (in order)."""
  return pltpu.CompilerParams(
    dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT
  )
