"""Records products and layers of the Householder Projector that its parity test reads.

Needs torch and `StyleGAN2/` of a checkout of GitHub's KingJamesSong/HouseholderGAN at
the commit below, named by PYTHONPATH; then `python tests/parity/record_householder.py`.
The file it writes is data alone; nothing of that code is needed by the tests.

Provenance: `Q` and `fasthpp` of `model_ortho.py`; `EqualLinear` of `model.py` with
`is_ortho=True`, its output, and the gradients of sum(sin(output)). Its CUDA extension
`op` is replaced by an empty module: a layer without an activation does not call it.
Gradients are taken with `Q` in place of `fasthpp`, as a comment there suggests: the latter
changes in place what its backward pass needs, and torch refuses. Sizes are powers of two
with in <= out, because others fail in the official forward pass.
"""

import numpy as np
from inputs import stub, write

COMMIT = '0d1352c1ec246dc915ea864394c9cd668a8d73d3'
SIZES = (8, 16)
# (in, out, diag_size): the third keeps all directions.
LAYERS = {'square': (16, 16, 5), 'wide': (8, 16, 5), 'whole': (16, 16, 16)}


def main() -> None:
  import torch

  stub('op', FusedLeakyReLU=None, fused_leaky_relu=None, upfirdn2d=None)
  stub('op.conv2d_gradfix')
  import op

  op.conv2d_gradfix = None
  import model
  from model_ortho import Q, fasthpp

  rng = np.random.default_rng(11)
  raw = lambda n: (0.05 * rng.standard_normal((n, n))).astype(np.float32)
  out = {}
  for n in SIZES:
    M = raw(n)
    out |= {f'{n}/raw': M, f'{n}/Q': Q(torch.tensor(M)).numpy()}
    out[f'{n}/fasthpp'] = fasthpp(torch.tensor(M)).numpy()
  for name, (ins, outs, rank) in LAYERS.items():
    layer = model.EqualLinear(ins, outs, is_ortho=True, diag_size=rank)
    x = rng.standard_normal((6, ins)).astype(np.float32)
    with torch.no_grad():
      layer.U.copy_(torch.tensor(raw(outs)))
      layer.V.copy_(torch.tensor(raw(ins)))
    model.fasthpp = fasthpp
    y = layer(torch.tensor(x))
    model.fasthpp = Q
    torch.sin(layer(torch.tensor(x))).sum().backward()
    out |= {f'{name}/x': x, f'{name}/y': y.detach().numpy()}
    for side, M in {'U': layer.U, 'V': layer.V}.items():
      out[f'{name}/{side}'] = M.detach().numpy()
      out[f'{name}/grad_{side}'] = M.grad.numpy()
  meta = dict(repository='KingJamesSong/HouseholderGAN', commit=COMMIT)
  cls = 'model_ortho.Q, model_ortho.fasthpp, model.EqualLinear'
  write('householder', out, cls=cls, layers=LAYERS, **meta)


if __name__ == '__main__':
  main()
