"""Which implementation of an operation runs: XLA, or the kernel of a platform."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lrjax.checks import closest
from lrjax.kernels import tiles

IMPLEMENTATIONS = ('xla', 'tpu', 'gpu', 'interpret', 'gpu_interpret')
# Of the leaves that kernels read; all others are left to XLA.
DTYPES = (jnp.float32, jnp.bfloat16)
# By JAX's names of what a program is lowered for.
PLATFORMS = {'tpu': 'tpu', 'cuda': 'gpu', 'rocm': 'gpu'}


class Operation(NamedTuple):
  """The implementations of one operation; all take the same arrays and options.

  Attributes:
    name: the operation's key in the table of tiles.
    xla: `(*arrays, **options) -> results`, which defines the operation.
    tpu: `(*arrays, tile, interpret, **options) -> results`, in Mosaic.
    gpu: likewise, in Triton.
    fits: `(platform, tile, sizes, **options) -> bool`, whether a kernel can run with a
      tile: above all, whether its working set fits on chip.
  """

  name: str
  xla: Callable
  tpu: Callable
  gpu: Callable
  fits: Callable


def dispatch(
  operation: Operation,
  implementation: str | None,
  sizes: Mapping[str, int],
  dtype: Any,
  *arrays: Any,
  **options: Any,
) -> Any:
  """Runs an operation.

  Args:
    operation: what runs.
    implementation: None: the kernel of the platform that the program is lowered for,
      where a tile fits, else XLA. 'xla': the definition. 'tpu', 'gpu': that kernel.
      'interpret', 'gpu_interpret': the arithmetic of the TPU's, the GPU's kernel on any
      device, slowly.
    sizes: axis -> size, of one matrix, as the table of tiles names the axes.
    dtype: of the leaf, the largest array.
    *arrays: trees of arrays.
    **options: what is fixed in the compiled program.

  Returns:
    The operation's results.

  Raises:
    ValueError: for an unknown name, and for a kernel by name that the present device has
      not or that no tile fits.
  """
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f'unknown `implementation` {implementation!r};'
      f' {closest(str(implementation), IMPLEMENTATIONS)}'
    )
  if implementation == 'xla':
    return operation.xla(*arrays, **options)

  found = {p: _tile(operation, p, sizes, dtype, options) for p in tiles.PLATFORMS}

  def kernel(platform: str, interpret: bool = False) -> Callable:
    run, more = getattr(operation, platform), dict(options, tile=found[platform])
    return lambda *arrays: run(*arrays, interpret=interpret, **more)

  if implementation is None:
    kernels = {p: kernel(of) for p, of in PLATFORMS.items() if found[of]}
    if not kernels:
      return operation.xla(*arrays, **options)
    xla = lambda *arrays: operation.xla(*arrays, **options)
    return jax.lax.platform_dependent(*arrays, **kernels, default=xla)

  here = tiles.present()
  runnable = {'interpret': ('tpu', True), 'gpu_interpret': ('gpu', True)}
  if here.platform in found:
    runnable[here.platform] = (here.platform, False)
  runnable = {name: how for name, how in runnable.items() if found[how[0]]}
  if implementation not in runnable:
    raise ValueError(
      f'`implementation` {implementation!r} of {operation.name} is not supported on'
      f' {here.kind!r} ({here.platform}) for {dict(sizes)} of {jnp.dtype(dtype).name};'
      f' supported here: {", ".join(["xla", *sorted(runnable)])}'
    )
  return kernel(*runnable[implementation])(*arrays)


def _tile(
  operation: Operation,
  platform: str,
  sizes: Mapping[str, int],
  dtype: Any,
  options: Mapping[str, Any],
) -> tiles.Tile | None:
  if dtype not in DTYPES:
    return None
  fits = lambda tile: operation.fits(platform, tile, sizes, **options)
  return tiles.choose(operation.name, platform, sizes, dtype, fits)
