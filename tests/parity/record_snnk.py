"""Records outputs of SNNK's official code that `snnk_parity_test.py` reads.

Needs torch, distutils (of Python 3.11, or of setuptools) and a checkout of GitHub's
arijitthegame/neural-network-kernels at the commit below, whose `src` is named by
PYTHONPATH; then `python tests/parity/record_snnk.py`. The file it writes is data alone;
nothing of that code is needed by the tests.

Provenance: classes `NNK_Relu` and `NNK_Asym_Kernel` and function
`input_to_rfs_torch_vectorized` of `src/nnk/nnk.py`, arguments as below. Three defects of
`NNK_Asym_Kernel` are evened out from outside: its projection is drawn with deviation 0.02
where the estimate needs 1, its forward pass divides x by `dim` where weights are divided
by dim^(1/4), and biases are divided likewise though they are added to products.
"""

import math

import numpy as np
from inputs import write

COMMIT = '45129f5379fd2c4bb1fe350360dbbaa74a9323cf'
WIDTH, OUT, COUNT = 8, 5, 20
M = 0.05
RELU = {
  'relu': dict(),
  'threshold': dict(constant=-0.3),
  'orthogonal': dict(orthogonal=True),
  'normalize': dict(normalize=True, normalization_constant=1.5),
}
WAVES = {'cos': 1, 'sin': -1j}


def main() -> None:
  import torch
  from nnk.nnk import NNK_Asym_Kernel, NNK_Relu, input_to_rfs_torch_vectorized

  rng = np.random.default_rng(0)
  draw = lambda *shape: torch.tensor(rng.standard_normal(shape), dtype=torch.float32)
  x, W, b = draw(4, WIDTH), 0.5 * draw(OUT, WIDTH), draw(OUT)
  out = {'x': x, 'W': W.T, 'bias': b}
  torch.manual_seed(0)
  for name, args in RELU.items():
    layer = NNK_Relu(W, COUNT, WIDTH, 'cpu', **args)
    out[f'{name}/proj'] = layer.projection_matrix.T
    out[f'{name}/readout'] = layer.weights.T
    out[f'{name}/y'] = layer(x)
  G = draw(COUNT, WIDTH)
  one = lambda xi: torch.ones_like(xi)
  out['exp/proj'] = G.T
  out['exp/features'] = input_to_rfs_torch_vectorized(
    x, one, one, torch.ones(COUNT), COUNT, WIDTH, 'cpu', proj_matrix=G
  )
  normal, torch.normal = torch.normal, lambda mean, std, size: torch.randn(size)
  for name, factor in WAVES.items():
    wave = lambda xi, b, c=factor: (
      _coefficient(xi, c) * torch.exp(2j * math.pi * xi * b)
    )
    layer = NNK_Asym_Kernel(
      W,
      A_fun=wave,
      a_fun=lambda xi: 2j * math.pi * xi,
      xis=torch.full((COUNT,), 0.5 / math.pi),
      num_rfs=COUNT,
      dim=WIDTH,
      model_device='cpu',
      seed=0,
      normalize=False,
      B_fun=wave,
      b_fun=lambda xi: torch.ones_like(xi) + 0j,
      M=M,
      b=b * WIDTH**0.25,
    )
    out[f'{name}/proj'] = layer.projection_matrix.T
    out[f'{name}/y'] = layer(x * WIDTH**0.75)
  torch.normal = normal
  arrays = {k: v.detach().numpy() for k, v in out.items()}
  meta = dict(repository='arijitthegame/neural-network-kernels', commit=COMMIT)
  write('snnk', arrays, **meta, relu=RELU, M=M)


def _coefficient(xi, c):
  """F(xi) / p(xi) of a real function: conjugate at -xi."""
  import torch

  c = torch.tensor(c, dtype=torch.complex64)
  return torch.where(xi > 0, c, c.conj())


if __name__ == '__main__':
  main()
