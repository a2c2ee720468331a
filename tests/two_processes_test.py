"""Two real processes over loopback train as one, leave together, and are not needed."""

import contextlib
import json
import shutil
import socket
import time
from dataclasses import replace

import numpy as np
import pytest

from experiments import errors, loop
from experiments.config import Mesh
from experiments.signals import Preemption
from tests import runner

TWO = runner.tiny(name='two', mesh=Mesh(fsdp=2), steps=16)


class Never(Preemption):
  """A run that nobody interrupts; handlers stay out of the test process."""

  def requested(self, step):
    return False


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


@contextlib.contextmanager
def pair(root, experiment=TWO):
  """Both processes of a run, started."""
  flags = ['--resume', '--coordinator', f'127.0.0.1:{free_port()}', '--heartbeat', '20']
  flags += ['--processes', '2', '--process']
  with contextlib.ExitStack() as held:
    start = lambda i: runner.started(
      runner.command(experiment, root, *flags, str(i)), root
    )
    yield [held.enter_context(start(i)) for i in range(2)]


def losses(run):
  lines = (run / 'metrics.jsonl').read_text().splitlines()
  return [float(json.loads(line)['loss']) for line in lines]


@pytest.mark.slow
def test_two_processes_are_one_and_one_goes_on_without_the_other(tmp_path):
  # Two devices of this process, undisturbed. A sum of two does not depend on their order,
  # so gloo's all-reduce and that within a process have the same bits.
  whole = loop.run(TWO, tmp_path / 'whole', Never())
  run = tmp_path / 'runs' / 'two'
  with pair(tmp_path) as processes:
    runner.wait_for_step(processes[0], run, 3)
    processes[1].send_signal(runner.TERM)
    assert [p.wait(120) for p in processes] == [143, 143], runner.log_of(tmp_path)
  step = runner.last_step(run)
  assert 3 <= step < 16
  assert runner.log_of(tmp_path).count(f'step {step} of 16 is saved') == 2

  with pair(tmp_path) as processes:
    runner.wait_for_step(processes[0], run, step + 2)
    processes[1].send_signal(runner.KILL)
    start = time.monotonic()
    assert processes[0].wait(90) not in (0, 143), 'it was done before the other died'
    assert time.monotonic() - start < 60
  log = runner.log_of(tmp_path)
  assert f'resume step={step} ' in log
  # Its collective fails, or jax's coordination misses the other's heartbeat.
  assert 'process 0 of 2 leaves' in log or 'another task died' in log, log

  for copy in ('one process', 'one device'):
    shutil.copytree(run, tmp_path / copy / 'runs' / 'two')
  with pair(tmp_path) as processes:
    assert [p.wait(120) for p in processes] == [0, 0], runner.log_of(tmp_path)
  assert runner.final(run) == runner.final(whole)
  again = loop.run(TWO, tmp_path / 'one process' / 'runs', Never(), resume=True)
  assert runner.final(again) == runner.final(whole)
  alone = tmp_path / 'one device'
  words = runner.command(replace(TWO, mesh=Mesh()), alone, '--resume')
  assert runner.finish(words, alone) == 0, runner.log_of(alone)
  # Only the order of float32 sums differs.
  np.testing.assert_allclose(losses(alone / 'runs' / 'two'), losses(whole), rtol=1e-5)


def test_a_mesh_that_does_not_divide_a_parameter_is_refused(tmp_path):
  with pytest.raises(
    errors.ConfigError, match=r"'tensor': 3.*embed/embedding.*256.*divisible by 3"
  ):
    loop.run(runner.tiny(mesh=Mesh(tensor=3)), tmp_path, Never())
