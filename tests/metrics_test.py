"""One history per run, whatever happened to its processes (R16)."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import errors
from experiments.metrics import Metrics


def log(metrics, steps):
  for step in steps:
    metrics.scalars(step, {'loss': 1 / (step + 1)})
    if step % 3 == 0:
      metrics.scalars(step, {'loss': 2 / (step + 1)}, split='validation')


def resume(path, step, **kwargs):
  metrics = Metrics(path, **kwargs)
  metrics.truncate_after(step)
  return metrics


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_valid_json_whatever_the_values(tmp_path):
  path = tmp_path / 'm.jsonl'
  metrics = Metrics(path, attempt=2)
  metrics.scalars(
    7,
    {
      'nan': float('nan'),
      'inf': jnp.float32(jnp.inf),
      'low': -math.inf,
      'bf16': jnp.bfloat16(0.5),
      'count': np.int64(3),
      'x': 0.1,
      'two\nlines\x1b': 1,
    },
  )
  metrics.close()
  (line,) = read(path)
  assert line == {
    'step': 7,
    'attempt': 2,
    'split': 'train',
    'nan': 'nan',
    'inf': 'inf',
    'low': '-inf',
    'bf16': 0.5,
    'count': 3,
    'x': 0.1,
    r'two\nlines\x1b': 1,
  }
  assert [*line] == sorted(line) and math.isnan(float(line['nan']))


def test_reserved_names_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"\['step'\]"):
    Metrics(tmp_path / 'm').scalars(1, {'step': 3})


@pytest.mark.parametrize('restored', [-1, 0, 4, 6])
@pytest.mark.parametrize('torn', [b'', b'{"loss": 0.1, "sp', b'\xff\xfe{', b'[' * 5000])
def test_a_resumed_file_has_the_bytes_of_an_unbroken_one(tmp_path, restored, torn):
  unbroken, killed = tmp_path / 'unbroken', tmp_path / 'killed'
  log(Metrics(unbroken), range(10))
  log(Metrics(killed), range(7))  # neither closed nor flushed
  with open(killed, 'ab') as f:
    f.write(torn)
  log(resume(killed, restored), range(restored + 1, 10))
  assert killed.read_bytes() == unbroken.read_bytes()
  resume(killed, 9).close()  # nothing to cut
  assert killed.read_bytes() == unbroken.read_bytes()


def test_attempts_show_in_the_second_file_only(tmp_path):
  path = tmp_path / 'timing'
  log(Metrics(path, attempt=1), range(6))
  log(resume(path, 3, attempt=2), [4])
  steps = [(x['step'], x['attempt']) for x in read(path) if x['split'] == 'train']
  assert steps == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2)]


def test_a_symlink_is_refused_and_its_target_untouched(tmp_path):
  target = tmp_path / 'outside'
  target.write_text('mine')
  (tmp_path / 'm').symlink_to(target)
  with pytest.raises(errors.RunDirError, match='symlink'):
    Metrics(tmp_path / 'm')
  assert target.read_text() == 'mine'


def test_tensorboard_gets_the_same_numbers(tmp_path):
  pytest.importorskip('tensorboardX')
  metrics = Metrics(tmp_path / 'm', tensorboard_dir=tmp_path / 'tb')
  metrics.scalars(1, {'loss': 2.5})
  metrics.close()
  (events,) = (tmp_path / 'tb').iterdir()
  assert b'train/loss' in events.read_bytes()
