"""The report of a study: one table of all methods, the sweeps, one picture."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.report import study_plots, tables
from experiments.report.page import Page, write_page
from experiments.report.runs import Run, load_run
from experiments.report.tables import Table
from experiments.rundir import write_json
from experiments.study import Finding, Study
from experiments.units import MISSING, count, fixed, known, milliseconds, size


class Entry(NamedTuple):
  """One method: what was found, and its runs at the best rate, the first seed first."""

  finding: Finding
  runs: tuple[Run, ...]

  @property
  def name(self) -> str:
    """Of the method."""
    return self.finding.method

  @property
  def losses(self) -> list[float]:
    """Validation losses of the seeds; infinite where a run failed."""
    found = [run.summary.valid_loss for run in self.runs]
    return [math.inf if loss is None else loss for loss in found]

  @property
  def loss(self) -> float:
    """Their mean; infinite where no rate or not every seed came to an end."""
    return float(np.mean(self.losses)) if self.runs else math.inf

  @property
  def spread(self) -> float | None:
    """Half the distance between the worst and the best seed."""
    known_all = len(self.runs) > 1 and math.isfinite(self.loss)
    return (max(self.losses) - min(self.losses)) / 2 if known_all else None

  def mean(self, name: str) -> float | None:
    """Mean of one number of the summaries, where it is known."""
    found = [getattr(run.summary, name) for run in self.runs]
    found = [value for value in found if value is not None]
    return float(np.mean(found)) if found else None


def write_study(
  study: Study,
  found: Sequence[Finding],
  root: str | os.PathLike,
  out_dir: str | os.PathLike,
) -> Path:
  """Writes `report.md`, `report.html`, `overview.png` and `study.json`.

  Args:
    study: what was asked.
    found: what came out, see `experiments.study.findings`.
    root: directory of the runs.
    out_dir: made if it is missing; it needs nothing but itself and holds no weights.

  Returns:
    The path of `report.html`.
  """
  load = lambda f: tuple(load_run(Path(root) / name) for name in f.runs)
  entries = [Entry(f, load(f)) for f in found]
  ranked = sorted(entries, key=lambda e: e.loss)
  runs = [run for e in entries for run in e.runs]
  caption = 'Loss, memory and time of all methods, their sweeps, and their subspaces'
  page = Page(
    f'{len(entries)} methods at {_tokens(study)} tokens each',
    comparison(ranked),
    sentences(study, entries),
    {'overview.png': (caption, study_plots.overview(ranked))},
    [sweeps(ranked), tables.settings(_firsts(ranked)), tables.provenance(runs[:1])],
  )
  path = write_page(page, out_dir)
  write_json(Path(out_dir) / 'study.json', numbers(study, entries))
  return path


def comparison(entries: Sequence[Entry]) -> Table:
  """One row a method, as they are given; columns in which all are alike are left out."""
  columns = {
    'validation loss (nats)': _loss,
    'best rate': _rate,
    'trained weights': lambda e: count(e.mean('parameters')),
    'fixed': lambda e: size(e.mean('fixed_bytes')),
    'optimizer state': lambda e: size(e.mean('optimizer_bytes')),
    'of Adam': _share_of_adam,
    'temporary': lambda e: size(e.mean('temporary_bytes')),
    'tokens a second': lambda e: count(_tokens_per_second(e)),
    'steady step': lambda e: milliseconds(e.mean('steady_ms')),
    'refresh step': lambda e: milliseconds(e.mean('refresh_ms')),
    'captured energy': lambda e: fixed(e.mean('captured_energy'), 2),
    'overlap': lambda e: fixed(e.mean('overlap'), 2),
    'refreshes': lambda e: fixed(e.mean('refreshes'), 1),
  }
  cells = {name: [show(e) for e in entries] for name, show in columns.items()}
  always = [*columns][:2]
  told = {n: c for n, c in cells.items() if n in always or len({*c}) > 1}
  rows = [(e.name, *row) for e, row in zip(entries, zip(*told.values()))]
  return Table('Methods', ('method', *told), rows)


def sweeps(entries: Sequence[Entry]) -> Table:
  """Validation loss of every learning rate with the first seed."""
  width = max(len(e.finding.losses) for e in entries)
  rows = []
  for e in entries:
    cells = [
      f'{rate:g}: {fixed(loss) if math.isfinite(loss) else "failed"}'
      for rate, loss in e.finding.losses.items()
    ]
    rows.append((e.name, *cells, *[MISSING] * (width - len(cells))))
  header = ('method', *(f'rate {i + 1}' for i in range(width)))
  return Table('Learning rate: validation loss with the first seed', header, rows)


def sentences(study: Study, entries: Sequence[Entry]) -> list[str]:
  """What the table says, and what it does not."""
  first, sweep = entries[0], study.sweep
  spreads = [e.spread for e in entries if e.spread is not None]
  out = [
    f'Best of {len(sweep.factors)} or more learning rates for each method with the '
    f'first seed, then {sweep.seeds} seeds at that rate: the mean, and half the distance '
    'between the worst and the best seed. Same batches, same number of tokens, warm '
    'starts included.'
  ]
  if spreads:
    out.append(
      f'Between seeds losses differ by up to {fixed(2 * max(spreads))} nats; less than '
      'that between two methods says nothing.'
    )
  if math.isfinite(first.loss):
    above = [e.name for e in entries[1:] if e.loss > first.loss]
    out.append(
      f'{len(above)} of {len(entries) - 1} methods ended above {first.name}'
      + (f': {", ".join(above)}.' if above else '.')
    )
  if edges := [e.name for e in entries if e.finding.on_edge]:
    out.append(
      f'The best rate lies on the edge of the sweep, and a better one may lie beyond, '
      f'for: {", ".join(edges)}.'
    )
  failed = [
    f'{e.name} at {rate:g}'
    for e in entries
    for rate, loss in e.finding.losses.items()
    if not math.isfinite(loss)
  ]
  if failed:
    out.append(f'Not finite in the end: {", ".join(failed)}.')
  return out


def numbers(study: Study, entries: Sequence[Entry]) -> dict[str, Any]:
  """The study as JSON; null for what is not finite."""
  means = (
    'parameters', 'parameter_bytes', 'fixed_bytes', 'temporary_bytes',
    'optimizer_bytes', 'adam_bytes', 'steady_ms', 'refresh_ms', 'compile_seconds',
    'captured_energy', 'overlap', 'effective_rank', 'refreshes',
  )  # fmt: skip
  finite = lambda x: x if known(x) else None
  rows = [
    dict(
      method=e.name,
      options=dict(m.optimizer.options),
      kernel=m.kernel.name,
      kernel_options=dict(m.kernel.options),
      rate=e.finding.rate,
      on_edge=e.finding.on_edge,
      sweep={f'{rate:g}': finite(x) for rate, x in e.finding.losses.items()},
      losses=[finite(x) for x in e.losses],
      loss=finite(e.loss),
      spread=e.spread,
      **{name: e.mean(name) for name in means},
    )
    for m, e in zip(study.methods, entries)
  ]
  one = next((run.summary for e in entries for run in e.runs), None)
  made = dict(commit=one.commit, machine={**one.machine}) if one else {}
  return dict(methods=rows, tokens=_tokens(study), **made)


def _tokens(study):
  m = study.methods[0]
  return (m.warm_steps + m.steps) * m.data.batch_size * m.data.seq_len


def _firsts(entries):
  """The first run of each method under the method's name."""
  return [e.runs[0]._replace(name=e.name) for e in entries if e.runs]


def _loss(e):
  if not math.isfinite(e.loss):
    return 'failed'
  spread = '' if e.spread is None else f' ± {fixed(e.spread)}'
  return fixed(e.loss) + spread


def _rate(e):
  if e.finding.rate is None:
    return MISSING
  return f'{e.finding.rate:g}' + (' (edge)' if e.finding.on_edge else '')


def _tokens_per_second(e):
  parts = [e.mean(name) for name in ('tokens', 'steps', 'steady_ms')]
  if any(part is None for part in parts):
    return None
  tokens, steps, milliseconds = parts
  return 1e3 * tokens / steps / milliseconds


def _share_of_adam(e):
  used, adam = e.mean('optimizer_bytes'), e.mean('adam_bytes')
  return f'{100 * used / adam:.1f} %' if known(used) and adam else MISSING
