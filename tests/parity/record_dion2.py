"""Records the trajectories of the official Dion2 for `dion2_parity_test.py`.

Needs torch and a checkout of the repository microsoft/dion (MIT) at commit
0a059a4542e5aa74b40dcd1dce363836c7afcd48:
`python tests/parity/record_dion2.py <checkout>`. The file it writes is data alone.

Provenance: class `dion2.Dion2` with its Polar Express, arguments as below, one process.
Its bfloat16 arithmetic is float32 here, so that rounding does not hide differences. The
package is imported without its `__init__`, and torch.compile is off.
"""

import json
import os
import pathlib
import sys
import types

import numpy as np

COMMIT = '0a059a4542e5aa74b40dcd1dce363836c7afcd48'
SHAPES = {'tall': (12, 8), 'wide': (8, 12), 'square': (8, 8)}  # (in, out)
STEPS = 13
ARGS = dict(lr=0.01, ef_decay=0.95, weight_decay=0.1, fraction=0.25)
CASES = {'spectral': 'spectral_norm', 'rms': 'rms_norm'}
PATH = pathlib.Path(__file__).with_name('dion2.npz')


def gradients(name: str) -> np.ndarray:
  """Seeded gradients (steps, in, out): one that stays and noise of its size."""
  rng = np.random.default_rng(sum(map(ord, name)))
  noise = rng.standard_normal((STEPS, *SHAPES[name]))
  return (rng.standard_normal(SHAPES[name]) + noise).astype(np.float32)


def main(checkout: str) -> None:
  os.environ['TORCHDYNAMO_DISABLE'] = '1'
  import torch

  torch.bfloat16 = torch.float32
  torch.Tensor.bfloat16 = lambda self: self.float()
  package = types.ModuleType('dion')
  package.__path__ = [f'{checkout}/dion']
  sys.modules['dion'] = package
  from dion.dion2 import Dion2

  out = {}
  for name, shape in SHAPES.items():
    start = (0.1 * np.random.default_rng(7).standard_normal(shape)).astype(np.float32)
    out[f'{name}/start'], out[f'{name}/gradients'] = start, gradients(name)
    for case, adjust in CASES.items():
      p = torch.nn.Parameter(torch.tensor(start.T.copy()))
      tx = Dion2([p], adjust_lr=adjust, **ARGS)
      path = []
      for g in gradients(name):
        p.grad = torch.tensor(g.T.copy())
        tx.step()
        path.append(p.detach().numpy().T.copy())
      out[f'{name}/{case}'] = np.stack(path)
  meta = dict(
    repository='microsoft/dion',
    commit=COMMIT,
    name='dion2.Dion2',
    torch=torch.__version__,
    **ARGS,
  )
  np.savez_compressed(PATH, meta=np.array(json.dumps(meta)), **out)
  print(f'wrote {PATH}, {PATH.stat().st_size} bytes')


if __name__ == '__main__':
  main(*sys.argv[1:])
