"""Experiments that compare low-rank methods on real text."""

import importlib.metadata
import os

# With several threads OpenBLAS, which decomposes matrices on a CPU, spins for a core that
# XLA's own threads hold: an SVD of 0.04 s was seen to take 15 s beside two busy processes.
# One thread was as fast on idle cores. It is read when numpy or jax is first imported.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

# This version's other scheduler on CPUs may wait for ever: collectives start in different
# orders on different devices, and a step that measures diagnostics did not end on one.
_SCHEDULER = '--xla_cpu_enable_concurrency_optimized_scheduler'
_flags = os.environ.get('XLA_FLAGS', '')
if (
  importlib.metadata.version('jaxlib').startswith('0.10.') and _SCHEDULER not in _flags
):
  os.environ['XLA_FLAGS'] = f'{_flags} {_SCHEDULER}=false'.strip()
