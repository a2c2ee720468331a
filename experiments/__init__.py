"""Experiments that compare low-rank methods on real text."""

import importlib.metadata
import os

# With several threads OpenBLAS, which decomposes matrices on a CPU, spins for a core that
# XLA's own threads hold: an SVD of 0.04 s was seen to take 15 s beside two busy processes.
# One thread was as fast on idle cores. It is read when numpy or jax is first imported.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

_SCHEDULER = '--xla_cpu_enable_concurrency_optimized_scheduler'


def one_process() -> None:
  """Settings of XLA for a process that shares its work with no other; before it starts.

  With the default scheduler of jaxlib 0.10 on CPUs simulated devices may start collectives
  in different orders and wait for ever, and a step that measures diagnostics did not end.
  Between processes it is the other way round: theirs agree on an order with the default
  alone.
  """
  flags = os.environ.get('XLA_FLAGS', '')
  affected = importlib.metadata.version('jaxlib').startswith('0.10.')
  if affected and _SCHEDULER not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} {_SCHEDULER}=false'.strip()
