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

import sys

from inputs import SMALL, runs, stub, write

COMMIT = '4c98e6e7d8a51147cc8fdd77458baac881852b56'
ARGS = dict(lr=1e-2, weight_decay=0.1, rank=3)
CASES = {
  'every_step': dict(update_proj_gap=1, sim_type='matmul'),
  'feedback': dict(update_proj_gap=1, sim_type='matmul', use_ef=True),
  'gap': dict(update_proj_gap=5, sim_type='matmul', ell_norm=2),
  'fft': dict(update_proj_gap=1, sim_type='makhoul'),
  'fft_gap_feedback': dict(update_proj_gap=5, sim_type='makhoul', use_ef=True),
}


def main(checkout: str) -> None:
  stub('ista_daslab_optimizers', f'{checkout}/ista_daslab_optimizers')
  from ista_daslab_optimizers.fft_low_rank.dct_adamw import DCTAdamW
  from ista_daslab_optimizers.fft_low_rank.fft_projector import FFTLowRankProjector

  def rotate_subspace(self, R, w):
    R = R.round()
    w.copy_(w @ R if self.is_right_proj else R @ w)

  FFTLowRankProjector.rotate_subspace = rotate_subspace

  def make(p, args):
    return DCTAdamW([p], proj='dct', rotate_subspace=True, **ARGS, **args)

  out = runs(SMALL, CASES, make)
  repository = 'IST-DASLab/ISTA-DASLab-Optimizers'
  meta = dict(repository=repository, commit=COMMIT, name='DCTAdamW', cases=CASES)
  write('dct_adamw', out, **meta, **ARGS)


if __name__ == '__main__':
  main(*sys.argv[1:])
