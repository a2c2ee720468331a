"""Devices and numerics for the whole suite; set before jax starts."""

import importlib.metadata
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# See experiments/__init__.py: two test processes on two cores would wait for each other.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
_flags = ['--xla_force_host_platform_device_count=8']
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  # XLA's CPU backend may start independent collectives in different orders on
  # different device threads and then wait for ever; this scheduler does not.
  _flags.append('--xla_cpu_enable_concurrency_optimized_scheduler=false')
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *_flags]).strip()

import jax  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
