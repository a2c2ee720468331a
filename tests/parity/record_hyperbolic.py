"""Records layers of HyboNet that `hyperbolic_test.py` reads.

Needs torch and `mt/` of a checkout of GitHub's chenweize1998/fully-hyperbolic-nn at the
commit below, named by PYTHONPATH; then `python tests/parity/record_hyperbolic.py`. The
file it writes is data alone; nothing of that code is needed by the tests.

Provenance: `LorentzLinear` of `onmt/modules/hyper_nets.py` with its nonlinearity and its
residual argument, `LorentzMultiHeadedAttention` of `onmt/modules/lmulti_headed_attn.py`,
both in evaluation mode and with the gradients of sum(sin(output)); `dist` of the manifold
of `onmt/manifolds/lorentz.py`. Of geoopt only the base class is needed, which keeps the
curvature; an empty one stands in for it, as for the packages around these modules.
"""

import pathlib
import sys

import numpy as np
from inputs import stub, write

COMMIT = '7ba8e1a06d0504971134edbb2520d75d9887ba7a'
BATCH, LENGTH, WIDTH, HEADS, INNER = 2, 5, 12, 3, 9


def main() -> None:
  import torch

  class Base(torch.nn.Module):
    def __init__(self, k: float, learnable: bool):
      super().__init__()
      self.k = torch.tensor(k)

  stub('geoopt', Manifold=Base, Lorentz=Base, ManifoldTensor=None)
  stub('geoopt.utils', size2shape=None)
  root = next(p for p in map(pathlib.Path, sys.path) if (p / 'onmt/manifolds').is_dir())
  stub('onmt', str(root / 'onmt'))
  stub('onmt.modules', str(root / 'onmt/modules'))
  from onmt.manifolds import Lorentz
  from onmt.modules.hyper_nets import LorentzLinear
  from onmt.modules.lmulti_headed_attn import LorentzMultiHeadedAttention

  rng = np.random.default_rng(12)
  draw = lambda *shape: torch.tensor(rng.standard_normal(shape).astype(np.float32))

  def points(width: int):
    return Lorentz().projx(draw(BATCH, LENGTH, width))

  def randomize(module) -> dict:
    for name, p in module.named_parameters():
      p.data += 0.3 * draw(*p.shape)
      # Times stay below 4, where float32 keeps the digits of t^2 - |s|^2.
      p.data -= 2 if name.endswith('scale') else 0
    return {n: p.detach().numpy().copy() for n, p in module.named_parameters()}

  out = {}

  def keep(name: str, module, weights: dict, y) -> None:
    torch.sin(y).sum().backward()
    grads = {n: p.grad.numpy() for n, p in module.named_parameters()}
    out.update({f'{name}/{n}': w for n, w in weights.items()})
    out.update({f'{name}/grad/{n}': g for n, g in grads.items()})
    out[f'{name}/y'] = y.detach().numpy()

  layer = LorentzLinear(INNER, WIDTH, nonlin=torch.nn.ReLU()).eval()
  x, residual = points(INNER), points(WIDTH)
  out |= {'linear/x': x.numpy(), 'linear/residual': residual.numpy()}
  keep('linear', layer, randomize(layer), layer(x, residual))

  layer = LorentzMultiHeadedAttention(HEADS, WIDTH, Lorentz()).eval()
  x = points(WIDTH)
  mask = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)[None]
  out['attention/x'] = x.numpy()
  keep('attention', layer, randomize(layer), layer(x, x, x, mask)[0])

  a, b = points(WIDTH), points(WIDTH)
  out |= {'a': a.numpy(), 'b': b.numpy(), 'distance': Lorentz().dist(a, b).numpy()}
  cls = 'LorentzLinear, LorentzMultiHeadedAttention, Lorentz'
  meta = dict(repository='chenweize1998/fully-hyperbolic-nn', commit=COMMIT, cls=cls)
  write('hyperbolic', out, heads=HEADS, **meta)


if __name__ == '__main__':
  main()
