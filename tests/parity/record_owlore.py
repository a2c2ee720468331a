"""Records the trajectory of galore-torch that `owlore_parity_test.py` reads.

Needs `pip install torch galore-torch bitsandbytes transformers`, then
`python tests/parity/record_owlore.py`. The file it writes is data alone.

Provenance: OwLore has no package; its optimizer is galore-torch's `GaLoreAdamW` (1.0),
and a frozen layer is a parameter whose `grad` is None. Arguments as below; the basis gets
the sign convention of `lrjax.bases.orthonormal.fix_signs`, because moments that are kept
depend on signs that LAPACK leaves open.
"""

import numpy as np
from inputs import fix_signs, parameter, weights, write

LAYERS, ACTIVE, SHAPE, STEPS = 4, 2, (6, 10), 30
ARGS = dict(rank=3, update_proj_gap=5, scale=1.0, proj_type='std')
# With scale 1 updates are four times those of GaLore, and float32 noise with them.
LR, WEIGHT_DECAY, PERIOD = 3e-3, 0.1, 3


def gradients() -> np.ndarray:
  """Seeded gradients (steps, layers, in, out) with a decaying spectrum."""
  rng = np.random.default_rng(5)
  u, _, v = np.linalg.svd(rng.standard_normal((LAYERS, *SHAPE)), full_matrices=False)
  noise = 0.1 * rng.standard_normal((STEPS, LAYERS, *SHAPE))
  return ((u * 0.7 ** np.arange(SHAPE[0])) @ v + noise).astype(np.float32)


def active_layers() -> np.ndarray:
  """(rounds, ACTIVE) layers that train, in ascending order."""
  rng = np.random.default_rng(6)
  draw = lambda: np.sort(rng.choice(LAYERS, ACTIVE, replace=False))
  return np.stack([draw() for _ in range(STEPS // PERIOD)]).astype(np.int32)


def main() -> None:
  import torch
  from galore_torch import GaLoreAdamW
  from galore_torch.galore_projector import GaLoreProjector

  fix_signs(GaLoreProjector)
  start = weights((LAYERS, *SHAPE))
  layers = [parameter(w) for w in start]
  groups = [{'params': [p], **ARGS} for p in layers]
  tx = GaLoreAdamW(
    groups, lr=LR, weight_decay=WEIGHT_DECAY, no_deprecation_warning=True
  )
  path = []
  for t, g in enumerate(gradients()):
    for i, p in enumerate(layers):
      trains = i in active_layers()[t // PERIOD]
      p.grad = torch.tensor(g[i].T.copy()) if trains else None
    tx.step()
    path.append(np.stack([p.detach().numpy().T for p in layers]))
  meta = dict(lr=LR, weight_decay=WEIGHT_DECAY, period=PERIOD, **ARGS)
  arrays = dict(
    start=start, gradients=gradients(), params=np.stack(path), active=active_layers()
  )
  write('owlore', arrays, 'galore-torch', **meta)


if __name__ == '__main__':
  main()
