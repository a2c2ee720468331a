"""Records what the official Q-GaLore projector does, for `q_galore_parity_test.py`.

Needs torch, bitsandbytes (imported by the package, not used here) and the repository
VITA-Group/Q-GaLore at the commit below on PYTHONPATH, then
`python tests/parity/record_q_galore.py`. The file it writes is data alone; nothing
of that package is needed by the tests.

Provenance: VITA-Group/Q-GaLore, commit 5bd2f1c5a1aded31223d7f15c4604c4d56cfe1e6,
`q_galore_torch/q_galore_projector.py`, class `GaLoreProjector`, arguments as below, its
`project` and `project_back` on R itself; and `AdamW8bit._quantize` of
`q_galore_torch/q_galore_adamw8bit.py`, the quantizer of the weights. The optimizer class
around them needs a GPU and a bitsandbytes older than 0.44. Patched here: the basis gets
the sign convention of `lrjax.fix_signs`, because LAPACK leaves signs open.
"""

import numpy as np
from inputs import decaying, fix_signs, seed, write

COMMIT = '5bd2f1c5a1aded31223d7f15c4604c4d56cfe1e6'
SHAPES = {'tall': (16, 8), 'wide': (8, 16), 'square': (12, 12)}  # (in, out)
STEPS = 18
ARGS = dict(
  rank=4,
  update_proj_gap=1,
  scale=0.25,
  group_size=16,
  n_bit=4,
  cos_threshold=0.4,
  gamma_proj=2,
  queue_size=3,
)


def gradients(name: str) -> np.ndarray:
  """Seeded gradients (steps, in, out) that turn wildly up to step 4 and little then."""
  rng = np.random.default_rng(seed(name))
  bases = [decaying(rng, SHAPES[name]) for _ in range(5)]
  noise = 0.02 * rng.standard_normal((STEPS, *SHAPES[name]))
  steps = [bases[min(t, 4)] + noise[t] for t in range(STEPS)]
  return np.stack(steps).astype(np.float32)


def main() -> None:
  import torch
  from q_galore_torch import QGaLoreAdamW8bit
  from q_galore_torch.q_galore_projector import GaLoreProjector

  fix_signs(GaLoreProjector)
  out = {}
  for name in SHAPES:
    for quant in (True, False):
      projector = GaLoreProjector(proj_type='std', quant=quant, **ARGS)
      seen = []
      for t, g in enumerate(gradients(name)):
        low = projector.project(torch.tensor(g.T.copy()), t)  # torch keeps (out, in)
        queue = np.full(ARGS['queue_size'], np.nan, np.float32)
        queue[: len(projector.queue)] = projector.queue
        seen.append(
          dict(
            low=low.numpy(),
            gap=projector.update_proj_gap,
            queue=queue,
            refreshes=projector.svd_count,
          )
        )
        if quant:
          scales = projector.ortho_matrix_scales
          # A group on one side of zero is what the official zero point cannot hold.
          assert (projector.ortho_matrix_zeros >= 0).all() and (scales > 1e-6).all()
          seen[-1] |= dict(
            back=projector.project_back(low).numpy(),
            codes=projector.ortho_matrix.numpy().copy(),
            scales=scales.numpy().copy(),
            zeros=projector.ortho_matrix_zeros.numpy().copy(),
          )
      kind = 'quant' if quant else 'plain'
      for k in seen[0]:
        out[f'{name}/{kind}/{k}'] = np.stack([np.asarray(s[k]) for s in seen])
    out[f'{name}/gradients'] = gradients(name)

  w = np.random.default_rng(5).standard_normal((6, 64)).astype(np.float32)
  codes, scales, zeros = QGaLoreAdamW8bit._quantize(None, torch.tensor(w), 32, 8)
  out |= {'weight/w': w, 'weight/codes': codes.numpy()}
  out |= {'weight/scales': scales.numpy(), 'weight/zeros': zeros.numpy()}
  write('q_galore', out, repository='VITA-Group/Q-GaLore', commit=COMMIT, **ARGS)


if __name__ == '__main__':
  main()
