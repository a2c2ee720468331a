"""Records the trajectories of apollo-torch that `apollo_parity_test.py` reads.

Needs torch, transformers and `pip install --no-deps apollo-torch==1.0.3` (its package
imports bitsandbytes); then `python tests/parity/record_apollo.py`. The file it writes is
data alone; nothing of that package is needed by the tests.

Provenance: apollo-torch 1.0.3 (GitHub's zhuhanqing/APOLLO), class `APOLLOAdamW`,
arguments as below. Random sketches of torch cannot be drawn elsewhere, so those that
`GradientProjector.get_orthogonal_matrix` returned are recorded as P (in order of refresh,
compressed side first).
"""

import importlib.metadata

import numpy as np
from inputs import KEPT, NAMES, inputs, write

VARIANTS = {
  'channel': dict(rank=4, scale_type='channel', scale=1.0, front=False),
  'tensor': dict(rank=1, scale_type='tensor', scale=128.0, front=False),
  'tensor_front': dict(rank=1, scale_type='tensor', scale=128.0, front=True),
}
GAP, LR, WEIGHT_DECAY = 10, 1e-2, 0.1


def main() -> None:
  import torch
  from apollo_torch import APOLLOAdamW
  from apollo_torch.random_projector import GradientProjector

  plain = GradientProjector.get_orthogonal_matrix
  drawn = []

  def recorded(self, weights, rank, type, seed):
    p = plain(self, weights, rank, type, seed)
    drawn.append((p.T if type == 'right' else p).numpy().copy())
    return p

  GradientProjector.get_orthogonal_matrix = recorded
  out = {}
  for variant, args in VARIANTS.items():
    front = args['front']
    group = {k: v for k, v in args.items() if k != 'front'}
    group |= dict(proj='random', update_proj_gap=GAP, proj_type='std')
    for name in NAMES:
      start, gradients = inputs(name)
      drawn.clear()
      p = torch.nn.Parameter(torch.tensor(start.T.copy()))  # torch keeps (out, in)
      groups = [{'params': [p], **group}]
      kw = dict(lr=LR, weight_decay=WEIGHT_DECAY, scale_front=front)
      tx = APOLLOAdamW(groups, no_deprecation_warning=True, **kw)
      path = []
      for g in gradients:
        p.grad = torch.tensor(g.T.copy())
        tx.step()
        path.append(p.detach().numpy().T.copy())
      out[f'{variant}/{name}/params'] = np.stack([path[t] for t in KEPT])
      out[f'{variant}/{name}/sketches'] = np.stack(drawn)
  meta = dict(
    package='apollo-torch ' + importlib.metadata.version('apollo-torch'),
    repository='zhuhanqing/APOLLO',
    cls='APOLLOAdamW',
    lr=LR,
    weight_decay=WEIGHT_DECAY,
    kept=KEPT,
    update_proj_gap=GAP,
    variants=VARIANTS,
  )
  write('apollo', meta, out)


if __name__ == '__main__':
  main()
