"""Tables and sentences that compare runs, as data, and as text for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.report.runs import Run
from experiments.rundir import escape
from experiments.units import (
  MISSING,
  count,
  duration,
  fixed,
  known,
  milliseconds,
  percent,
  size,
)

_SEED_NOISE = 0.02  # nats a token between two seeds of the demo


class Table(NamedTuple):
  """A table of texts; the first column names its rows."""

  title: str
  header: tuple[str, ...]
  rows: Sequence[tuple[str, ...]]


def comparison(runs: Sequence[Run]) -> Table:
  """The numbers that matter most, one row a run, with changes from the first run."""
  columns = {
    'validation loss (nats)': (lambda r: r.summary.valid_loss, fixed, _difference),
    'bits per byte': (lambda r: r.summary.bits_per_byte, fixed, _difference),
    'optimizer state': (lambda r: r.summary.optimizer_bytes, size, _ratio),
    'steady step': (lambda r: r.summary.steady_ms, milliseconds, _ratio),
    'refresh step': (lambda r: r.summary.refresh_ms, milliseconds, None),
    'average step': (lambda r: r.average_ms, milliseconds, _ratio),
    'training time': (lambda r: r.summary.train_seconds, duration, None),
  }
  cells = [[_cell(runs[0], r, *spec) for spec in columns.values()] for r in runs]
  rows = [(run.name, *row) for run, row in zip(runs, cells)]
  return Table('Comparison', ('run', *columns), rows)


def details(runs: Sequence[Run]) -> Table:
  """All final numbers, one column a run."""
  table = {
    'validation loss (nats/token)': lambda r: fixed(r.summary.valid_loss, 4),
    'bits per byte': lambda r: fixed(r.summary.bits_per_byte, 4),
    'perplexity per token': lambda r: fixed(r.summary.perplexity, 2),
    'steps': lambda r: _whole(r.summary.steps),
    'skipped steps': lambda r: _whole(r.summary.skipped_steps),
    'refresh steps': lambda r: _whole(r.refreshes),
    'tokens': lambda r: _whole(r.summary.tokens),
    'tokens per second': _tokens_per_second,
    'parameters': lambda r: _whole(r.summary.parameters),
    'parameter bytes': lambda r: _whole(r.summary.parameter_bytes),
    'fixed bytes': lambda r: _whole(r.summary.fixed_bytes),
    'gradient bytes': lambda r: _whole(r.summary.gradient_bytes),
    'optimizer state bytes': lambda r: _whole(r.summary.optimizer_bytes),
    'the same in Adam': lambda r: _whole(r.summary.adam_bytes),
    'temporary bytes of a step': lambda r: _whole(r.summary.temporary_bytes),
    'steady step (median)': lambda r: milliseconds(r.summary.steady_ms),
    'refresh step (median)': lambda r: milliseconds(r.summary.refresh_ms),
    'compilation': lambda r: duration(r.summary.compile_seconds),
    'training time': lambda r: duration(r.summary.train_seconds),
  }
  rows = [(name, *map(cell, runs)) for name, cell in table.items()]
  return Table('All numbers', ('', *_names(runs)), rows)


def settings(runs: Sequence[Run]) -> Table:
  """The settings in which the runs differ."""
  columns = [_flat(run.config) for run in runs]
  names = dict.fromkeys(name for column in columns for name in column)
  rows = [(n, *(_text(column.get(n, MISSING)) for column in columns)) for n in names]
  rows = [row for row in rows if len(set(row[1:])) > 1 and row[0] != 'name']
  return Table('Settings that differ', ('', *_names(runs)), rows)


def provenance(runs: Sequence[Run]) -> Table:
  """Text, machine and versions; one column where all runs agree."""
  facts = []
  for run in runs:
    s = run.summary
    groups = {'text': s.corpus, 'machine': s.machine, 'version': s.versions}
    facts.append({**_flat(groups), 'commit': s.commit or MISSING})
  if all(fact == facts[0] for fact in facts):
    rows = [(name, _text(value)) for name, value in facts[0].items()]
    return Table('Where the numbers come from', ('', 'all runs'), rows)
  rows = [
    (name, *(_text(fact.get(name, MISSING)) for fact in facts))
    for name in dict.fromkeys(name for fact in facts for name in fact)
  ]
  return Table('Where the numbers come from', ('', *_names(runs)), rows)


def sentences(runs: Sequence[Run]) -> list[str]:
  """What each further run saved against the first, and what it cost."""
  found = [_sentence(runs[0], run) for run in runs[1:]]
  found = [sentence for sentence in found if sentence]
  if found:
    found.append(
      f'One seed each: a difference in loss under about {_SEED_NOISE} nats/token says '
      'nothing, and another learning rate may move it more than the method does.'
    )
  return found


def terminal_table(runs: Sequence[Run]) -> None:
  """Prints the comparison and its sentences to the terminal."""
  import rich.box
  import rich.console
  import rich.table
  import rich.text

  table = comparison(runs)
  shown = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
  for i, name in enumerate(table.header):
    side = 'left' if i == 0 else 'right'
    shown.add_column(name.replace(' ', '\n'), justify=side, no_wrap=True)
  for row in table.rows:
    shown.add_row(*(rich.text.Text(cell.replace(' (', '\n(')) for cell in row))
  console = rich.console.Console()
  if not console.is_terminal:
    console = rich.console.Console(width=120)
  console.print(shown)
  for sentence in sentences(runs):
    console.print(sentence, markup=False, highlight=False)


def _sentence(first, run):
  """None where the numbers are not there."""
  a, b = first.summary, run.summary
  numbers = (a.optimizer_bytes, a.valid_loss, b.optimizer_bytes, b.valid_loss)
  averages = (first.average_ms, run.average_ms)
  if not all(map(known, (*numbers, *averages))) or not first.average_ms:
    return None
  time = run.average_ms / first.average_ms
  refreshes = ''
  if run.refreshes and known(b.refresh_ms):
    refreshes = (
      f' (a steady one {milliseconds(b.steady_ms)} against '
      f'{milliseconds(a.steady_ms)}; {run.refreshes} of {len(run.timing[0])} '
      f'refreshed bases in {milliseconds(b.refresh_ms)} each)'
    )
  return (
    f'{run.name} kept {size(b.optimizer_bytes)} of optimizer state where '
    f'{first.name} kept {size(a.optimizer_bytes)} '
    f'({_ratio(a.optimizer_bytes, b.optimizer_bytes)}); '
    f'its steps took {_change(time, "longer", "less time")} on average{refreshes}; '
    f'its validation loss ended at {fixed(b.valid_loss)} against '
    f'{fixed(a.valid_loss)} nats/token ({_verdict(b.valid_loss - a.valid_loss)}).'
  )


def _change(ratio, more, less):
  change = round(abs(ratio - 1) * 100)
  return f'{change} % {more if ratio > 1 else less}' if change else 'as long'


def _verdict(loss):
  if abs(loss) < _SEED_NOISE:
    return 'no difference that one seed could show'
  return f'{fixed(abs(loss))} {"lower" if loss < 0 else "higher"}'


def _cell(first, run, value, show, change):
  text = show(value(run))
  if change and run is not first and known(value(run)) and known(value(first)):
    text += f' ({change(value(first), value(run))})'
  return text


def _difference(a, b):
  return fixed(b - a, sign=True)


def _ratio(a, b):
  return percent(b / a if a else None)


def _tokens_per_second(run):
  s = run.summary
  return count(s.tokens / s.train_seconds) if s.tokens and s.train_seconds else MISSING


def _flat(mapping: Mapping[str, Any], prefix='') -> dict[str, Any]:
  flat = {}
  for name, value in mapping.items():
    if isinstance(value, Mapping):
      flat |= _flat(value, f'{prefix}{name}.')
    else:
      flat[f'{prefix}{escape(name)}'] = value
  return flat


def _names(runs):
  return [run.name for run in runs]


def _whole(n):
  return MISSING if n is None else f'{n:,}'.replace(',', ' ')


def _text(value):
  return escape(str(value))
