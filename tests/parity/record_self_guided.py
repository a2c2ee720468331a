"""Records the official self-guided training of one layer, for `self_guided_test.py`.

Needs torch and a checkout of GitHub's CLAIRE-Labo/StructuredFFN at the commit below, whose
folder `src/modules` is named by PYTHONPATH; then
`python tests/parity/record_self_guided.py`. The file it writes is data alone; nothing of
that code is needed by the tests.

Provenance: `LowRank` of `src/modules/layer/lowrank.py` with `CosineTempDecay`, without
`reduce_flop`, trained by torch's SGD, `_update_ratio` after each step. Its modules move
tensors to a GPU; here that does nothing. Only the files of this layer are imported.
"""

import importlib
import pathlib
import sys
import types

import numpy as np
from inputs import SMALL, seed, stub, write

COMMIT = '2442a14c57be177b50bd900f1fba6fcec4c96d93'
SETTINGS = dict(rank=3, guide_steps=6, lr=0.1)
STEPS = 9


def main() -> None:
  out = {}
  for name, shape in SMALL.items():
    out |= {f'{name}/{key}': array for key, array in run(name, shape).items()}
  write(
    'self_guided',
    out,
    repository='CLAIRE-Labo/StructuredFFN',
    commit=COMMIT,
    cls='src.modules.layer.lowrank.LowRank',
    **SETTINGS,
  )


def official():
  import torch

  torch.Tensor.cuda = lambda self: self
  home = next(p for p in sys.path if (pathlib.Path(p) / 'layer/lowrank.py').exists())
  stub('ffn', home)
  stub('ffn.layer', f'{home}/layer')
  low_rank = importlib.machinery.SourceFileLoader('op', f'{home}/op/low_rank.py')
  stub('ffn.op', f'{home}/op', low_rank_custom=low_rank.load_module().low_rank_custom)
  return importlib.import_module('ffn.layer.lowrank').LowRank


class Config(dict):
  """Read by keys and by attributes."""

  def __getattr__(self, name):
    return self[name]


def run(name: str, shape: tuple[int, int]) -> dict:
  import torch

  torch.manual_seed(seed(name))
  guide = types.SimpleNamespace(
    enabled=True,
    reduce_flop=False,
    scheduler='cosine',
    max_step=SETTINGS['guide_steps'],
  )
  config = Config(
    rank=SETTINGS['rank'], training=guide, init=types.SimpleNamespace(post_init='svd')
  )
  start = types.SimpleNamespace(weight_init='xavier')
  layer = official()(*shape, False, True, config, start, device='cpu')
  rng = np.random.default_rng(seed(name))
  x = rng.standard_normal((STEPS, 5, shape[0])).astype(np.float32)
  y = rng.standard_normal((STEPS, 5, shape[1])).astype(np.float32)
  tx = torch.optim.SGD(layer.parameters(), SETTINGS['lr'])
  path = {'a': [], 'b': [], 'guide': [], 'alpha': [], 'out': []}

  def note(**arrays):
    for key, array in arrays.items():
      path[key].append(array.detach().numpy().copy())

  arrays = lambda: dict(a=layer.lr1.T, b=layer.lr2.T, guide=layer.guide_linear.T)
  note(**arrays())
  for k in range(STEPS):
    tx.zero_grad()
    out, _ = layer(torch.tensor(x[k]))
    note(alpha=layer.ratio, out=out)
    (0.5 * ((out - torch.tensor(y[k])) ** 2).mean()).backward()
    tx.step()
    layer._update_ratio()
    note(**arrays())
  return {'x': x, 'y': y} | {key: np.stack(list_) for key, list_ in path.items()}


if __name__ == '__main__':
  main()
