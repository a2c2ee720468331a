"""Pictures of runs; each function draws one idea into one pair of axes."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.report.runs import Run
from experiments.units import MISSING, fixed, known, milliseconds, size

# Okabe and Ito's palette without yellow: told apart with any colour vision.
_COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
_DASHES = ('-', '--', ':', '-.')
_GRAY = '#6b6b6b'
_STYLE = {
  'font.family': 'DejaVu Sans',
  'font.size': 11,
  'axes.titlesize': 12,
  'axes.titleweight': 'bold',
  'axes.titlelocation': 'left',
  'axes.labelcolor': '#333333',
  'axes.edgecolor': '#999999',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': '#e4e4e4',
  'xtick.color': '#333333',
  'ytick.color': '#333333',
  'legend.frameon': False,
  'figure.facecolor': 'white',
}


def draw_all(runs: Sequence[Run]) -> dict[str, bytes]:
  """Every picture of these runs.

  Returns:
    File name -> PNG. `overview.png` holds the four that matter most; a picture of
    something that no run recorded is left out.
  """
  has_time = any(len(run.timing[0]) for run in runs)
  has_bytes = any(known(run.summary.optimizer_bytes) for run in runs)
  measured = [run for run in runs if len(run.subspaces[0])]
  panels = {
    'loss.png': loss_over_steps,
    'loss_seconds.png': loss_over_seconds if has_time else None,
    'validation.png': validation if any(len(run.valid[0]) for run in runs) else None,
    'memory.png': memory if has_bytes else None,
    'step_time.png': step_time if has_time else None,
    'energy.png': energy if measured else None,
    'overlap.png': overlap if measured else None,
  }
  panels = {name: draw for name, draw in panels.items() if draw}
  pictures = {name: picture(runs, [draw]) for name, draw in panels.items()}
  more = ('validation.png', 'energy.png', 'overlap.png')
  shown = [draw for name, draw in panels.items() if name not in more]
  return {'overview.png': picture(runs, shown)} | pictures


def loss_over_steps(ax, runs: Sequence[Run]) -> None:
  """Training loss over steps, with the validation loss as dots."""
  _losses(ax, runs, lambda run, steps: steps)
  ax.set(title='Loss over steps', xlabel='step')


def loss_over_seconds(ax, runs: Sequence[Run]) -> None:
  """The same over the time spent in steps."""
  _losses(ax, runs, Run.seconds_at)
  ax.set(title='Loss over time', xlabel='seconds in training steps')


def validation(ax, runs: Sequence[Run]) -> None:
  """Validation loss over the last three quarters of the evaluations."""
  for run, color, dash in styled(runs):
    steps, losses = finite(*run.valid)
    late = slice(len(steps) // 4, None)
    last = fixed(losses[-1]) if len(losses) else MISSING
    ax.plot(
      steps[late],
      losses[late],
      dash,
      color=color,
      marker='o',
      ms=4.5,
      label=f'{label(run)}: {last} at the end',
    )
  ax.set(title='Validation loss', xlabel='step', ylabel='loss (nats/token)')
  _legend(ax, runs)


def memory(ax, runs: Sequence[Run]) -> None:
  """Bytes of optimizer state as bars, against those of Adam as outlines."""
  sizes = [(run.summary.optimizer_bytes, run.summary.adam_bytes) for run in runs]
  longest = max(n for pair in sizes for n in pair if known(n))
  power, unit = byte_unit(longest)
  for i, (run, color, _) in enumerate(styled(runs)):
    used, adam = sizes[i]
    text = f'{label(run)}: {size(used)}'
    if known(used):
      ax.barh(i, used / power, 0.4, color=color)
    if known(adam):
      ax.barh(i, adam / power, 0.4, fill=False, ec=_GRAY, lw=1.2, ls=(0, (3, 2)))
    if known(used) and adam:
      text += f', {100 * used / adam:.0f} % of Adam'
    ax.annotate(text, (0, i - 0.21), (1, 2), textcoords='offset points')
  ax.set_ylim(len(runs) - 0.65, -0.45 - 0.04 * len(runs))
  ax.set_xlim(0, longest / power * 1.04 or 1)
  ax.set_yticks([])
  ax.grid(axis='y', visible=False)
  ax.spines['left'].set_visible(False)
  ax.set(title='Optimizer state (dashed: Adam)', xlabel=unit)


def step_time(ax, runs: Sequence[Run]) -> None:
  """Milliseconds of every step; those that refresh bases are diamonds."""
  for run, color, dash in styled(runs):
    steps, seconds, refresh = run.timing
    steps, ms, refresh = finite(steps, 1000 * seconds, refresh)
    thin = slice(None, None, 1 + len(steps) // 3000)
    dots = {'color': color, 'ls': 'none'}
    ax.plot(steps[~refresh][thin], ms[~refresh][thin], '.', ms=3, alpha=0.35, **dots)
    ax.plot(steps[refresh], ms[refresh], 'D', ms=6, mec='white', mew=0.6, **dots)
    text = f'{label(run)}: {milliseconds(run.summary.steady_ms)}'
    if known(run.summary.refresh_ms):
      text += f', refresh {milliseconds(run.summary.refresh_ms)}'
    ax.plot([], [], dash, color=color, lw=2, label=text)
    if not refresh.all():
      ax.axhline(np.median(ms[~refresh]), color=color, ls=dash, lw=1.2)
  ax.set_yscale('log')
  title = 'Time of each step (diamonds: refresh of bases)'
  ax.set(title=title, xlabel='step', ylabel='milliseconds')
  low, high = ax.get_ylim()
  # Room above the points for the legend, as a share of the height.
  room = 0.06 + 0.07 * (len(runs) if len(runs) <= 4 else -(-len(runs) // 2))
  ax.set_ylim(low, high * (high / low) ** (min(room, 0.6) / (1 - min(room, 0.6))))
  plain_log_ticks(ax)
  _legend(ax, runs)


def energy(ax, runs: Sequence[Run]) -> None:
  """Share of the gradient inside the subspaces, over steps."""
  _subspaces(ax, runs, 1)
  ax.set(title='Gradient energy in the subspaces', ylabel='share of squares')


def overlap(ax, runs: Sequence[Run]) -> None:
  """Share of the subspaces that stayed at their last change, over steps."""
  _subspaces(ax, runs, 2)
  ax.set(title='Overlap of subspaces one after the other', ylabel='share')


def _subspaces(ax, runs, column):
  for run, color, dash in styled(runs):
    steps, values = run.subspaces[0], run.subspaces[column]
    there = values > 0
    if there.any():
      ax.plot(
        steps[there], values[there], dash, color=color, marker='.', label=label(run)
      )
  ax.set_ylim(0, 1.02)
  ax.set_xlabel('step')
  _legend(ax, [run for run in runs if len(run.subspaces[0])])


def _losses(ax, runs, position: Callable):
  starts = []
  for run, color, dash in styled(runs):
    steps, losses = finite(*run.train)
    x = position(run, steps)
    ax.plot(x, losses, color=color, alpha=0.22 if len(runs) < 4 else 0.08, lw=0.8)
    ax.plot(x, smooth(losses), dash, color=color, lw=1.8, label=label(run))
    starts.extend(losses[:1])
    steps, losses = finite(*run.valid)
    dots = {'ms': 5, 'mec': 'white', 'mew': 0.7, 'color': color}
    ax.plot(position(run, steps), losses, 'o', **dots)
  if starts:
    # A run that blows up would squeeze all the others into one line.
    ax.set_ylim(top=max(starts) * 1.06)
  ax.set_yscale('log')
  plain_log_ticks(ax)
  ax.set_ylabel('loss (nats/token)')
  ax.plot([], [], 'o', ms=5, color=_GRAY, label='dots: validation')
  _legend(ax, runs)


def picture(runs: Sequence[Any], draws: Sequence[Callable]) -> bytes:
  """A PNG of `draw(axes, runs)` for each of `draws`, in two columns."""
  import matplotlib
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  from matplotlib.layout_engine import ConstrainedLayoutEngine

  columns = min(2, len(draws))
  rows = -(-len(draws) // columns)
  with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.1)
    width, height = (12.0, 4.4) if columns == 2 else (8.0, 4.5)
    figure = Figure((width, height * rows), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for ax, draw in zip(axes, draws):
      draw(ax, runs)
    for ax in axes[len(draws) :]:
      ax.set_axis_off()
    file = io.BytesIO()
    # Without its version in the file the same numbers give the same bytes.
    figure.savefig(file, format='png', metadata={'Software': None})
  return file.getvalue()


def styled(runs):
  """Yields (run, color, dash), all different up to 28 runs."""
  for i, run in enumerate(runs):
    yield run, _COLORS[i % len(_COLORS)], _DASHES[i // len(_COLORS) % len(_DASHES)]


def label(run) -> str:
  """The name as text: matplotlib reads dollars as mathematics."""
  return run.name[:40].replace('$', r'\$')


def finite(x, y, *others):
  keep = np.isfinite(y)
  return x[keep], y[keep], *(other[keep] for other in others)


def smooth(y: np.ndarray) -> np.ndarray:
  """Centred mean over a fortieth of the run or five steps; narrow at the start."""
  half = max(2, len(y) // 80)
  total = np.concatenate([[0.0], np.cumsum(y)])
  i = np.arange(len(y))
  first = np.maximum(i - half, 0)
  last = np.minimum(np.minimum(i + half, 2 * i), len(y) - 1)
  return (total[last + 1] - total[first]) / (last + 1 - first)


def _legend(ax, runs):
  if len(runs) <= 4:
    ax.legend(loc='upper right', fontsize=10.5)
  else:
    narrow = {'handlelength': 1.4, 'handletextpad': 0.5, 'columnspacing': 1.0}
    ax.legend(loc='upper right', ncols=2, fontsize=8.5, **narrow)


def plain_log_ticks(ax):
  from matplotlib import ticker

  low, high = ax.get_ylim()
  steps = (
    ((1, 1.5, 2, 3, 4, 5, 7), 12),
    ((1, 2, 5), 200),
    ((1, 3), 3000),
    ((1,), np.inf),
  )
  subs = next(subs for subs, ratio in steps if high / low <= ratio)
  ax.yaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=99))
  ax.yaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
  ax.yaxis.set_minor_locator(ticker.NullLocator())


def byte_unit(longest):
  powers = {2**40: 'TiB', 2**30: 'GiB', 2**20: 'MiB', 2**10: 'KiB'}
  return next(((p, unit) for p, unit in powers.items() if longest >= p), (1, 'bytes'))
