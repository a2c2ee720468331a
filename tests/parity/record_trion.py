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

import pathlib
import sys
import tempfile

from inputs import SMALL, runs, stub, write

COMMIT = '4c98e6e7d8a51147cc8fdd77458baac881852b56'
ARGS = dict(lr=0.02, momentum=0.95, weight_decay=0.1, rank=3)
CASES = {
  'kj': dict(scaling_type='kj'),
  'dion_fft': dict(scaling_type='dion', use_makhoul=True),
  'kimi_fft': dict(scaling_type='kimi', use_makhoul=True),
}


def main(checkout: str) -> None:
  import torch
  import torch.distributed as dist

  package = 'ista_daslab_optimizers'
  stub(package, f'{checkout}/{package}')
  stub('wandb')
  stub(f'{package}.utils.newton_schulz_triton', newton_schulz_triton=None)
  from ista_daslab_optimizers.fft_low_rank import trion
  from ista_daslab_optimizers.utils.dct import dct3_matrix
  from ista_daslab_optimizers.utils.global_cache import GlobalCache

  store = pathlib.Path(tempfile.mkdtemp()) / 'store'
  dist.init_process_group('gloo', init_method=f'file://{store}', rank=0, world_size=1)
  trion.device, trion.dtype = 'cpu', torch.float32
  trion.get_dct_matrix = lambda size, key, device, dtype: GlobalCache.get('ortho', key)
  torch.Tensor.bfloat16 = lambda self: self.float()

  def make(p, args):
    GlobalCache._instance = None
    if args.get('use_makhoul'):
      size = min(p.shape)
      q = dct3_matrix(size, torch.float32, 'cpu')
      right = p.shape[0] >= p.shape[1]
      GlobalCache.add('ortho', (size, ARGS['rank']), q.T if right else q)
    return trion.Trion(
      [dict(params=[p], use_muon=True, ns_type='torch', **ARGS, **args)]
    )

  out = runs(SMALL, CASES, make)
  dist.destroy_process_group()
  repository = 'IST-DASLab/ISTA-DASLab-Optimizers'
  meta = dict(repository=repository, commit=COMMIT, name='Trion', cases=CASES)
  write('trion', out, **meta, **ARGS)


if __name__ == '__main__':
  main(*sys.argv[1:])
