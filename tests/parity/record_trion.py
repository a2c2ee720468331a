"""Records the trajectories of the official Trion for `trion_parity_test.py`.

Needs torch and a checkout of the repository IST-DASLab/ISTA-DASLab-Optimizers (MIT) at
commit 4c98e6e7d8a51147cc8fdd77458baac881852b56, version 1.1.15:
`python tests/parity/record_trion.py <checkout>`. The file it writes is data alone.

Provenance: class `Trion` with `ns_type='torch'`, arguments as below, one process. As
released it cannot run, and this is patched: the undefined names `device`, `dtype` and
`get_dct_matrix` are defined; with `use_makhoul` the cached matrix has the orientation
that belongs to the transform, for the class takes the wrong one for tall matrices at the
first step and for wide ones at all others. Newton-Schulz runs in float32 instead of
bfloat16, so that rounding does not hide differences. `wandb` and the Triton kernels,
which are not called, are left out.
"""

import json
import pathlib
import sys
import tempfile
import types

import numpy as np

COMMIT = '4c98e6e7d8a51147cc8fdd77458baac881852b56'
SHAPES = {'tall': (10, 6), 'wide': (6, 10), 'square': (8, 8)}  # (in, out)
STEPS = 13
ARGS = dict(lr=0.02, momentum=0.95, weight_decay=0.1, rank=3)
CASES = {
  'kj': dict(scaling_type='kj'),
  'dion_fft': dict(scaling_type='dion', use_makhoul=True),
  'kimi_fft': dict(scaling_type='kimi', use_makhoul=True),
}
PATH = pathlib.Path(__file__).with_name('trion.npz')


def gradients(name: str) -> np.ndarray:
  """Seeded gradients (steps, in, out): one that stays and noise of its size."""
  rng = np.random.default_rng(sum(map(ord, name)))
  noise = rng.standard_normal((STEPS, *SHAPES[name]))
  return (rng.standard_normal(SHAPES[name]) + noise).astype(np.float32)


def main(checkout: str) -> None:
  import torch
  import torch.distributed as dist

  package = types.ModuleType('ista_daslab_optimizers')
  package.__path__ = [f'{checkout}/ista_daslab_optimizers']
  sys.modules['ista_daslab_optimizers'] = package
  sys.modules['wandb'] = types.ModuleType('wandb')
  kernels = types.ModuleType('newton_schulz_triton')
  kernels.newton_schulz_triton = None
  sys.modules['ista_daslab_optimizers.utils.newton_schulz_triton'] = kernels
  from ista_daslab_optimizers.fft_low_rank import trion
  from ista_daslab_optimizers.utils.dct import dct3_matrix
  from ista_daslab_optimizers.utils.global_cache import GlobalCache

  store = pathlib.Path(tempfile.mkdtemp()) / 'store'
  dist.init_process_group('gloo', init_method=f'file://{store}', rank=0, world_size=1)
  trion.device, trion.dtype = 'cpu', torch.float32
  trion.get_dct_matrix = lambda size, key, device, dtype: GlobalCache.get('ortho', key)
  torch.Tensor.bfloat16 = lambda self: self.float()

  out = {}
  for name, shape in SHAPES.items():
    start = (0.1 * np.random.default_rng(7).standard_normal(shape)).astype(np.float32)
    out[f'{name}/start'], out[f'{name}/gradients'] = start, gradients(name)
    for case, args in CASES.items():
      GlobalCache._instance = None
      if args.get('use_makhoul'):
        q = dct3_matrix(min(shape), torch.float32, 'cpu')
        right = shape[1] >= shape[0]  # rows of the torch weight against its columns
        key = (min(shape), ARGS['rank'])
        GlobalCache.add('ortho', key, q.T if right else q)
      p = torch.nn.Parameter(torch.tensor(start.T.copy()))
      group = dict(params=[p], use_muon=True, ns_type='torch', **ARGS, **args)
      tx = trion.Trion([group])
      path = []
      for g in gradients(name):
        p.grad = torch.tensor(g.T.copy())
        tx.step()
        path.append(p.detach().numpy().T.copy())
      out[f'{name}/{case}'] = np.stack(path)
  dist.destroy_process_group()
  meta = dict(
    repository='IST-DASLab/ISTA-DASLab-Optimizers',
    commit=COMMIT,
    name='Trion',
    torch=torch.__version__,
    cases=CASES,
    **ARGS,
  )
  np.savez_compressed(PATH, meta=np.array(json.dumps(meta)), **out)
  print(f'wrote {PATH}, {PATH.stat().st_size} bytes')


if __name__ == '__main__':
  main(*sys.argv[1:])
