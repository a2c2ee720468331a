"""Records what the official code of trained rank pruning does, for `trp_test.py`.

Needs torch and a checkout of GitHub's yuhuixu1993/Trained-Rank-Pruning at the commit
below, named by PYTHONPATH; then `python tests/parity/record_trp.py`. The file it writes is
data alone; nothing of that code is needed by the tests.

Provenance: `low_rank_approx` and `train` of `cifar-TRP.py`, with `EnergyThreshold` of
`decompose.py`. The script trains when it is imported and does not parse since Python 3.7
(`async` is a keyword), so that word is replaced and those two functions alone are run;
progress bar, meters and the unused torchvision are replaced by empty ones. Outputs of the
model are the inner product of the weights with the inputs, so that gradients are these
inputs.
"""

import ast
import functools
import pathlib
import sys
import types
from unittest import mock

import numpy as np
from inputs import stub, weights, write

COMMIT = '8cc7470ab96cfd7f9be08e636c281583039f51b6'
SETTINGS = dict(lr=0.05, momentum=0.9, nuclear_weight=3e-2, period=2, energy=0.9)
SHAPE = (6, 5, 3, 3)  # out, in, h, w as torch has it
STEPS = 7


def main() -> None:
  rng = np.random.default_rng(3)
  W = _decaying(rng)
  gradients = rng.standard_normal((STEPS, *SHAPE)).astype(np.float32)
  out = {'start': W, 'gradients': gradients}
  for scheme in ('NC', 'VH', 'ND'):
    out[f'{scheme}/truncated'], out[f'{scheme}/subgradient'] = once(W, scheme)
    out[f'{scheme}/end'] = trained(W, gradients, scheme)
  write(
    'trp',
    out,
    repository='yuhuixu1993/Trained-Rank-Pruning',
    commit=COMMIT,
    functions='cifar-TRP.py: low_rank_approx, train',
    **SETTINGS,
  )


def _decaying(rng) -> np.ndarray:
  """A filter with decaying spectra in all three of its forms."""
  W = weights(SHAPE, rng)
  scales = (0.75 ** np.arange(n) for n in SHAPE)
  return W * functools.reduce(np.multiply, np.ix_(*scales)).astype(np.float32)


def official(scheme: str) -> dict:
  """The two functions and the globals that they read."""
  import torch

  stub('torchvision')
  from decompose import EnergyThreshold

  meter = mock.MagicMock(avg=0.0)
  space = {
    'torch': torch,
    'np': np,
    'time': mock.MagicMock(),
    'AverageMeter': lambda: meter,
    'Bar': mock.MagicMock(),
    'accuracy': lambda *a, **k: (torch.zeros(1), torch.zeros(1)),
    'EnergyThreshold': EnergyThreshold,
    'period': SETTINGS['period'],
    'args': types.SimpleNamespace(
      trp=True, type=scheme, nuclear_weight=SETTINGS['nuclear_weight']
    ),
  }
  folder = next(p for p in sys.path if (pathlib.Path(p) / 'cifar-TRP.py').exists())
  text = (pathlib.Path(folder) / 'cifar-TRP.py').read_text()
  tree = ast.parse(text.replace('async=', 'non_blocking='))
  wanted = ('low_rank_approx', 'train')
  tree.body = [f for f in tree.body if getattr(f, 'name', '') in wanted]
  exec(compile(tree, 'cifar-TRP.py', 'exec'), space)
  return space


def model(W: np.ndarray):
  import torch

  class Inner(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.conv = torch.nn.Conv2d(SHAPE[1], SHAPE[0], SHAPE[2:], bias=False)
      self.conv.weight.data = torch.tensor(W.copy())

    def forward(self, x):
      return (self.conv.weight * x).sum()

  return Inner()


def once(W: np.ndarray, scheme: str) -> tuple[np.ndarray, np.ndarray]:
  space = official(scheme)
  rule = space['EnergyThreshold'](SETTINGS['energy'])
  net, sub = space['low_rank_approx'](model(W), ['conv'], rule, True, scheme)
  return net.conv.weight.detach().numpy().copy(), sub['conv'].numpy()


def trained(W: np.ndarray, gradients: np.ndarray, scheme: str) -> np.ndarray:
  import torch

  net = model(W)
  tx = torch.optim.SGD(net.parameters(), SETTINGS['lr'], SETTINGS['momentum'])
  batches = [(torch.tensor(g), torch.zeros(1)) for g in gradients]
  loss = lambda outputs, targets: outputs
  official(scheme)['train'](batches, net, loss, tx, ['conv'], 0, False)
  return net.conv.weight.detach().numpy().copy()


if __name__ == '__main__':
  main()
