"""Records outputs of S4D's official code that `s4d_parity_test.py` reads.

Needs torch, einops, scipy and a checkout of GitHub's state-spaces/s4 at the commit below,
named by PYTHONPATH; then `python tests/parity/record_s4d.py`. The file it writes is data
alone; nothing of that code is needed by the tests.

Provenance: class `S4D` of `models/s4/s4d.py`, whose bias of the output map is set to 0,
and function `dplr` of `src/models/sequence/kernels/dplr.py`, arguments as below. Packages
of theirs that only serve logging and dropout are left out.
"""

import logging
import sys
import types

import numpy as np
from inputs import stub, write

COMMIT = 'e757cef57d89e448c413de7325ed5601aceaac13'
WIDTH, STATE, LENGTH = 4, 8, 50
INITS = ('lin', 'inv', 'legs', 'real')


def main() -> None:
  import src
  import torch

  stub('src.models.nn', DropoutNd=None)
  train = types.SimpleNamespace(get_logger=logging.getLogger)
  stub('src.utils', path='', train=train)
  stub('src.utils.train')
  src.utils = sys.modules['src.utils']
  from models.s4.s4d import S4D
  from src.models.sequence.kernels.dplr import dplr

  torch.manual_seed(0)
  layer = S4D(WIDTH, d_state=STATE)
  torch.nn.init.zeros_(layer.output_linear[0].bias)
  kernel = layer.kernel
  with torch.no_grad():
    # Away from the start, where all features are alike.
    kernel.log_A_real.add_(0.3 * torch.randn(WIDTH, STATE // 2))
    kernel.A_imag.add_(torch.randn(WIDTH, STATE // 2))
  u = torch.randn(2, WIDTH, LENGTH)
  ones = torch.ones(WIDTH, STATE // 2)
  out = {
    'ssm/log_dt': kernel.log_dt,
    'ssm/log_a_real': kernel.log_A_real,
    'ssm/a_imag': kernel.A_imag,
    'ssm/b_real': ones,
    'ssm/b_imag': 0 * ones,
    'ssm/c_real': kernel.C[..., 0],
    'ssm/c_imag': kernel.C[..., 1],
    'ssm/skip': layer.D,
    'glu': layer.output_linear[0].weight[..., 0].T,
    'u': u.transpose(1, 2),
    'kernel': kernel(LENGTH).T,
    'y': layer(u)[0].transpose(1, 2),
  }
  arrays = {k: v.detach().numpy() for k, v in out.items()}
  for name in INITS:
    A, _, B, _ = dplr(init=name, N=STATE)
    arrays[f'init/{name}'] = np.stack([A[0].numpy(), B[0].numpy()])
  meta = dict(repository='state-spaces/s4', commit=COMMIT)
  write('s4d', arrays, 'einops', 'scipy', **meta)


if __name__ == '__main__':
  main()
