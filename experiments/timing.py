"""How long calls take, in turns, and what the device at hand reaches at best."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# What products are computed in, as XLA's default precision does, or in full float32.
PRODUCTS = {
  'float32': (jnp.float32, None),
  'bfloat16': (jnp.bfloat16, None),
  'highest': (jnp.float32, jax.lax.Precision.HIGHEST),
}
Sampler = Callable[[], float]


def sampler(
  call: Callable, args: Sequence[Any], replaced: Mapping[int, int]
) -> Sampler:
  """A function that makes some calls and returns the seconds of one.

  On accelerators a sample is many calls, handed over one after the other without waiting:
  where a call takes longer than handing it over, only its own time counts.

  Args:
    call: `(*args) -> results`, a tuple; compiled here.
    args: of the first call; those that are replaced are donated, and gone afterwards.
    replaced: arguments that results replace in the next call, place to place.
  """
  compiled = jax.jit(call, donate_argnums=(*replaced,)).lower(*args).compile()
  calls = 1 if jax.default_backend() == 'cpu' else 20
  given = [*args]

  def sample() -> float:
    start, results = time.perf_counter(), ()
    for _ in range(calls):
      results = compiled(*given)
      for argument, result in replaced.items():
        given[argument] = results[result]
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / calls

  sample()  # warms up and does not count
  return sample


def in_turns(samplers: Sequence[Sampler], rounds: int) -> list[tuple[float, ...]]:
  """Seconds of each one's rounds.

  In turns, so that a device whose clock drifts slows all of them alike.
  """
  return [*zip(*([sample() for sample in samplers] for _ in range(rounds)))]


def ratio(some: Sequence[float], others: Sequence[float]) -> float:
  """The median of the ratios of each round."""
  return statistics.median(a / b for a, b in zip(some, others, strict=True))


def ceilings(rounds: int, products: Sequence[str] = ('float32',)) -> dict[str, Any]:
  """What the device at hand reaches: bytes a second, and FLOP/s by kind of product."""
  large = jax.default_backend() != 'cpu'
  x = jnp.ones((2**29 if large else 2**25,), jnp.float32)
  copy = sampler(lambda x: (x + 1,), [x], {0: 0})
  n = 8192 if large else 1536

  def multiply(kind: str) -> Sampler:
    dtype, precision = PRODUCTS[kind]
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    return sampler(lambda a: (jnp.dot(a, a, precision=precision),), [a], {})

  copied, *multiplied = in_turns([copy, *map(multiply, products)], rounds)
  flops = {kind: 2 * n**3 / min(s) for kind, s in zip(products, multiplied)}
  return dict(bytes_per_s=2 * 4 * x.size / min(copied), flops=flops)
