"""Records the trajectories of the official Dion for `dion_parity_test.py`.

Needs torch and a checkout of the repository microsoft/dion (MIT) at commit
0a059a4542e5aa74b40dcd1dce363836c7afcd48: `python tests/parity/record_dion.py <checkout>`.
The file it writes is data alone.

Provenance: classes `dion_simple.Dion` and `dion_reference.Dion` (`qr_method='qr'`),
arguments as below, nothing patched. The package is imported without its `__init__`, which
needs Triton, and torch.compile is off. The random Q of the first step is recorded.
"""

import json
import os
import pathlib
import sys
import types

import numpy as np

COMMIT = '0a059a4542e5aa74b40dcd1dce363836c7afcd48'
SHAPES = {'tall': (10, 6), 'wide': (6, 10), 'square': (8, 8)}  # (in, out)
STEPS = 13
ARGS = dict(lr=0.01, mu=0.95, weight_decay=0.1)
RANK = 3
PATH = pathlib.Path(__file__).with_name('dion.npz')


def gradients(name: str) -> np.ndarray:
  """Seeded gradients (steps, in, out): one that stays and noise of its size."""
  rng = np.random.default_rng(sum(map(ord, name)))
  noise = rng.standard_normal((STEPS, *SHAPES[name]))
  return (rng.standard_normal(SHAPES[name]) + noise).astype(np.float32)


def main(checkout: str) -> None:
  os.environ['TORCHDYNAMO_DISABLE'] = '1'
  import torch

  package = types.ModuleType('dion')
  package.__path__ = [f'{checkout}/dion']
  sys.modules['dion'] = package
  from dion import dion_reference, dion_simple

  def simple(p):
    return dion_simple.Dion([p], rank=RANK, **ARGS)

  def reference(p):
    fraction = RANK / min(p.shape)
    return dion_reference.Dion([p], rank_fraction=fraction, qr_method='qr', **ARGS)

  out = {}
  for name, shape in SHAPES.items():
    start = (0.1 * np.random.default_rng(7).standard_normal(shape)).astype(np.float32)
    out[f'{name}/start'], out[f'{name}/gradients'] = start, gradients(name)
    for case, make in dict(simple=simple, reference=reference).items():
      torch.manual_seed(0)
      p = torch.nn.Parameter(torch.tensor(start.T.copy()))
      tx = make(p)
      drawn = {}
      init = tx._init_opt_state_dion

      def keep(param, state, *args, init=init, drawn=drawn):
        init(param, state, *args)
        drawn['Q'] = state['Q'].clone().numpy()

      tx._init_opt_state_dion = keep
      path = []
      for g in gradients(name):
        p.grad = torch.tensor(g.T.copy())
        tx.step()
        path.append(p.detach().numpy().T.copy())
      out[f'{name}/{case}'] = np.stack(path)
      out[f'{name}/{case}/Q'] = drawn['Q']
  meta = dict(
    repository='microsoft/dion',
    commit=COMMIT,
    name='dion_simple.Dion, dion_reference.Dion',
    torch=torch.__version__,
    rank=RANK,
    **ARGS,
  )
  np.savez_compressed(PATH, meta=np.array(json.dumps(meta)), **out)
  print(f'wrote {PATH}, {PATH.stat().st_size} bytes')


if __name__ == '__main__':
  main(*sys.argv[1:])
