"""Records what SwitchLoRA's official code does, for `switchlora_test.py`.

Needs torch, transformers, loralib 0.1.2 and a checkout of GitHub's asfsdsf/SwitchLoRA at
the commit below, named by PYTHONPATH; then `python tests/parity/record_switchlora.py`. The
file it writes is data alone; nothing of that code is needed by the tests.

Provenance: class `SwitchLoraLinear` of `switchlora/switch_lora.py`, made from a given
weight by `layer2lora` of `switchlora/lora_utils.py`, and `StepAdamW` of
`switchlora/optimizer.py`, in the order of `llama/main.py` without clipping: backward,
`switch`, `zero_lora_states`, `correct_switched_lora`, optimizer. Packages that the files
import and do not need here (bitsandbytes, torchinfo, matplotlib) are empty modules, and
candidates stay where they are. How many vectors it wants to exchange is told instead of
drawn: COUNTS.
"""

import numpy as np
from inputs import stub, write

COMMIT = 'f9a174e862beaa4550e44e6b1e9913a55df55412'
IN, OUT, RANK, FREEZE, STEPS = 10, 9, 4, 2, 24
# More than may be exchanged now and then, and enough to go round both pools.
COUNTS = [0, 1, 2, 0, 2, 1, 1, 3, 0, 0, 2, 2, 1, 0, 1, 2, 0, 2, 1, 0, 0, 1, 2, 1]
RATES = dict(interval=40, horizon=100, at=[0, 9, 99, 500, 5000])
KEYS = (
  'kernel',
  'a',
  'b',
  'cand_a',
  'cand_b',
  'sel_a',
  'sel_b',
  'freeze_a',
  'freeze_b',
)


def imported():
  """The official modules."""
  for name in ('bitsandbytes', 'bitsandbytes.functional', 'torchinfo', 'matplotlib'):
    stub(name)
  stub('matplotlib.pyplot')
  import torch._utils

  # What torch has changed since: a function that moved, an argument that went.
  torch._utils.is_compiling = torch.compiler.is_compiling
  init_group = torch.optim.AdamW._init_group
  torch.optim.AdamW._init_group = lambda self, group, params, grads, amsgrad, *x, **kw: (
    init_group(self, group, params, grads, *x, **kw)
  )
  from switchlora import lora_utils, optimizer, switch_lora

  switch_lora._ADAM_WARM_STEP = FREEZE
  switch_lora._OFFLOAD_CANDIDATES = False
  return lora_utils, optimizer, switch_lora


def arrays(layer) -> list[np.ndarray]:
  """The state of a layer by KEYS."""
  number = lambda x: x.detach().numpy().copy()
  ints = lambda x: np.array(x, np.int32)
  return [
    number(layer.weight).T,
    number(layer.lora_A).T,
    number(layer.lora_B).T,
    number(layer.candidates_A),
    number(layer.candidates_B),
    ints(layer.selected_A_indices),
    ints(layer.selected_B_indices),
    ints(layer.fixed_A_steps),
    ints(layer.fixed_B_steps),
  ]


def main() -> None:
  import torch

  lora_utils, optimizer, switch_lora = imported()
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  start, xs, gs = normal(IN, OUT) / 4, normal(STEPS, 7, IN), normal(STEPS, 7, OUT)
  torch.manual_seed(0)
  dense = torch.nn.Linear(IN, OUT, bias=False)
  dense.weight.data = torch.tensor(start.T.copy())
  lora_utils.set_use_lora(switch_lora.layer_replace_dict)
  layer = lora_utils.layer2lora(dense, 'cpu', RANK)
  groups = [
    {'params': [layer.lora_A], 'is_lora_A': True},
    {'params': [layer.lora_B], 'is_lora_B': True},
  ]
  tx = optimizer.StepAdamW(groups, lr=0.02, weight_decay=0.0, foreach=True)
  path = [arrays(layer)]
  for t in range(STEPS):
    tx.zero_grad()
    (layer(torch.tensor(xs[t])) * torch.tensor(gs[t])).sum().backward()
    switch_lora._get_switch_replace_num = lambda *args, t=t: COUNTS[t]
    layer.switch(t, 100)
    layer.zero_lora_states(tx)
    layer.correct_switched_lora()
    tx.step()
    path.append(arrays(layer))
  out = {name: np.stack(x) for name, x in zip(KEYS, zip(*path))}
  for name in ('cand_a', 'cand_b'):
    out[name] = out[name][[0, -1]]
  out |= {'start': start, 'x': xs, 'g': gs, 'counts': np.array(COUNTS, np.int32)}
  out['ptr'] = np.array([layer.candidate_A_index, layer.candidate_B_index])
  rates = [switch_lora._get_switch_rate(k, RATES['horizon']) for k in RATES['at']]
  out['rates'] = np.array(rates)
  shapes = [(512, 512, 128), (512, 1376, 64), (30, 20, 4)]
  bounds = [lora_utils.get_init_lora_bound(*shape) for shape in shapes]
  out |= {'shapes': np.array(shapes), 'bounds': np.array(bounds)}
  meta = dict(repository='asfsdsf/SwitchLoRA', commit=COMMIT)
  meta |= dict(cls='SwitchLoraLinear, StepAdamW', rank=RANK, freeze=FREEZE, lr=0.02)
  write('switchlora', out, 'loralib', **meta, rates=RATES)


if __name__ == '__main__':
  main()
