"""Bad gradients at bad moments, in processes that may not hang."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import faults
import pytest

LIMIT = 90  # seconds for a whole process; it needs about 15


@functools.cache
def results(process, *args):
  """What `faults.py` printed; a process that hangs or dies is a failure."""
  here = pathlib.Path(__file__).parent
  env = os.environ | {'PYTHONPATH': f'{here.parent}{os.pathsep}{here}'}
  command = [sys.executable, str(here / 'faults.py'), *args]
  done = subprocess.run(
    command, env=env, timeout=LIMIT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  return {k: v for x in done.stdout.splitlines() for k, v in json.loads(x).items()}


@pytest.mark.parametrize('case', faults.CASES)
def test_faults(case):
  error = results(1, 'cases')[case]
  assert not error, error


@pytest.mark.parametrize('mesh', faults.DIGESTS)
def test_two_processes_end_on_the_same_bits(mesh):
  assert results(1, 'cases')[mesh] == results(2)[mesh]
