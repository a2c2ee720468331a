"""Records the trajectories of the official FRUGAL that `frugal_parity_test.py` reads.

Needs `pip install torch transformers` and the repository fzmushko/FRUGAL at commit
c7ebe4c242f7908e036c287e3a10512a84634648 on the path:

  PYTHONPATH=<checkout> python tests/parity/record_frugal.py

The file it writes is data alone; nothing of that package is needed by the tests.

Provenance: classes `GaloreAdamW`, `GaloreLion`, `CoordAdamW`, `BlockAdamW` of that commit,
arguments as below. Changed here and nowhere else: `torch.optim.optimizer._dispatch_sqrt`,
which recent torch lacks, is `math.sqrt`; singular vectors get the sign convention of
`lrjax.bases.orthonormal.fix_signs`, because moments that are kept depend on signs that
LAPACK leaves open; drawn indices are noted after each refresh, so that they can be fed.
"""

import math
import sys

import numpy as np
from inputs import KEPT, decaying_gradients, fix_signs, parameter, seed, weights, write

COMMIT = 'c7ebe4c242f7908e036c287e3a10512a84634648'
LR, WEIGHT_DECAY, GAP, DENSITY = 1e-2, 0.1, 10, 0.25
# (in, out), with sizes where rounding and flooring a quarter differ.
SHAPES = {'tall': (7, 6), 'wide': (10, 11)}
BLOCKS = 7
# name -> (class, arguments beyond those that all share)
RUNS = {
  'svd': ('GaloreAdamW', {}),
  'svd_kept': (
    'GaloreAdamW',
    dict(
      reset_statistics=False,
      inactive_update_rule='sgd',
      inactive_lr_scale=0.1,
      proj_params_lr_scale=0.5,
    ),
  ),
  'svd_lion': ('GaloreLion', {}),
  'columns': ('CoordAdamW', dict(inactive_lr_scale=0.5)),
  'blocks': ('BlockAdamW', dict(block_order='descending', proj_params_lr_scale=0.5)),
}


def run(cls, options: dict, grads: list) -> tuple:
  """(start, params of kept steps, indices after each refresh) of matrices (in, out)."""
  import torch

  rng = np.random.default_rng(7)
  start = [weights(g.shape[1:], rng) for g in grads]
  params = [parameter(w) for w in start]
  groups = [dict(params=params, is_proj_params=True)]
  shared = dict(update_gap=GAP, density=DENSITY, lr=LR, weight_decay=WEIGHT_DECAY)
  tx = cls(groups, **shared, **options)
  path, drawn = [], []
  for t in range(len(grads[0])):
    for p, g in zip(params, grads):
      p.grad = torch.tensor(g[t].T.copy())
    tx.step()
    path.append([p.detach().numpy().T.copy() for p in params])
    if t % GAP == 0 and 'Coord' in cls.__name__:
      drawn.append(tx.state[params[0]]['projector'].indices.numpy().copy())
  return start, [np.stack(w) for w in zip(*(path[t] for t in KEPT))], drawn


def main() -> None:
  import torch

  sys.modules['torch.optim.optimizer']._dispatch_sqrt = math.sqrt
  import frugal
  from frugal.galore_projector import GaLoreProjector

  fix_signs(GaLoreProjector, '_get_orthogonal_matrix')
  torch.manual_seed(0)
  out = {f'{n}/gradients': decaying_gradients(seed(n), s) for n, s in SHAPES.items()}
  blocks = [decaying_gradients(i, (4, 6)) for i in range(BLOCKS)]
  out['blocks/gradients'] = np.stack(blocks, 1)
  for name, (cls, options) in RUNS.items():
    if 'Adam' in cls:
      options = dict(options, no_deprecation_warning=True)
    if name == 'blocks':
      start, path, _ = run(getattr(frugal, cls), options, blocks)
      out['blocks/start'], out['blocks/params'] = np.stack(start), np.stack(path, 1)
      continue
    for shape in SHAPES:
      start, path, drawn = run(
        getattr(frugal, cls), options, [out[f'{shape}/gradients']]
      )
      out[f'{name}/{shape}/start'], out[f'{name}/{shape}/params'] = start[0], path[0]
      if drawn:
        out[f'{name}/{shape}/indices'] = np.stack(drawn)
  write(
    'frugal',
    out,
    repository='fzmushko/FRUGAL',
    commit=COMMIT,
    runs=RUNS,
    lr=LR,
    weight_decay=WEIGHT_DECAY,
    update_gap=GAP,
    density=DENSITY,
    kept=KEPT,
  )


if __name__ == '__main__':
  main()
