"""Two real processes over loopback train as one, and leave together."""

import contextlib
import json
import socket
from dataclasses import replace

import numpy as np
import pytest

from experiments.config import Mesh
from tests import runner


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


@contextlib.contextmanager
def pair(experiment, root):
  """Both processes of a run, started."""
  address = f'127.0.0.1:{free_port()}'
  flags = ['--resume', '--coordinator', address, '--processes', '2', '--process']
  with contextlib.ExitStack() as held:
    start = lambda i: runner.started(
      runner.command(experiment, root, *flags, str(i)), root
    )
    yield [held.enter_context(start(i)) for i in range(2)]


def losses(run):
  lines = (run / 'metrics.jsonl').read_text().splitlines()
  return [float(json.loads(line)['loss']) for line in lines]


@pytest.mark.slow
def test_two_processes_train_like_one_and_leave_together(tmp_path):
  one = runner.tiny(name='one')
  assert runner.finish(runner.command(one, tmp_path), tmp_path) == 0
  two = replace(one, name='two', mesh=Mesh(fsdp=2))
  run = tmp_path / 'runs' / 'two'
  with pair(two, tmp_path) as processes:
    runner.wait_for_step(processes[0], run, 3)
    processes[1].send_signal(runner.TERM)
    assert [p.wait(120) for p in processes] == [143, 143], runner.log_of(tmp_path)
  step = runner.last_step(run)
  assert 3 <= step < 12
  assert runner.log_of(tmp_path).count(f'step {step} of 12 is saved') == 2
  with pair(two, tmp_path) as processes:
    assert [p.wait(120) for p in processes] == [0, 0], runner.log_of(tmp_path)
  assert f'resume step={step} ' in runner.log_of(tmp_path)
  # Only the order of float32 sums differs.
  np.testing.assert_allclose(losses(run), losses(tmp_path / 'runs' / 'one'), rtol=1e-5)
