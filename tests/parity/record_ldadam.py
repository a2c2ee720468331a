"""Records the trajectories of LDAdam's official code that `ldadam_parity_test.py` reads.

Needs torch and a checkout of GitHub's IST-DASLab/LDAdam at the commit below, named by
PYTHONPATH; then `python tests/parity/record_ldadam.py`. The file it writes is data alone;
nothing of that code is needed by the tests.

Provenance: class `LDAdamW` of `ldadamw_torch/ldadamw.py`, arguments as below. Its error
buffer lives in `p.grad`, so each gradient is added to what the step left there.
"""

import numpy as np
from inputs import KEPT, NAMES, inputs, write

COMMIT = 'f3c5daff2fc907869f8ebe8134cc29ea54c45639'
ARGS = dict(rank=4, rho=0.908)
LR, WEIGHT_DECAY, BETAS, EPS = 1e-2, 0.1, (0.908, 0.99), 1e-8
STEPS = 12


def main() -> None:
  import torch
  from ldadamw_torch.ldadamw import LDAdamW

  kept = [t for t in KEPT if t < STEPS]
  out = {}
  for name in NAMES:
    start, gradients = inputs(name)
    for feedback in (True, False):
      p = torch.nn.Parameter(torch.tensor(start.T.copy()))  # torch keeps (out, in)
      groups = [{'params': [p], 'enable_lowrank': True, **ARGS}]
      kw = dict(lr=LR, weight_decay=WEIGHT_DECAY, betas=BETAS, eps=EPS)
      tx = LDAdamW(groups, error_feedback=feedback, **kw)
      path = []
      for g in gradients[:STEPS]:
        tx.zero_grad()
        g = torch.tensor(g.T.copy())
        p.grad = g if p.grad is None else p.grad + g
        tx.step()
        path.append(p.detach().numpy().T.copy())
      out[f'{"feedback" if feedback else "plain"}/{name}/params'] = np.stack(
        [path[t] for t in kept]
      )
  meta = dict(
    repository='IST-DASLab/LDAdam',
    commit=COMMIT,
    cls='ldadamw_torch.ldadamw.LDAdamW',
    lr=LR,
    weight_decay=WEIGHT_DECAY,
    b1=BETAS[0],
    b2=BETAS[1],
    eps=EPS,
    kept=kept,
    **ARGS,
  )
  write('ldadam', meta, out)


if __name__ == '__main__':
  main()
