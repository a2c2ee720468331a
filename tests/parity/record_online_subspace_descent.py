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

import numpy as np
from inputs import KEPT, NAMES, fix_signs, inputs, parameter, step, stub, write

COMMIT = 'e694775980036a62d2019957f075ff2c5c1c68ad'
ARGS = dict(rank=4, update_proj_gap=20, scale=0.25, proj_type='continuous')
LR, FALL = 1e-2, 0.97


def main() -> None:
  stub('wandb')
  from galore_torch.adamw import AdamW
  from galore_torch.galore_projector import GaLoreProjector

  fix_signs(GaLoreProjector)
  out = {}
  for name in NAMES:
    start, gradients = inputs(name)
    p = parameter(start)
    groups = [{'params': [p], 'names': [None], **ARGS}]
    tx = AdamW(groups, lr=LR, no_deprecation_warning=True)
    path = []
    for t, g in enumerate(gradients):
      tx.param_groups[0]['lr'] = LR * FALL**t
      path.append(step(p, tx, g))
    out[f'{name}/params'] = np.stack(path)[KEPT]
    basis = tx.state[p]['projector'].ortho_matrix.detach().numpy()
    out[f'{name}/basis'] = basis if basis.shape[1] == ARGS['rank'] else basis.T
  write(
    'online_subspace_descent',
    out,
    repository='kyleliang919/Online-Subspace-Descent',
    commit=COMMIT,
    cls='galore_torch.adamw.AdamW',
    lr=LR,
    fall=FALL,
    kept=KEPT,
    **ARGS,
  )


if __name__ == '__main__':
  main()
