"""Records the trajectories of galore-torch that `galore_parity_test.py` reads.

Needs `pip install torch galore-torch bitsandbytes transformers`, then
`python tests/parity/record_galore.py`. The file it writes is data alone; nothing of that
package is needed by the tests.

Provenance: galore-torch 1.0, class `GaLoreAdamW`, arguments as below; the basis of
`GaLoreProjector.get_orthogonal_matrix` gets the sign convention of `lrjax.fix_signs`,
because the trajectory depends on signs that LAPACK leaves open.
"""

import importlib.metadata
import json
import pathlib

import numpy as np

SHAPES = {'tall': (24, 12), 'wide': (12, 24), 'square': (16, 16)}  # (in, out)
STEPS = 25
ARGS = dict(rank=4, update_proj_gap=10, scale=0.25, proj_type='std')
LR, WEIGHT_DECAY = 1e-2, 0.1
PATH = pathlib.Path(__file__).with_suffix('.npz').with_name('galore_torch.npz')


def gradients(name: str) -> np.ndarray:
  """Seeded gradients (steps, in, out) with a decaying spectrum that slowly turns."""
  rng = np.random.default_rng(sum(map(ord, name)))
  n, m = SHAPES[name]
  s = min(n, m)
  u, v = (np.linalg.qr(rng.standard_normal((x, s)))[0] for x in (n, m))
  base = (u * 0.7 ** np.arange(s)) @ v.T
  noise = 0.1 * rng.standard_normal((STEPS, n, m))
  return (base + noise).astype(np.float32)


def main() -> None:
  import torch
  from galore_torch import GaLoreAdamW
  from galore_torch.galore_projector import GaLoreProjector

  plain = GaLoreProjector.get_orthogonal_matrix

  def canonical(self, weights, rank, type):
    p = plain(self, weights, rank, type)
    axis = 0 if type == 'right' else 1  # the axis that runs along the rank
    largest = p.abs().argmax(1 - axis, keepdim=True)
    return p * torch.sign(torch.gather(p, 1 - axis, largest))

  GaLoreProjector.get_orthogonal_matrix = canonical
  out = {}
  for name, shape in SHAPES.items():
    # small weights, so that float32 rounding of the sum stays below the tolerance
    start = (0.1 * np.random.default_rng(7).standard_normal(shape)).astype(np.float32)
    # torch keeps (out, in)
    p = torch.nn.Parameter(torch.tensor(start.T.copy()))
    groups = [{'params': [p], **ARGS}]
    tx = GaLoreAdamW(
      groups, lr=LR, weight_decay=WEIGHT_DECAY, no_deprecation_warning=True
    )
    path = []
    for g in gradients(name):
      p.grad = torch.tensor(g.T.copy())
      tx.step()
      path.append(p.detach().numpy().T.copy())
    out[f'{name}/start'], out[f'{name}/params'] = start, np.stack(path)
    out[f'{name}/gradients'] = gradients(name)
  names = ('torch', 'galore-torch', 'numpy')
  versions = {n: importlib.metadata.version(n) for n in names}
  meta = dict(versions=versions, lr=LR, weight_decay=WEIGHT_DECAY, **ARGS)
  np.savez_compressed(PATH, meta=np.array(json.dumps(meta)), **out)
  print(f'wrote {PATH} with {versions}')


if __name__ == '__main__':
  main()
