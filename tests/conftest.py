"""Devices and numerics for the whole suite; set before jax starts."""

import gc
import os
import tempfile
from pathlib import Path

from experiments import one_process
from tests.compiling import QUICK

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
one_process()
_flags = ['--xla_force_host_platform_device_count=8', *QUICK]
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *_flags]).strip()

# Workers and the processes that tests start inherit one folder of compiled programs, for
# this run alone; name one of your own to keep it from run to run.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _programs = tempfile.TemporaryDirectory(prefix='lrjax-tests-')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _programs.name
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')

# Traces are many objects that stay: looking for garbage among them takes a twelfth of all.
gc.set_threshold(100_000, 50, 100)

# Linux aborts a process of 65530 mappings, and a compiled program takes about three.
MAPPINGS = 20_000


@pytest.fixture(autouse=True, scope='module')
def fresh_caches():
  """Forgets what files compiled before a process has too many programs to go on."""
  yield
  mappings = Path('/proc/self/maps')
  if not mappings.exists() or mappings.read_bytes().count(b'\n') > MAPPINGS:
    jax.clear_caches()
