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

from inputs import KEPT, fix_signs, follow, inputs, parameter, write

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
SETTINGS, NAME = dict(lr=1e-2, weight_decay=0.1), 'tall'


def main() -> None:
  import torch
  from low_rank_torch.adamw import AdamW
  from low_rank_torch.low_rank_projector import LowRankProjector

  move = torch.Tensor.to
  torch.Tensor.to = lambda x, *a, **kw: x if a[:1] == ('cuda',) else move(x, *a, **kw)
  fix_signs(LowRankProjector)
  track = LowRankProjector.track_the_subspace
  LowRankProjector.track_the_subspace = lambda self, g: track(self, g / g.norm())
  start, gradients = inputs(NAME)
  p = parameter(start)
  tx = AdamW([{'params': [p], **ARGS}], no_deprecation_warning=True, **SETTINGS)
  path = follow(p, tx, gradients)
  basis = tx.state[p]['projector'].ortho_matrix.numpy()
  write(
    'subtrack',
    dict(params=path[KEPT], basis=basis),
    repository='criticalml-uw/SubTrack',
    commit=COMMIT,
    cls='low_rank_torch.adamw.AdamW',
    name=NAME,
    kept=KEPT,
    **SETTINGS,
    **ARGS,
  )


if __name__ == '__main__':
  main()
