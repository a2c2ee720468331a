"""Records the official trajectories that `online_subspace_descent_parity_test.py` reads.

Needs torch, transformers, bitsandbytes and a checkout of GitHub's
kyleliang919/Online-Subspace-Descent at the commit below, named by PYTHONPATH; then
`python tests/parity/record_online_subspace_descent.py`. The file it writes is data alone;
nothing of that code is needed by the tests.

Provenance: class `AdamW` of `galore_torch/adamw.py` with `proj_type='continuous'` (P moved
by torch's AdamW), arguments as below, the learning rate falling as `rates` says. The basis
of `GaLoreProjector.get_orthogonal_matrix` gets the sign convention of `lrjax.fix_signs`.
Its package imports wandb for logging alone, which an empty module stands in for.
"""

import sys
import types

import numpy as np
from inputs import KEPT, NAMES, inputs, write

COMMIT = 'e694775980036a62d2019957f075ff2c5c1c68ad'
ARGS = dict(rank=4, update_proj_gap=20, scale=0.25, proj_type='continuous')
LR, FALL = 1e-2, 0.97


def rates(steps: int) -> list[float]:
  """The learning rate at each step."""
  return [LR * FALL**t for t in range(steps)]


def main() -> None:
  import torch

  sys.modules['wandb'] = types.ModuleType('wandb')
  from galore_torch.adamw import AdamW
  from galore_torch.galore_projector import GaLoreProjector

  plain = GaLoreProjector.get_orthogonal_matrix

  def canonical(self, weights, rank, type):
    p = plain(self, weights, rank, type)
    axis = 0 if type == 'right' else 1  # the axis that runs along the rank
    largest = p.abs().argmax(1 - axis, keepdim=True)
    return p * torch.sign(torch.gather(p, 1 - axis, largest))

  GaLoreProjector.get_orthogonal_matrix = canonical
  out = {}
  for name in NAMES:
    start, gradients = inputs(name)
    p = torch.nn.Parameter(torch.tensor(start.T.copy()))  # torch keeps (out, in)
    tx = AdamW(
      [{'params': [p], 'names': [None], **ARGS}], lr=LR, no_deprecation_warning=True
    )
    path, bases = [], []
    for g, rate in zip(gradients, rates(len(gradients))):
      tx.param_groups[0]['lr'] = rate
      p.grad = torch.tensor(g.T.copy())
      tx.step()
      path.append(p.detach().numpy().T.copy())
      basis = tx.state[p]['projector'].ortho_matrix.detach().numpy().copy()
      bases.append(basis if basis.shape[1] == ARGS['rank'] else basis.T)
    out[f'{name}/params'] = np.stack([path[t] for t in KEPT])
    out[f'{name}/basis'] = bases[-1]
  meta = dict(
    repository='kyleliang919/Online-Subspace-Descent',
    commit=COMMIT,
    cls='galore_torch.adamw.AdamW',
    lr=LR,
    fall=FALL,
    kept=KEPT,
    **ARGS,
  )
  write('online_subspace_descent', meta, out)


if __name__ == '__main__':
  main()
