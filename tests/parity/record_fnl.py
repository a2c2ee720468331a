"""Records spectral starts and Frobenius decay, for `factorized_test.py`.

Needs torch and a checkout of GitHub's microsoft/fnl_paper at the commit below, named by
PYTHONPATH; then `python tests/parity/record_fnl.py`. The file it writes is data alone;
nothing of that code is needed by the tests.

Provenance: `FactorizedLinear` and its `frobgrad` of `frob.py`, whose first lines are
comments in another language's syntax and are left out.
"""

import pathlib
import sys

import numpy as np
from inputs import SMALL, seed, weights, write

COMMIT = '8ac41ae2f5f92f2e7a6ff84fba5c1dd4a3f17bf2'
SETTINGS = dict(rank_scale=0.5, coef=0.3)


def official():
  folder = next(p for p in sys.path if (pathlib.Path(p) / 'frob.py').exists())
  text, space = (pathlib.Path(folder) / 'frob.py').read_text(), {'__name__': 'frob'}
  lines = [line for line in text.splitlines() if not line.startswith('//')]
  exec(compile('\n'.join(lines), 'frob.py', 'exec'), space)
  return space['FactorizedLinear']


def main() -> None:
  import torch

  FactorizedLinear = official()
  out = {}
  for name, shape in SMALL.items():
    rng = np.random.default_rng(seed(name))
    W = weights(shape, rng)
    dense = torch.nn.Linear(*shape, bias=False)
    dense.weight.data = torch.tensor(W.T.copy())
    layer = FactorizedLinear(dense, rank_scale=SETTINGS['rank_scale'])
    layer.frobgrad(SETTINGS['coef'])
    out |= {
      f'{name}/dense': W,
      f'{name}/a': layer.VT.detach().numpy().T.copy(),
      f'{name}/b': layer.U.detach().numpy().T.copy(),
      f'{name}/decay/a': layer.VT.grad.numpy().T.copy(),
      f'{name}/decay/b': layer.U.grad.numpy().T.copy(),
    }
  meta = dict(repository='microsoft/fnl_paper', commit=COMMIT)
  write('fnl', out, **meta, cls='frob.FactorizedLinear', **SETTINGS)


if __name__ == '__main__':
  main()
