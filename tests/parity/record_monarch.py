"""Records what Monarch's official code computes, for `monarch_test.py`.

Needs torch, einops and a checkout of GitHub's HazyResearch/fly at the commit below, named
by PYTHONPATH; then `python tests/parity/record_monarch.py`. The file it writes is data
alone; nothing of that code is needed by the tests.

Provenance: `MonarchLinear` of `src/models/layers/monarch_linear.py` (outputs and
gradients, `blockdiag_butterfly_multiply` inside), `blockdiag_butterfly_project` of
`src/ops/blockdiag_butterfly_projection.py` and `blockdiag_butterfly_project_einsum_rank`
of `src/ops/blockdiag_butterfly_einsum.py` (as the matrices they stand for, since signs of
singular vectors are LAPACK's), all in float64. The logger, which needs a training
framework, is put aside. Layers are (in, out, nblocks); projections
(in, out, blocks of the input, of the output, rank).
"""

import logging

from inputs import stub, write

COMMIT = '6b73449a6b3e228af9e4afe4f153a384e9b537b9'
LAYERS = {
  'square': (16, 16, 4),
  'wide': (12, 20, 4),
  'tall': (20, 12, 2),
  'uneven': (10, 15, 4),
}
PROJECTIONS = {'wide': (16, 24, 4, 4, 1), 'two_sided': (16, 24, 2, 4, 2)}


def main() -> None:
  stub('src.utils.utils', get_logger=logging.getLogger)
  import torch
  from src.models.layers.blockdiag_butterfly_multiply import (
    blockdiag_butterfly_multiply_reference,
  )
  from src.models.layers.monarch_linear import MonarchLinear
  from src.ops import blockdiag_butterfly_einsum as einsum
  from src.ops.blockdiag_butterfly_projection import blockdiag_butterfly_project

  torch.manual_seed(0)
  draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)
  dense = lambda *w: blockdiag_butterfly_multiply_reference(
    torch.eye(w[0].shape[0] * w[0].shape[2], dtype=torch.float64), *w, version=3
  )
  out = {}

  def keep(name: str, **arrays) -> None:
    out.update({f'{name}/{k}': v.detach().numpy() for k, v in arrays.items()})

  for name, (n, m, nblocks) in LAYERS.items():
    layer = MonarchLinear(n, m, bias=False, nblocks=nblocks).double()
    x = draw(5, n).requires_grad_()
    y = layer(x)
    y.sin().sum().backward()
    w1, w2 = layer.blkdiag1, layer.blkdiag2
    keep(name, w1=w1, w2=w2, x=x, y=y, dw1=w1.grad, dw2=w2.grad, dx=x.grad)
  W = draw(16, 16)
  keep('project', W=W.T, dense=dense(*blockdiag_butterfly_project(W)))
  for name, (n, m, k, l, rank) in PROJECTIONS.items():
    W = draw(m, n)
    w = einsum.blockdiag_butterfly_project_einsum_rank(W, k, l, rank)
    keep(f'project_{name}', W=W.T, dense=dense(*w))
  meta = dict(repository='HazyResearch/fly', commit=COMMIT, layers=LAYERS)
  write('monarch', out, 'einops', projections=PROJECTIONS, **meta)


if __name__ == '__main__':
  main()
