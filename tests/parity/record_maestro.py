"""Records what Maestro's official layer computes, for `maestro_test.py`.

Needs torch and a checkout of GitHub's SamuelHorvath/Maestro-LoD at the commit below, named
by PYTHONPATH; then `python tests/parity/record_maestro.py`. The file it writes is data
alone; nothing of that code is needed by the tests.

Provenance: `decompose_linear`, `MaestroLinear.forward`, `.group_lasso`, `.importance` and
`.assign_low_rank` of `maestro/layers/linear.py`, trained by torch's SGD with momentum as
in `cifar_mnist_main.py`, with `no_full_pass`.
"""

import numpy as np
from inputs import SMALL, seed, weights, write

COMMIT = '0003014a94f78a63e48d971b773b40b00277a207'
SETTINGS = dict(lr=0.05, momentum=0.9, gp_lambda=2e-2, threshold=0.4, shrink_at=6)
STEPS = 12


def main() -> None:
  out = {}
  for name, shape in SMALL.items():
    out |= {f'{name}/{key}': array for key, array in run(name, shape).items()}
  write(
    'maestro',
    out,
    repository='SamuelHorvath/Maestro-LoD',
    commit=COMMIT,
    cls='maestro.layers.linear.MaestroLinear',
    **SETTINGS,
  )


def run(name: str, shape: tuple[int, int]) -> dict:
  """One layer: how it starts, what it computes, and how it trains."""
  import torch
  from maestro.layers.linear import decompose_linear

  rng = np.random.default_rng(seed(name))
  W = 3 * weights(shape, rng)
  dense = torch.nn.Linear(*shape, bias=False)
  dense.weight.data = torch.tensor(W.T.copy())
  layer = decompose_linear(dense)
  x = rng.standard_normal((STEPS, 5, shape[0])).astype(np.float32)
  y = rng.standard_normal((STEPS, 5, shape[1])).astype(np.float32)
  out = {'dense': W, 'x': x, 'y': y, 'start/a': _a(layer), 'start/b': _b(layer)}
  fractions = np.array([0.25, 1 / 3, 0.5, 1.0])
  with torch.no_grad():
    t = torch.tensor(x[0])
    out['forward'] = np.stack([layer(t, p).numpy() for p in fractions])
  out |= {'fractions': fractions, 'importance': layer.importance(True).numpy()}
  out['plain_importance'] = layer.importance(False).numpy()
  lasso = layer.group_lasso(hierarchical=True).sum()
  lasso.backward()
  out |= {
    'lasso': lasso.detach().numpy(),
    'lasso/a': layer.in_network.weight.grad.numpy().T,
  }
  out['lasso/b'] = layer.out_network.weight.grad.numpy().T
  return out | train(layer, x, y, rng)


def train(layer, x: np.ndarray, y: np.ndarray, rng) -> dict:
  """Weights and widths after each step of half squared errors."""
  import torch

  tx = torch.optim.SGD(layer.parameters(), SETTINGS['lr'], SETTINGS['momentum'])
  path = {'sampled': [], 'width': [], 'a': [], 'b': []}
  for k in range(STEPS):
    if k == SETTINGS['shrink_at']:
      layer.assign_low_rank(SETTINGS['threshold'], hierarchical=True)
    j = int(rng.integers(1, layer.inner_dim + 1))
    tx.zero_grad()
    out = layer(torch.tensor(x[k]), j / layer.inner_dim)
    loss = 0.5 * ((out - torch.tensor(y[k])) ** 2).mean()
    loss = loss + SETTINGS['gp_lambda'] * layer.group_lasso(hierarchical=True).sum()
    loss.backward()
    tx.step()
    now = {'sampled': j, 'width': layer.inner_dim, 'a': _a(layer), 'b': _b(layer)}
    for key, value in now.items():
      path[key].append(value)
  return {f'path/{key}': np.stack(values) for key, values in path.items()}


def _a(layer) -> np.ndarray:
  return layer.in_network.weight.detach().numpy().T.copy()


def _b(layer) -> np.ndarray:
  return layer.out_network.weight.detach().numpy().T.copy()


if __name__ == '__main__':
  main()
