"""The progress bar and its plain form."""

import io
import math
import time

import pytest

from experiments.progress import Progress


class Clock:
  """Seconds that pass as told."""

  now = 100.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  def isatty(self):
    return True


def run(stream, steps=40, seconds=0.5, first=0, compile_seconds=30.0, **kwargs):
  clock = Clock()
  with Progress('demo', steps, first, stream=stream, clock=clock, **kwargs) as bar:
    clock.now += compile_seconds
    for step in range(first + 1, steps + 1):
      clock.now += seconds
      bar.update(step, tokens=2048, loss=10.0 / step)
    bar.note('saved [step] 40')
  return stream.getvalue()


def test_plain_lines_tell_loss_rate_and_time_left():
  lines = run(io.StringIO()).splitlines()
  assert len(lines) == 21 and lines[-1] == 'saved [step] 40'
  assert lines[9] == 'demo  step 20/40  loss 0.500  4.10k tok/s  10.0 s left'
  assert lines[19] == 'demo  step 40/40  loss 0.250  4.10k tok/s  0.0 s left'


def test_a_run_shorter_than_the_number_of_lines_shows_each_step():
  assert len(run(io.StringIO(), steps=3).splitlines()) == 4


def test_resumed_run_counts_from_where_it_was():
  lines = run(io.StringIO(), first=38).splitlines()
  assert lines[0].startswith('demo  step 40/40') and len(lines) == 2


def test_terminal_shows_a_bar_and_notes(monkeypatch):
  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setenv('COLUMNS', '120')
  shown = run(Terminal())
  assert 'loss 0.250' in shown and '4.10k tok/s' in shown and '40/40' in shown
  assert 'starting' in shown and 'saved [step] 40' in shown and '\x1b[' in shown


def test_dumb_terminal_gets_plain_lines(monkeypatch):
  monkeypatch.setenv('TERM', 'dumb')
  assert '\x1b' not in run(Terminal())


@pytest.mark.parametrize('stream', [io.StringIO, Terminal])
def test_disabled_shows_nothing(stream):
  assert run(stream(), enabled=False) == ''


def test_missing_and_bad_losses_are_shown_as_such():
  stream = io.StringIO()
  with Progress('demo', 3, stream=stream) as bar:
    bar.update(1, 8)
    bar.update(2, 8, math.nan)
    bar.update(3, 8, 1.5)
    bar.update(3, 8)
  lines = stream.getvalue().splitlines()
  losses = [line.split('loss ')[1].split()[0] for line in lines]
  assert losses == ['–', 'nan', '1.500', '1.500']


def test_the_bar_is_closed_when_the_loop_fails(monkeypatch):
  monkeypatch.setenv('TERM', 'xterm')
  stream = Terminal()
  with pytest.raises(KeyboardInterrupt), Progress('demo', 9, stream=stream) as bar:
    bar.update(1, 8, 2.0)
    raise KeyboardInterrupt
  assert stream.getvalue().endswith('\n\x1b[?25h')  # the cursor is back


def test_a_step_costs_microseconds():
  with Progress('demo', 10**6, stream=io.StringIO()) as bar:
    bar.update(1, 8, 2.0)
    start = time.process_time()
    for step in range(2, 20_002):
      bar.update(step, 8, 2.0)
    assert (time.process_time() - start) / 20_000 < 20e-6  # 1 us on a quiet machine
