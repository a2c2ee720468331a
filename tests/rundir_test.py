"""One writer, safe names, atomic files, nothing of others touched (R11, R15, R17)."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys

import pytest

from experiments import errors, rundir

HOLD = """
import time
from experiments import rundir
with rundir.open_run({root!r}, 'a'):
  print('held', flush=True)
  time.sleep(60)
"""


def names(path):
  return sorted(p.name for p in path.iterdir())


@pytest.mark.parametrize(
  'name',
  ['../x', '..', '.', 'a/b', '/tmp/x', 'a\0b', 'a' * 129, '-rf', 'a b', 'a\n', '', 'é'],
)
def test_bad_names_are_refused(tmp_path, name):
  with pytest.raises(ValueError, match='run name'), rundir.open_run(tmp_path, name):
    pass
  assert names(tmp_path) == []


@pytest.mark.parametrize('name', ['a', '0', 'a' * 128, 'galore-60M_r128.v2'])
def test_good_names_are_taken(tmp_path, name):
  with rundir.open_run(tmp_path, name) as run:
    assert run.path == tmp_path / name and run.checkpoints.is_dir() and not run.existed


def test_a_symlinked_run_or_lock_is_refused(tmp_path):
  outside = tmp_path / 'outside'
  outside.write_text('mine')
  root = tmp_path / 'runs'
  (root / 'b').mkdir(parents=True)
  (root / 'a').symlink_to(tmp_path)
  (root / 'b' / '.lrjax.lock').symlink_to(outside)
  for name in 'ab':
    with (
      pytest.raises(errors.RunDirError, match='symlink'),
      rundir.open_run(root, name),
    ):
      pass
  assert outside.read_text() == 'mine'


def test_an_existing_run_needs_resume_or_overwrite(tmp_path):
  with rundir.open_run(tmp_path, 'a') as run:
    rundir.write_text(run.path / 'metrics.jsonl', 'old')
  with (
    pytest.raises(errors.RunExistsError, match='resume'),
    rundir.open_run(tmp_path, 'a'),
  ):
    pass
  with rundir.open_run(tmp_path, 'a', resume=True) as run:
    assert run.existed
  for n in (1, 2):
    with rundir.open_run(tmp_path, 'a', overwrite=True) as run:
      assert not run.existed
      assert names(run.path) == ['.lrjax.lock', 'checkpoints']
    assert names(tmp_path) == ['a', *(f'a.{i + 1}' for i in range(n))]
  assert (tmp_path / 'a.1' / 'metrics.jsonl').read_text() == 'old'
  with (
    pytest.raises(ValueError, match='exclude'),
    rundir.open_run(tmp_path, 'a', resume=True, overwrite=True),
  ):
    pass


def test_a_directory_of_somebody_else_is_no_run(tmp_path):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'a' / 'thesis.tex').write_text('years')
  for resume in (False, True):
    with (
      pytest.raises(errors.RunExistsError, match='thesis'),
      rundir.open_run(tmp_path, 'a', resume=resume),
    ):
      pass
  with rundir.open_run(tmp_path, 'a', overwrite=True):
    pass
  assert (tmp_path / 'a.1' / 'thesis.tex').read_text() == 'years'


def test_the_second_writer_learns_who_the_first_is(tmp_path):
  with rundir.open_run(tmp_path, 'a'):
    for flags in ({'resume': True}, {'overwrite': True}, {}):
      with pytest.raises(errors.RunLockedError, match=f'"pid": {os.getpid()}') as e:
        rundir.open_run(tmp_path, 'a', **flags).__enter__()
      assert socket.gethostname() in str(e.value) and 'started' in str(e.value)
  with rundir.open_run(tmp_path, 'a', resume=True):
    pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, caplog):
  child = subprocess.Popen(
    [sys.executable, '-c', HOLD.format(root=str(tmp_path))],
    stdout=subprocess.PIPE,
    env={**os.environ, 'PYTHONPATH': os.getcwd(), 'XLA_FLAGS': ''},
  )
  try:
    assert child.stdout.readline() == b'held\n'
    with pytest.raises(errors.RunLockedError, match=f'"pid": {child.pid}'):
      rundir.open_run(tmp_path, 'a', resume=True).__enter__()
  finally:
    child.send_signal(signal.SIGKILL)
    child.wait(30)
  with rundir.open_run(tmp_path, 'a', resume=True):
    assert f'"pid": {child.pid}' in caplog.text


def test_a_lock_left_on_another_host_is_not_guessed_about(tmp_path):
  with rundir.open_run(tmp_path, 'a') as run:
    pass
  lock = run.path / '.lrjax.lock'
  lock.write_text(json.dumps({'pid': 1, 'host': 'elsewhere'}))
  with pytest.raises(errors.RunLockedError, match='elsewhere'):
    rundir.open_run(tmp_path, 'a', resume=True).__enter__()
  lock.write_text('{"pid": 1, "ho')  # half written
  with rundir.open_run(tmp_path, 'a', resume=True):
    pass


def test_writes_are_atomic(tmp_path, monkeypatch):
  path = tmp_path / 'config.json'
  rundir.write_json(path, {'b': 1, 'a': [2, 'é']})
  assert json.loads(path.read_text()) == {'a': [2, 'é'], 'b': 1}
  before = path.read_bytes()
  with monkeypatch.context() as m:
    m.setattr(os, 'fsync', lambda fd: (_ for _ in ()).throw(OSError(28, 'full')))
    with pytest.raises(OSError, match='full'):
      rundir.write_text(path, 'new')
  assert path.read_bytes() == before and names(tmp_path) == ['config.json']
  with pytest.raises(ValueError, match='Out of range'):
    rundir.write_json(path, {'loss': float('nan')})
  assert path.read_bytes() == before


def test_writes_respect_the_umask_and_refuse_symlinks(tmp_path):
  old = os.umask(0o027)
  try:
    rundir.write_text(tmp_path / 'a', 'x')
  finally:
    os.umask(old)
  assert stat.S_IMODE((tmp_path / 'a').stat().st_mode) == 0o640
  (tmp_path / 'b').symlink_to(tmp_path / 'a')
  with pytest.raises(errors.RunDirError, match='symlink'):
    rundir.write_text(tmp_path / 'b', 'y')
  assert (tmp_path / 'a').read_text() == 'x'


def test_only_an_empty_directory_becomes_ours(tmp_path):
  rundir.own_directory(tmp_path / 'a')
  (tmp_path / 'a' / 'anything').mkdir()
  rundir.own_directory(tmp_path / 'a')
  (tmp_path / 'b').mkdir()
  (tmp_path / 'b' / 'notes').write_text('x')
  with pytest.raises(errors.RunDirError, match='notes'):
    rundir.own_directory(tmp_path / 'b')
  (tmp_path / 'c').symlink_to(tmp_path / 'a')
  with pytest.raises(errors.RunDirError, match='symlink'):
    rundir.own_directory(tmp_path / 'c')


def test_log_text_stays_on_one_line():
  assert rundir.escape('a\nb\x1b[0m é') == r'a\nb\x1b[0m é'
  error = ValueError('outer')
  error.__cause__ = OSError('in\nner')
  assert rundir.describe_error(error) == r'OSError: in\nner'
