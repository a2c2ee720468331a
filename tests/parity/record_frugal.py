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
from inputs import KEPT, write

COMMIT = 'c7ebe4c242f7908e036c287e3a10512a84634648'
STEPS, LR, WEIGHT_DECAY, GAP, DENSITY = 25, 1e-2, 0.1, 10, 0.25
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


def gradients(seed: int, shape: tuple[int, ...]) -> np.ndarray:
  """Gradients (steps, *shape) with a decaying spectrum that slowly turns."""
  rng = np.random.default_rng(seed)
  n, m = shape
  s = min(n, m)
  u, v = (np.linalg.qr(rng.standard_normal((x, s)))[0] for x in (n, m))
  noise = 0.1 * rng.standard_normal((STEPS, n, m))
  return ((u * 0.7 ** np.arange(s)) @ v.T + noise).astype(np.float32)


def run(cls, options: dict, grads: list) -> tuple:
  """(start, params of kept steps, indices after each refresh) of matrices (in, out)."""
  import torch

  rng = np.random.default_rng(7)
  # Small weights, so that float32 rounding of the sum stays below the tolerance.
  start = [(0.1 * rng.standard_normal(g.shape[1:])).astype(np.float32) for g in grads]
  # torch keeps (out, in)
  params = [torch.nn.Parameter(torch.tensor(w.T.copy())) for w in start]
  groups = [dict(params=params, is_proj_params=True)]
  shared = dict(update_gap=GAP, density=DENSITY, lr=LR, weight_decay=WEIGHT_DECAY)
  tx = cls(groups, **shared, **options)
  path, drawn = [], []
  for t in range(STEPS):
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

  plain = GaLoreProjector._get_orthogonal_matrix

  def canonical(self, weights, rank, type):
    p = plain(self, weights, rank, type)
    axis = 0 if type == 'right' else 1  # the axis that runs along the rank
    largest = p.abs().argmax(1 - axis, keepdim=True)
    return p * torch.sign(torch.gather(p, 1 - axis, largest))

  GaLoreProjector._get_orthogonal_matrix = canonical
  torch.manual_seed(0)
  out = {f'{n}/gradients': gradients(sum(map(ord, n)), s) for n, s in SHAPES.items()}
  out['blocks/gradients'] = np.stack([gradients(i, (4, 6)) for i in range(BLOCKS)], 1)
  for name, (cls, options) in RUNS.items():
    if 'Adam' in cls:
      options = dict(options, no_deprecation_warning=True)
    if name == 'blocks':
      grads = list(np.moveaxis(out['blocks/gradients'], 1, 0))
      start, path, _ = run(getattr(frugal, cls), options, grads)
      out['blocks/start'], out['blocks/params'] = np.stack(start), np.stack(path, 1)
      continue
    for shape in SHAPES:
      start, path, drawn = run(
        getattr(frugal, cls), options, [out[f'{shape}/gradients']]
      )
      out[f'{name}/{shape}/start'], out[f'{name}/{shape}/params'] = start[0], path[0]
      if drawn:
        out[f'{name}/{shape}/indices'] = np.stack(drawn)
  meta = dict(
    repository='fzmushko/FRUGAL',
    commit=COMMIT,
    runs=RUNS,
    lr=LR,
    weight_decay=WEIGHT_DECAY,
    update_gap=GAP,
    density=DENSITY,
    kept=KEPT,
  )
  write('frugal', meta, out)


if __name__ == '__main__':
  main()
