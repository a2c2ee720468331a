"""Records the trajectory of official SubTrack++ that `subtrack_parity_test.py` reads.

Needs torch, transformers and a checkout of GitHub's criticalml-uw/SubTrack at the commit
below, named by PYTHONPATH; then `python tests/parity/record_subtrack.py`. The file it
writes is data alone; nothing of that code is needed by the tests.

Provenance: class `AdamW` of `low_rank_torch/adamw.py`, arguments as below. The first basis
gets the sign convention of `lrjax.fix_signs`, `.to('cuda')` is taken to mean nothing, and
`track_the_subspace` is given G / |G|, since the official step depends on the gradient's
scale and ours does not. Only matrices with more inputs than outputs are recorded: the code
never updates the others' subspace. `adaptive_optimizer` is off: the code moves the moments
after the update they should have served, from the first basis instead of the last one.
"""

import numpy as np
from inputs import KEPT, inputs, write

COMMIT = '94f2b654e8e52351eb26166dc2c047027aa01143'
ARGS = dict(
  rank=4,
  scale=0.25,
  proj_type='std',
  subspace_update_method='subtrack',
  subspace_update_interval=5,
  st_init_step_size=0.5,
  st_step_size_scheduler='constant',
  st_step_size_coef=1.0,
  st_noise_sigma2=0.0,
  st_subspace_coef=1.0,
  adaptive_optimizer=False,
  recovery_scaling=True,
)
LR, WEIGHT_DECAY, NAME = 1e-2, 0.1, 'tall'


def main() -> None:
  import torch
  from low_rank_torch.adamw import AdamW
  from low_rank_torch.low_rank_projector import LowRankProjector

  move = torch.Tensor.to
  torch.Tensor.to = lambda x, *a, **kw: x if a[:1] == ('cuda',) else move(x, *a, **kw)
  plain = LowRankProjector.get_orthogonal_matrix

  def canonical(self, weights, rank, type, rand):
    p = plain(self, weights, rank, type, rand)
    axis = 0 if type == 'right' else 1  # the axis that runs along the rank
    largest = p.abs().argmax(1 - axis, keepdim=True)
    return p * torch.sign(torch.gather(p, 1 - axis, largest))

  LowRankProjector.get_orthogonal_matrix = canonical
  track = LowRankProjector.track_the_subspace
  LowRankProjector.track_the_subspace = lambda self, g: track(self, g / g.norm())
  start, gradients = inputs(NAME)
  p = torch.nn.Parameter(torch.tensor(start.T.copy()))  # torch keeps (out, in)
  groups = [{'params': [p], **ARGS}]
  tx = AdamW(groups, lr=LR, weight_decay=WEIGHT_DECAY, no_deprecation_warning=True)
  path = []
  for g in gradients:
    p.grad = torch.tensor(g.T.copy())
    tx.step()
    path.append(p.detach().numpy().T.copy())
  basis = tx.state[p]['projector'].ortho_matrix.numpy()
  arrays = dict(params=np.stack([path[t] for t in KEPT]), basis=basis)
  meta = dict(
    repository='criticalml-uw/SubTrack',
    commit=COMMIT,
    cls='low_rank_torch.adamw.AdamW',
    name=NAME,
    lr=LR,
    weight_decay=WEIGHT_DECAY,
    kept=KEPT,
    **ARGS,
  )
  write('subtrack', meta, arrays)


if __name__ == '__main__':
  main()
