"""What the recorded runs of several methods share: gradients, starts, and how to write.

The gradients and first weights are those in `galore_torch.npz`, kept there once.
"""

import importlib.metadata
import json
import pathlib

import numpy as np

HERE = pathlib.Path(__file__).parent
# Weights sum up all updates before them, so a few of them judge every step.
KEPT = (0, 1, 2, 5, 9, 10, 11, 19, 20, 24)
NAMES = ('tall', 'wide', 'square')  # (24, 12), (12, 24), (16, 16) as (in, out)


def inputs(name: str) -> tuple[np.ndarray, np.ndarray]:
  """First weights (in, out) and gradients (25, in, out) of one shape."""
  with np.load(HERE / 'galore_torch.npz', allow_pickle=False) as f:
    return f[f'{name}/start'], f[f'{name}/gradients']


def write(method: str, meta: dict, arrays: dict) -> None:
  """Writes `<method>.npz` with `meta` and the versions of what ran."""
  versions = {n: importlib.metadata.version(n) for n in ('torch', 'numpy')}
  text = json.dumps(dict(versions=versions, **meta))
  np.savez_compressed(HERE / f'{method}.npz', meta=np.array(text), **arrays)
  print(f'wrote {method}.npz: {text}')


def read(method: str) -> tuple[dict, dict[str, np.ndarray]]:
  """The meta and the arrays of `<method>.npz`."""
  with np.load(HERE / f'{method}.npz', allow_pickle=False) as f:
    return json.loads(str(f['meta'])), {k: f[k] for k in f.files if k != 'meta'}
