"""Signals end a run in good order (R8); two processes: see checkpoints_test."""

import os
import signal
import subprocess
import sys

import pytest

from experiments import errors
from experiments.signals import Preemption

SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize('number', SIGNALS)
def test_before_the_loop_a_signal_exits_without_a_save(number):
  with Preemption(), pytest.raises(SystemExit) as e:
    os.kill(os.getpid(), number)
  assert e.value.code == errors.EXIT_PREEMPTED_UNSAVED == 144


@pytest.mark.parametrize('number', SIGNALS)
def test_in_the_loop_any_number_of_signals_is_one_request(number, capfd):
  with Preemption() as preemption:
    assert not preemption.requested(1)
    for _ in range(3):
      os.kill(os.getpid(), number)
    assert preemption.requested(2) and preemption.requested(3)
  assert f'{number.name}: saving after this step' in capfd.readouterr().err


def test_the_previous_handlers_come_back():
  before = [signal.getsignal(n) for n in SIGNALS]
  with Preemption():
    assert [signal.getsignal(n) for n in SIGNALS] != before
  assert [signal.getsignal(n) for n in SIGNALS] == before


def test_handlers_are_in_place_before_heavy_imports():
  code = """
import sys
from experiments.signals import Preemption
assert not {'jax', 'numpy', 'orbax', 'absl'} & {*sys.modules}, 'heavy import'
with Preemption():
  print('ready', flush=True)
  import time; time.sleep(60)
"""
  child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
  assert child.stdout.readline() == b'ready\n'
  child.terminate()
  assert child.wait(30) == 144
