"""Every notebook: small cells with text before them, no outputs, and it runs."""

import pathlib
import re

import nbclient
import nbformat
import pytest

from tests.compiling import QUICK

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / 'colab').glob('*.ipynb'))
assert NOTEBOOKS


def read(path):
  return nbformat.read(path, as_version=4)


def lines(cell):
  return [line for line in cell.source.splitlines() if line.strip()]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_is_committed_clean_and_readable(path):
  cells = read(path).cells
  assert cells[0].cell_type == 'markdown' and '?' in cells[0].source.splitlines()[0]
  code = [cell for cell in cells if cell.cell_type == 'code']
  assert 'find_spec' in code[0].source, 'the first code cell installs what is missing'
  assert not any(cell.outputs or cell.execution_count for cell in code)
  assert all(1 <= len(lines(cell)) <= 7 for cell in code)
  assert sum(len(lines(cell)) for cell in code) <= 90


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(path, monkeypatch):
  # One device and nothing compiled before, as its reader has; but compiled quickly.
  monkeypatch.setenv('XLA_FLAGS', ' '.join(QUICK))
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  notebook = read(path)
  for cell in notebook.cells:  # a third of the steps that its reader takes
    cell.source = re.sub(
      r'^(STEPS\b.*?= )(\d+)',
      lambda m: f'{m[1]}{int(m[2]) // 3}',
      cell.source,
      flags=re.M,
    )
  nbclient.NotebookClient(
    notebook,
    timeout=300,
    kernel_name='python3',
    resources={'metadata': {'path': str(path.parent)}},
  ).execute()
  outputs = [o for c in notebook.cells for o in c.get('outputs', ())]
  assert any('image/png' in o.get('data', {}) for o in outputs), 'no picture was drawn'
  assert not any(o.get('name') == 'stderr' for o in outputs), outputs
