"""Records the trajectories of the official Dion2 for `dion2_test.py`.

Needs torch and a checkout of the repository microsoft/dion (MIT) at commit
0a059a4542e5aa74b40dcd1dce363836c7afcd48:
`python tests/parity/record_dion2.py <checkout>`. The file it writes is data alone.

Provenance: class `dion2.Dion2` with its Polar Express, arguments as below, one process.
Its bfloat16 arithmetic is float32 here, so that rounding does not hide differences. The
package is imported without its `__init__`, and torch.compile is off.
"""

import os
import sys

from inputs import runs, stub, write

COMMIT = '0a059a4542e5aa74b40dcd1dce363836c7afcd48'
SHAPES = {'tall': (12, 8), 'wide': (8, 12), 'square': (8, 8)}  # (in, out)
ARGS = dict(lr=0.01, ef_decay=0.95, weight_decay=0.1, fraction=0.25)
CASES = {'spectral': 'spectral_norm', 'rms': 'rms_norm'}


def main(checkout: str) -> None:
  os.environ['TORCHDYNAMO_DISABLE'] = '1'
  import torch

  torch.bfloat16 = torch.float32
  torch.Tensor.bfloat16 = lambda self: self.float()
  stub('dion', f'{checkout}/dion')
  from dion.dion2 import Dion2

  out = runs(SHAPES, CASES, lambda p, adjust: Dion2([p], adjust_lr=adjust, **ARGS))
  meta = dict(repository='microsoft/dion', commit=COMMIT, name='dion2.Dion2')
  write('dion2', out, **meta, **ARGS)


if __name__ == '__main__':
  main(*sys.argv[1:])
