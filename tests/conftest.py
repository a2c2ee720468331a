"""Devices and numerics for the whole suite; set before jax starts."""

import os

from experiments import one_process

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
one_process()
# Tests compile much and compute little: a third of their time is LLVM's optimiser.
_flags = [
  '--xla_force_host_platform_device_count=8',
  '--xla_backend_optimization_level=0',
]
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *_flags]).strip()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(autouse=True, scope='module')
def fresh_caches():
  """Forgets what a file compiled: a process that kept thousands of programs was aborted."""
  yield
  jax.clear_caches()
