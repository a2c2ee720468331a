"""Helpers of the tests that start the experiments runner."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from experiments import steps
from experiments.config import Checkpoint, Experiment, Mesh, Optimizer
from experiments.configuring import to_dict
from experiments.data import DataConfig
from experiments.rundir import write_json
from lrjax.models.llama_config import LlamaConfig
from tests.compiling import QUICK

ROOT = pathlib.Path(__file__).parent.parent
GALORE = {'rank': 4, 'update_proj_gap': 5, 'scale': 0.25}


def tiny(**changes) -> Experiment:
  """A run of a second or two: 12 steps, refresh every 5, saved every 4."""
  defaults = dict(
    name='tiny',
    steps=12,
    model=LlamaConfig(256, 16, 24, num_layers=2, num_heads=2, max_seq_len=16),
    data=DataConfig(
      source='synthetic',
      synthetic_bytes=20_000,
      seq_len=16,
      batch_size=4,
      valid_windows=8,
    ),
    optimizer=Optimizer('galore', 1e-2, options=GALORE),
    checkpoint=Checkpoint(every=4),
    eval_every=6,
    mesh=Mesh(),
  )
  return Experiment(**(defaults | changes))


def command(experiment: Experiment, root: pathlib.Path, *flags: str) -> list[str]:
  """The command line of `experiments.train` for an experiment, by way of a file."""
  config = root / f'{experiment.name}.json'
  write_json(config, to_dict(experiment))
  run = [sys.executable, '-m', 'experiments.train', '--preset', 'smoke']
  return [*run, '--config', str(config), '--runs', str(root / 'runs'), *flags]


def environment(root: pathlib.Path) -> dict[str, str]:
  """One device, and compiled programs kept between the processes of a test."""
  # Compiled as in this process, quickly, so that a run here has the same bits.
  env = os.environ | {'XLA_FLAGS': ' '.join(QUICK)}
  cache = dict(
    JAX_COMPILATION_CACHE_DIR=str(root / 'cache'),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
  )
  return env | cache | dict(JAX_PLATFORMS='cpu', PYTHONUNBUFFERED='1')


@contextlib.contextmanager
def started(words: list[str], root: pathlib.Path):
  """A process of its own group, killed at the end whatever happens."""
  with open(root / 'log.txt', 'a') as log:
    process = subprocess.Popen(
      words, cwd=ROOT, env=environment(root), stdout=log, stderr=log, text=True
    )
    try:
      yield process
    finally:
      process.kill()
      process.wait()


def finish(words: list[str], root: pathlib.Path, timeout: float = 120) -> int:
  """Runs to the end; returns the exit code."""
  with started(words, root) as process:
    return process.wait(timeout)


def wait_for_step(process, run: pathlib.Path, step: int, timeout: float = 120) -> None:
  """Returns once the run has logged `step`, or has ended."""
  deadline = time.monotonic() + timeout
  while process.poll() is None and last_step(run) < step:
    assert time.monotonic() < deadline, f'step {step} was not reached'
    time.sleep(0.002)


def last_step(run: pathlib.Path) -> int:
  """The last step in the metrics file, 0 if there is none."""
  try:
    lines = (run / 'metrics.jsonl').read_bytes().split(b'\n')
    return json.loads(lines[-2])['step']
  except (OSError, IndexError):
    return 0


def final(run: pathlib.Path) -> tuple[dict, bytes]:
  """The digests of the newest checkpoint's leaves, and the bytes of the metrics."""
  saved = steps.Steps(run / 'checkpoints')
  record = saved.record(saved.listed()[-1])
  return record['digest'], (run / 'metrics.jsonl').read_bytes()


def log_of(root: pathlib.Path) -> str:
  """What the processes of a test printed."""
  return (root / 'log.txt').read_text()


KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
