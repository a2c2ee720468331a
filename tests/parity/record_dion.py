"""Records the trajectories of the official Dion for `dion_parity_test.py`.

Needs torch and a checkout of the repository microsoft/dion (MIT) at commit
0a059a4542e5aa74b40dcd1dce363836c7afcd48: `python tests/parity/record_dion.py <checkout>`.
The file it writes is data alone.

Provenance: classes `dion_simple.Dion` and `dion_reference.Dion` (`qr_method='qr'`),
arguments as below, nothing patched. The package is imported without its `__init__`, which
needs Triton, and torch.compile is off. The random Q of the first step is recorded.
"""

import os
import sys

from inputs import SMALL, runs, stub, write

COMMIT = '0a059a4542e5aa74b40dcd1dce363836c7afcd48'
ARGS = dict(lr=0.01, mu=0.95, weight_decay=0.1)
RANK = 3


def main(checkout: str) -> None:
  os.environ['TORCHDYNAMO_DISABLE'] = '1'
  import torch

  stub('dion', f'{checkout}/dion')
  from dion import dion_reference, dion_simple

  def simple(p):
    return dion_simple.Dion([p], rank=RANK, **ARGS)

  def reference(p):
    fraction = RANK / min(p.shape)
    return dion_reference.Dion([p], rank_fraction=fraction, qr_method='qr', **ARGS)

  drawn = []

  def make(p, case):
    torch.manual_seed(0)
    tx = case(p)
    init = tx._init_opt_state_dion

    def keep(param, state, *args):
      init(param, state, *args)
      drawn.append(state['Q'].clone().numpy())

    tx._init_opt_state_dion = keep
    return tx

  cases = dict(simple=simple, reference=reference)
  out = runs(SMALL, cases, make)
  keys = [f'{name}/{case}/Q' for name in SMALL for case in cases]
  out |= dict(zip(keys, drawn, strict=True))
  name = 'dion_simple.Dion, dion_reference.Dion'
  meta = dict(repository='microsoft/dion', commit=COMMIT, name=name, rank=RANK)
  write('dion', out, **meta, **ARGS)


if __name__ == '__main__':
  main(*sys.argv[1:])
