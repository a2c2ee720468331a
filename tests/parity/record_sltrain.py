"""Records SLTrain's official layer for `sltrain_parity_test.py`.

Needs torch, transformers and a checkout of GitHub's
OptimAI-Lab/Memory_Efficient_Pretraining at the commit below, named by PYTHONPATH; then
`python tests/parity/record_sltrain.py`. The file it writes is data alone; nothing of that
code is needed by the tests.

Provenance: class `SpLoRaLinear` of `para_eff_pt/pt_sltrain/splora_model.py`, a form in
Python of the layer of andyjm3/SLTrain, whose own needs a C++ extension of the same
operations. Arguments as below. Recorded are its draws (supports (out, in) and row-major,
as it counts), the result and all gradients of a random point, and a regression by torch's
Adam with `merge_and_reinit` and a new optimizer after RESTART updates.
"""

import numpy as np
from inputs import SMALL, seed, write

COMMIT = '9f803d4c6af7e5d312e97de46d7008ec55d990cb'
RANK, TOKENS, STEPS, RESTART, LR = 3, 7, 12, 6, 1e-2
# 1 - b2^t of the usual 0.999 is known to four digits in float32; this is about the layer.
B2 = 0.75
ARGS = dict(sp_ratio=0.2, lora_alpha=4, bias=False)
# Whether the scale is trained.
LEARNED = {'tall': False, 'wide': True}
NAMES = {'a': 'lora_A', 'b': 'lora_B', 'values': 'sparse_value', 'theta': 'scaling'}


def trained(layer) -> dict:
  return {n: getattr(layer, m) for n, m in NAMES.items() if m in layer._parameters}


def numpy(tree: dict) -> dict:
  return {n: x.detach().numpy().copy() for n, x in tree.items()}


def record(shape: tuple[int, int], rng: np.random.Generator, learned: bool) -> dict:
  import torch
  from para_eff_pt.pt_sltrain.splora_model import SpLoRaLinear

  layer = SpLoRaLinear(*shape, RANK, trainable_scaling=learned, **ARGS)
  draw = lambda *s: torch.tensor(rng.standard_normal(s).astype(np.float32))
  x, target = draw(TOKENS, shape[0]), draw(TOKENS, shape[1])
  out = {'x': x.numpy(), 'target': target.numpy(), 'index': layer.sparse_index.numpy()}
  with torch.no_grad():
    layer.lora_B += 0.1 * draw(shape[1], RANK)
  out |= {f'start/{n}': w for n, w in numpy(trained(layer)).items()}

  x.requires_grad_()
  loss = lambda: ((layer(x) - target) ** 2).mean()
  out['y'] = layer(x).detach().numpy()
  loss().backward()
  grads = {n: w.grad for n, w in trained(layer).items()}
  out |= {f'gradient/{n}': g for n, g in numpy({'x': x.grad, **grads}).items()}

  path = []
  for t in range(STEPS):
    if t == RESTART:
      layer.merge_and_reinit()
    if t in (0, RESTART):
      adam = torch.optim.Adam(layer.parameters(), LR, (0.9, B2))
    adam.zero_grad()
    loss().backward()
    adam.step()
    path.append(layer(x).detach().numpy())
  return out | {'path': np.stack(path)}


def main() -> None:
  import torch

  out = {}
  for name, learned in LEARNED.items():
    torch.manual_seed(seed(name))
    arrays = record(SMALL[name], np.random.default_rng(seed(name)), learned)
    out |= {f'{name}/{n}': x for n, x in arrays.items()}
  cls = 'para_eff_pt.pt_sltrain.splora_model.SpLoRaLinear'
  meta = dict(repository='OptimAI-Lab/Memory_Efficient_Pretraining', commit=COMMIT)
  args = dict(
    rank=RANK, steps=STEPS, restart=RESTART, lr=LR, b2=B2, learned=LEARNED, **ARGS
  )
  write('sltrain', out, 'transformers', cls=cls, **meta, **args)


if __name__ == '__main__':
  main()
