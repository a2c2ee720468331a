"""Records the trajectories of GoLore's official code that `golore_parity_test.py` reads.

Needs torch, transformers and a checkout of GitHub's pkumelon/Golore at the commit below,
its folder `peft_pretraining` named by PYTHONPATH; then
`python tests/parity/record_golore.py`. The file it writes is data alone; nothing of that
code is needed by the tests.

Provenance: class `AdamW` of `golore_torch/adamw.py`, arguments as below. Bases get the
sign convention of `lrjax.fix_signs` while they are singular vectors; random ones are
recorded as P (compressed side first), in order of refresh. One defect is put right here:
the class rotates the momentum into a new tensor, updates that, and forgets it, so that
the stored momentum misses one step. Here the stored one is rotated in place.
"""

import numpy as np
from inputs import KEPT, NAMES, fix_signs, follow, inputs, parameter, write

COMMIT = '7ee5a8a461f8bc5bfaccf46c54513a783b09bc6b'
ARGS = dict(rank=4, update_proj_gap=5, scale=0.25, proj_type='std', rand_epoch=12)
SETTINGS = dict(lr=1e-2, weight_decay=0.1)


def main() -> None:
  from golore_torch.adamw import AdamW
  from golore_torch.golore_projector import GoLoreProjector

  plain = GoLoreProjector.get_orthogonal_matrix
  fix_signs(GoLoreProjector)
  fixed = GoLoreProjector.get_orthogonal_matrix
  drawn = []

  def basis(self, weights, rank, type, rand=False):
    if not rand:
      return fixed(self, weights, rank, type)
    p = plain(self, weights, rank, type, rand)
    drawn.append((p.T if type == 'right' else p).numpy().copy())
    return p

  GoLoreProjector.get_orthogonal_matrix = basis
  project = GoLoreProjector.project

  def rotating(state):
    def run(self, g, step, rand=False):
      old = self.ortho_matrix
      low, new = project(self, g, step, rand=rand)
      if new is not None and old is not None:
        m = state['exp_avg']
        left = self.proj_type == 'left'
        m.copy_(new.T @ (old @ m) if left else (m @ old) @ new.T)
      return low, None

    return run

  out = {}
  for name in NAMES:
    start, gradients = inputs(name)
    drawn.clear()
    p = parameter(start)
    tx = AdamW([{'params': [p], **ARGS}], no_deprecation_warning=True, **SETTINGS)
    GoLoreProjector.project = rotating(tx.state[p])
    out[f'{name}/params'] = follow(p, tx, gradients)[KEPT]
    out[f'{name}/drawn'] = np.stack(drawn)
  cls = 'golore_torch.adamw.AdamW'
  meta = dict(repository='pkumelon/Golore', commit=COMMIT, cls=cls, kept=KEPT)
  write('golore', out, **meta, **SETTINGS, **ARGS)


if __name__ == '__main__':
  main()
