"""Records the trajectories of LDAdam's official code that `ldadam_parity_test.py` reads.

Needs torch and a checkout of GitHub's IST-DASLab/LDAdam at the commit below, named by
PYTHONPATH; then `python tests/parity/record_ldadam.py`. The file it writes is data alone;
nothing of that code is needed by the tests.

Provenance: class `LDAdamW` of `ldadamw_torch/ldadamw.py`, arguments as below. Its error
buffer lives in `p.grad`, so each gradient is added to what the step left there.
"""

import numpy as np
from inputs import KEPT, NAMES, inputs, parameter, step, write

COMMIT = 'f3c5daff2fc907869f8ebe8134cc29ea54c45639'
ARGS = dict(rank=4, rho=0.908)
SETTINGS, BETAS = dict(lr=1e-2, weight_decay=0.1, eps=1e-8), (0.908, 0.99)
STEPS = 12


def main() -> None:
  from ldadamw_torch.ldadamw import LDAdamW

  kept = [t for t in KEPT if t < STEPS]
  out = {}
  for name in NAMES:
    start, gradients = inputs(name)
    for kind, feedback in (('feedback', True), ('plain', False)):
      p = parameter(start)
      groups = [{'params': [p], 'enable_lowrank': True, **ARGS}]
      tx = LDAdamW(groups, error_feedback=feedback, betas=BETAS, **SETTINGS)
      path = []
      for g in gradients[:STEPS]:
        tx.zero_grad()
        path.append(step(p, tx, g if p.grad is None else p.grad.numpy().T + g))
      out[f'{kind}/{name}/params'] = np.stack(path)[kept]
  write(
    'ldadam',
    out,
    repository='IST-DASLab/LDAdam',
    commit=COMMIT,
    cls='ldadamw_torch.ldadamw.LDAdamW',
    b1=BETAS[0],
    b2=BETAS[1],
    kept=kept,
    **SETTINGS,
    **ARGS,
  )


if __name__ == '__main__':
  main()
