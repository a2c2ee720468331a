"""The picture of a study; each function draws one idea into one pair of axes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.report.plots import (
  byte_unit,
  finite,
  label,
  picture,
  plain_log_ticks,
  smooth,
  styled,
)
from experiments.units import known


def overview(entries: Sequence[Any]) -> bytes:
  """All there is to see, as a PNG.

  Args:
    entries: `studies.Entry` of each method, in the order in which to show them.
  """
  draws = [losses, state, times, sweeps, curves, energy, overlap, names]
  if not any(len(run.subspaces[0]) for e in entries for run in e.runs):
    draws = [losses, state, times, sweeps, curves, names]
  return picture(entries, draws)


def losses(ax, entries) -> None:
  """Validation loss of every seed, and their mean."""
  for i, (e, color, _) in enumerate(styled(entries)):
    values = np.array([x for x in e.losses if np.isfinite(x)])
    ax.plot(values, np.full(len(values), i), 'o', ms=5, color=color, alpha=0.6)
    if np.isfinite(e.loss):
      ax.plot(e.loss, i, '|', ms=14, mew=2, color=color)
  _rows(ax, entries)
  ax.set(title='Validation loss: seeds (dots) and mean', xlabel='nats/token')


def state(ax, entries) -> None:
  """Loss against bytes of optimizer state."""
  points = [(e.mean('optimizer_bytes'), e.loss) for e in entries]
  there = [b for b, loss in points if known(b) and known(loss)]
  power, unit = byte_unit(max(there, default=1))
  for (e, color, _), (used, loss) in zip(styled(entries), points):
    if known(used) and known(loss):
      ax.plot(used / power, loss, 'o', color=color, ms=6)
      at = dict(xytext=(5, 2), textcoords='offset points', fontsize=7.5)
      ax.annotate(label(e), (used / power, loss), **at)
  ax.set_xlim(left=0)
  ax.margins(x=0.2)
  ax.set(title='Loss over optimizer state', xlabel=unit, ylabel='nats/token')


def times(ax, entries) -> None:
  """Time of a steady step as bars, of a refresh as diamonds."""
  for i, (e, color, _) in enumerate(styled(entries)):
    steady, refresh = e.mean('steady_ms'), e.mean('refresh_ms')
    if known(steady):
      ax.barh(i, steady, 0.6, color=color)
    if known(refresh):
      ax.plot(refresh, i, 'D', ms=5, color=color, mec='black', mew=0.8)
  _rows(ax, entries)
  ax.set(title='Time of a step (diamonds: refresh)', xlabel='milliseconds')


def sweeps(ax, entries) -> None:
  """Loss over learning rates; a ring marks the best."""
  for e, color, dash in styled(entries):
    tried = {r: x for r, x in e.finding.losses.items() if np.isfinite(x)}
    ax.plot([*tried], [*tried.values()], dash, color=color, marker='.', lw=1.2)
    if e.finding.rate in tried:
      best = e.finding.rate
      ax.plot(best, tried[best], 'o', ms=8, mfc='none', mec=color)
  ax.set_xscale('log')
  title = 'Sweeps of the learning rate (rings: best)'
  ax.set(title=title, xlabel='peak learning rate', ylabel='nats/token')
  worst = [
    max(x.loss, min(x.finding.losses.values())) for x in entries if known(x.loss)
  ]
  if worst:
    # A rate far too large would squeeze all the others into one line.
    low = min(min(e.finding.losses.values()) for e in entries if e.finding.losses)
    ax.set_ylim(low - 0.05, max(worst) + 0.5)


def curves(ax, entries) -> None:
  """Training loss of the first seed at the best rate."""
  ends = []
  for e, color, dash in styled(entries):
    for run in e.runs[:1]:
      steps, values = finite(*run.train)
      ax.plot(steps, smooth(values), dash, color=color, lw=1.3)
      ends.extend(values[len(values) // 20 :][:1])
  if ends:
    ax.set_ylim(top=max(ends))
  ax.set_yscale('log')
  plain_log_ticks(ax)
  ax.set(title='Training loss, moving mean', xlabel='step', ylabel='nats/token')


def energy(ax, entries) -> None:
  """Share of the gradient inside the subspaces."""
  _subspaces(ax, entries, 1)
  ax.set(title='Gradient energy in the subspaces', ylabel='share of squares')


def overlap(ax, entries) -> None:
  """Share of the subspaces that stayed at their last change."""
  _subspaces(ax, entries, 2)
  ax.set(title='Overlap of subspaces one after the other', ylabel='share')


def names(ax, entries) -> None:
  """What the lines are."""
  for e, color, dash in styled(entries):
    ax.plot([], [], dash, color=color, lw=2, label=label(e))
  ax.set_axis_off()
  ax.legend(loc='center', ncols=2, fontsize=10)


def _subspaces(ax, entries, column):
  for e, color, dash in styled(entries):
    for run in e.runs[:1]:
      steps, values = run.subspaces[0], run.subspaces[column]
      there = values > 0  # 0 stands for what a method has not
      ax.plot(steps[there], values[there], dash, color=color, marker='.', lw=1.2)
  ax.set_ylim(0, 1.02)
  ax.set_xlabel('step')


def _rows(ax, entries):
  """A row for each method, the first one on top."""
  ax.set_yticks(range(len(entries)), [label(e) for e in entries], fontsize=8)
  ax.set_ylim(len(entries) - 0.4, -0.6)
  ax.grid(axis='y', visible=False)
