"""Records the trajectories of the official DCT-AdamW for `dct_adamw_parity_test.py`.

Needs torch and a checkout of the repository IST-DASLab/ISTA-DASLab-Optimizers (MIT) at
commit 4c98e6e7d8a51147cc8fdd77458baac881852b56, version 1.1.15:
`python tests/parity/record_dct_adamw.py <checkout>`. The file it writes is data alone.

Provenance: class `DCTAdamW` with `proj='dct'`, `rotate_subspace=True`, arguments as
below. Its package is imported without its `__init__`, which needs CUDA. One optimizer per
matrix, since it keeps one Q for a whole model. Patched: `rotate_subspace` of
`FFTLowRankProjector`, which multiplies a matrix into itself and returns garbage on a CPU.
Its rotation, a partial permutation, is rounded to zeros and ones: the 1e-8 that float32
leaves in place of zeros leaks into second moments of new columns, and Adam makes up to
3e-4 of it.
"""

import json
import pathlib
import sys
import types

import numpy as np

COMMIT = '4c98e6e7d8a51147cc8fdd77458baac881852b56'
SHAPES = {'tall': (10, 6), 'wide': (6, 10), 'square': (8, 8)}  # (in, out)
STEPS = 13
ARGS = dict(lr=1e-2, weight_decay=0.1, rank=3)
CASES = {
  'every_step': dict(update_proj_gap=1, sim_type='matmul'),
  'feedback': dict(update_proj_gap=1, sim_type='matmul', use_ef=True),
  'gap': dict(update_proj_gap=5, sim_type='matmul', ell_norm=2),
  'fft': dict(update_proj_gap=1, sim_type='makhoul'),
  'fft_gap_feedback': dict(update_proj_gap=5, sim_type='makhoul', use_ef=True),
}
PATH = pathlib.Path(__file__).with_name('dct_adamw.npz')


def gradients(name: str) -> np.ndarray:
  """Seeded gradients (steps, in, out): one that stays and noise of its size."""
  rng = np.random.default_rng(sum(map(ord, name)))
  noise = rng.standard_normal((STEPS, *SHAPES[name]))
  return (rng.standard_normal(SHAPES[name]) + noise).astype(np.float32)


def main(checkout: str) -> None:
  import torch

  package = types.ModuleType('ista_daslab_optimizers')
  package.__path__ = [f'{checkout}/ista_daslab_optimizers']
  sys.modules['ista_daslab_optimizers'] = package
  from ista_daslab_optimizers.fft_low_rank.dct_adamw import DCTAdamW
  from ista_daslab_optimizers.fft_low_rank.fft_projector import FFTLowRankProjector

  def rotate_subspace(self, R, w):
    R = R.round()
    w.copy_(w @ R if self.is_right_proj else R @ w)

  FFTLowRankProjector.rotate_subspace = rotate_subspace
  out = {}
  for name, shape in SHAPES.items():
    start = (0.1 * np.random.default_rng(7).standard_normal(shape)).astype(np.float32)
    out[f'{name}/start'], out[f'{name}/gradients'] = start, gradients(name)
    for case, args in CASES.items():
      # torch keeps (out, in)
      p = torch.nn.Parameter(torch.tensor(start.T.copy()))
      tx = DCTAdamW([p], proj='dct', rotate_subspace=True, **ARGS, **args)
      path = []
      for g in gradients(name):
        p.grad = torch.tensor(g.T.copy())
        tx.step()
        path.append(p.detach().numpy().T.copy())
      out[f'{name}/{case}'] = np.stack(path)
  meta = dict(
    repository='IST-DASLab/ISTA-DASLab-Optimizers',
    commit=COMMIT,
    name='DCTAdamW',
    torch=torch.__version__,
    cases=CASES,
    **ARGS,
  )
  np.savez_compressed(PATH, meta=np.array(json.dumps(meta)), **out)
  print(f'wrote {PATH}, {PATH.stat().st_size} bytes')


if __name__ == '__main__':
  main(*sys.argv[1:])
