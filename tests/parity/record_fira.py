"""Records the trajectories of Fira's official code that `fira_parity_test.py` reads.

Needs torch, transformers and a checkout of GitHub's xichen-fy/Fira at the commit below,
named by PYTHONPATH; then `python tests/parity/record_fira.py`. The file it writes is data
alone; nothing of that code is needed by the tests.

Provenance: class `AdamW` of `optimizer_torch/fira_adamw.py`, arguments as below. The
basis of `GradientProjector.get_orthogonal_matrix` gets the sign convention of
`lrjax.fix_signs`, because the trajectory depends on signs that LAPACK leaves open.
"""

import numpy as np
from inputs import KEPT, NAMES, inputs, write

COMMIT = '5c28b13408282b3ee65386b110318659412ddad9'
ARGS = dict(rank=4, update_proj_gap=10, alpha=0.25, proj_type='std')
LR, WEIGHT_DECAY = 1e-2, 0.1


def main() -> None:
  import torch
  from optimizer_torch.fira_adamw import AdamW
  from optimizer_torch.gradient_projection import GradientProjector

  plain = GradientProjector.get_orthogonal_matrix

  def canonical(self, weights, rank, type):
    p = plain(self, weights, rank, type)
    axis = 0 if type == 'right' else 1  # the axis that runs along the rank
    largest = p.abs().argmax(1 - axis, keepdim=True)
    return p * torch.sign(torch.gather(p, 1 - axis, largest))

  GradientProjector.get_orthogonal_matrix = canonical
  out = {}
  for name in NAMES:
    start, gradients = inputs(name)
    p = torch.nn.Parameter(torch.tensor(start.T.copy()))  # torch keeps (out, in)
    groups = [{'params': [p], **ARGS}]
    tx = AdamW(groups, lr=LR, weight_decay=WEIGHT_DECAY, no_deprecation_warning=True)
    path = []
    for g in gradients:
      p.grad = torch.tensor(g.T.copy())
      tx.step()
      path.append(p.detach().numpy().T.copy())
    out[f'{name}/params'] = np.stack([path[t] for t in KEPT])
  meta = dict(
    repository='xichen-fy/Fira',
    commit=COMMIT,
    cls='optimizer_torch.fira_adamw.AdamW',
    lr=LR,
    weight_decay=WEIGHT_DECAY,
    kept=KEPT,
    **ARGS,
  )
  write('fira', meta, out)


if __name__ == '__main__':
  main()
