"""The report of several runs: Markdown, one self-contained HTML page, pictures."""

import base64
import html
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.report import tables
from experiments.report.plots import draw_all
from experiments.report.runs import Run, load_run
from experiments.rundir import write_text

_CAPTIONS = {
  'overview.png': 'Overview',
  'loss.png': 'Training loss: each step faint, a moving mean strong',
  'loss_seconds.png': 'The same over time, without compilation and evaluation',
  'validation.png': 'Loss on the validation set',
  'memory.png': 'Bytes of optimizer state; dashed, what Adam would keep',
  'step_time.png': 'Time of each step; diamonds refresh bases',
  'energy.png': 'Share of the gradient inside the subspaces, mean over matrices',
  'overlap.png': 'Share of the subspaces that stayed at their last change',
}
_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; margin: 1rem 0; }
th, td { padding: .35rem .7rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
td { overflow-wrap: anywhere; }
img { width: 100%; height: auto; }
figure { margin: 2rem 0; }
figcaption { color: #555; font-size: 14px; }
"""


def write_report(
  runs: Sequence[Run | str | os.PathLike],
  out_dir: str | os.PathLike,
  title: str = 'Comparison of runs',
) -> Path:
  """Writes `report.html`, `report.md` and the pictures it shows.

  The page needs nothing but itself: pictures are inside, no scripts, no links out.

  Args:
    runs: at least one, or their directories; changes are given against the first.
    out_dir: made if it is missing; files of an earlier report are replaced.
    title: heading of the report.

  Returns:
    The path of `report.html`.

  Raises:
    ValueError: no runs.
    RunDirError: a file to write is a symlink.
  """
  if not runs:
    raise ValueError('a report needs at least one run')
  loaded = [run if isinstance(run, Run) else load_run(run) for run in runs]
  more = [tables.details(loaded), tables.settings(loaded), tables.provenance(loaded)]
  page = Page(
    title,
    tables.comparison(loaded),
    tables.sentences(loaded),
    {name: (_CAPTIONS[name], p) for name, p in draw_all(loaded).items()},
    [table for table in more if table.rows],
  )
  return write_page(page, out_dir)


class Page(NamedTuple):
  """What a report shows, from top to bottom.

  Attributes:
    title: heading.
    table: the main one.
    sentences: what it says, in words.
    pictures: file name -> (caption, PNG).
    tables: those below the pictures.
  """

  title: str
  table: tables.Table
  sentences: Sequence[str]
  pictures: Mapping[str, tuple[str, bytes]]
  tables: Sequence[tables.Table]


def write_page(page: Page, out_dir: str | os.PathLike) -> Path:
  """Writes `report.html`, `report.md` and the pictures; returns the first's path."""
  out = Path(out_dir)
  out.mkdir(parents=True, exist_ok=True)
  for name, (_, picture) in page.pictures.items():
    write_text(out / name, picture)
  write_text(out / 'report.md', _markdown(page))
  write_text(out / 'report.html', _html(page))
  return out / 'report.html'


def _markdown(page):
  parts = [f'# {_plain(page.title)}', _markdown_table(page.table)]
  parts += map(_plain, page.sentences)
  parts += [f'![{caption}]({name})' for name, (caption, _) in page.pictures.items()]
  for table in page.tables:
    parts += [f'## {table.title}', _markdown_table(table)]
  return '\n\n'.join(parts) + '\n'


def _markdown_table(table):
  """Numbers to the right, names to the left."""
  lines = [table.header, [':--', *['--:'] * (len(table.header) - 1)], *table.rows]
  return '\n'.join(f'| {" | ".join(map(_plain, line))} |' for line in lines)


def _plain(text):
  """Text that means only itself in Markdown."""
  text = ''.join(c if c.isprintable() else ' ' for c in text)
  return re.sub(r'([\\`*_|<>\[\]])', r'\\\1', text)


def _html(page):
  body = [_tag('h1', page.title), _html_table(page.table)]
  body += [_tag('p', sentence) for sentence in page.sentences]
  for name, (caption, picture) in page.pictures.items():
    if name != 'overview.png' or len(page.pictures) == 1:
      body.append(_figure(caption, picture))
  for table in page.tables:
    body += [_tag('h2', table.title), _html_table(table)]
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'{_tag("title", page.title)}\n<style>{_CSS}</style>\n</head>\n<body>\n'
    + '\n'.join(body)
    + '\n</body>\n</html>\n'
  )


def _html_table(table):
  rows = [_row('th', table.header), *(_row('td', row) for row in table.rows)]
  return f'<div class="wide"><table>\n{chr(10).join(rows)}\n</table></div>'


def _row(kind, cells):
  return f'<tr>{"".join(_tag(kind, cell) for cell in cells)}</tr>'


def _figure(caption, picture):
  data = base64.b64encode(picture).decode()
  image = f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
  return f'<figure>{image}{_tag("figcaption", caption)}</figure>'


def _tag(name, text):
  return f'<{name}>{html.escape(text)}</{name}>'
