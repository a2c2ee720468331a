"""Operations on the matrices of a model, ready to be timed."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax

from experiments import errors, timing
from experiments.operations import OPERATIONS, Matrices, Operation, draw
from lrjax.kernels import tiles
from lrjax.models.llama_config import LLAMA_SIZES


@dataclasses.dataclass(frozen=True)
class Job:
  """An operation of the table on matrices (d, k) at rank r."""

  name: str
  d: int
  k: int
  r: int
  dtype: str

  @property
  def operation(self) -> Operation:
    return OPERATIONS[self.name]

  @property
  def products(self) -> str:
    """What its products are computed in."""
    return self.operation.products or self.dtype

  @property
  def flops(self) -> int:
    """What one matrix must cost in products."""
    return self.operation.flops(self.d, self.k, self.r)

  @functools.cached_property
  def moved(self) -> int:
    """The bytes that must be moved for one matrix."""
    args = self.shapes()
    call = functools.partial(self.operation.call, implementation='xla')
    arrays = jax.tree.leaves((args, jax.eval_shape(call, *args)))
    return sum(x.size * x.dtype.itemsize for x in arrays)

  def key(self) -> tiles.Key:
    """The row of the table of tiles that the present device looks up for it."""
    with tiles.lookups() as found:
      jax.eval_shape(self.call(None), *self.shapes(stack=(1,)))
    # Were it several rows, no one time could tell which tile is the best of each.
    (key,) = {*found}
    return key

  def sampler(self, implementation: str, megabytes: int) -> timing.Sampler:
    """Runs it on a stack of matrices and returns seconds per matrix.

    Args:
      implementation: see `lrjax.kernels.dispatch`.
      megabytes: MiB that the matrices of the stack move, at least.

    Raises:
      ValueError: if the present device has no such kernel, or none for these sizes.
    """
    stack = max(1, math.ceil(megabytes * 2**20 / self.moved))
    keys = jax.random.split(_key(), stack)
    args = jax.jit(jax.vmap(self._inputs))(keys)
    run = timing.sampler(self.call(implementation), args, self.operation.replaced)
    return lambda: run() / stack

  def call(self, implementation: str | None) -> Callable[..., tuple]:
    """`(*arguments) -> results`, of a stack."""
    call = self.operation.call
    return jax.vmap(lambda *args: call(*args, implementation=implementation))

  def shapes(self, stack: tuple[int, ...] = ()) -> tuple:
    """Of its arguments: of one matrix, or of a stack of so many."""
    shapes = jax.eval_shape(self._inputs, _key())
    add = lambda x: jax.ShapeDtypeStruct((*stack, *x.shape), x.dtype)
    return jax.tree.map(add, shapes)

  def _inputs(self, key: jax.Array) -> tuple:
    keys = [jax.random.fold_in(key, i) for i in range(5)]
    p = draw(keys[0], self.d, self.r) / math.sqrt(self.d)
    leaf = draw(keys[1], self.d, self.k).astype(self.dtype)
    low, u = (draw(key, self.r, self.k) for key in keys[2:4])
    return self.operation.inputs(Matrices(p, leaf, low, u, keys[4]))


def _key() -> jax.Array:
  # The bits of a hash take four times as long to compile.
  return jax.random.key(0, impl='unsafe_rbg')


def check(size: str, rank: int, names: Sequence[str] = ()) -> None:
  """Raises ConfigError for what there is not."""
  if size not in LLAMA_SIZES:
    raise errors.ConfigError(f'size: {size!r}; known: {", ".join(LLAMA_SIZES)}')
  if unknown := {*names} - {*OPERATIONS}:
    raise errors.ConfigError(f'operations: {unknown}; known: {", ".join(OPERATIONS)}')
  if not 0 < rank <= LLAMA_SIZES[size].hidden_size:
    raise errors.ConfigError(
      f'rank: {rank} is not in 1 to {LLAMA_SIZES[size].hidden_size}, the width of {size}'
    )


def jobs(size: str, rank: int, dtype: str, names: Sequence[str] = ()) -> list[Job]:
  """Operations on the matrices of a model, compressed on their shorter side.

  Args:
    size: of `LLAMA_SIZES`.
    rank: at most its width.
    dtype: of gradients and weights.
    names: of operations; none: all.
  """
  config = LLAMA_SIZES[size]
  d, widths = config.hidden_size, (config.hidden_size, config.intermediate_size)
  return [Job(name, d, k, rank, dtype) for name in names or OPERATIONS for k in widths]
