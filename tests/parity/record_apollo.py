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
from inputs import KEPT, NAMES, follow, inputs, parameter, write

VARIANTS = {
  'channel': dict(rank=4, scale_type='channel', scale=1.0, front=False),
  'tensor': dict(rank=1, scale_type='tensor', scale=128.0, front=False),
  'tensor_front': dict(rank=1, scale_type='tensor', scale=128.0, front=True),
}
GAP, SETTINGS = 10, dict(lr=1e-2, weight_decay=0.1)


def main() -> None:
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
    group = {k: v for k, v in args.items() if k != 'front'}
    group |= dict(proj='random', update_proj_gap=GAP, proj_type='std')
    settings = dict(SETTINGS, scale_front=args['front'], no_deprecation_warning=True)
    for name in NAMES:
      start, gradients = inputs(name)
      drawn.clear()
      p = parameter(start)
      tx = APOLLOAdamW([{'params': [p], **group}], **settings)
      out[f'{variant}/{name}/params'] = follow(p, tx, gradients)[KEPT]
      out[f'{variant}/{name}/sketches'] = np.stack(drawn)
  write(
    'apollo',
    out,
    package='apollo-torch ' + importlib.metadata.version('apollo-torch'),
    repository='zhuhanqing/APOLLO',
    cls='APOLLOAdamW',
    kept=KEPT,
    update_proj_gap=GAP,
    variants=VARIANTS,
    **SETTINGS,
  )


if __name__ == '__main__':
  main()
