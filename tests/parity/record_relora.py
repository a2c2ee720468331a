"""Records what ReLoRA's official code does, for `relora_test.py`.

Needs torch, transformers and a checkout of GitHub's Guitaricet/relora at the commit
below, named by PYTHONPATH; then `python tests/parity/record_relora.py`. The file it writes
is data alone; nothing of that code is needed by the tests.

Provenance: class `ReLoRaLinear` of `peft_pretraining/relora.py`, wrapped around a given
weight, with `merge_and_reinit`; `optimizer_reset` and `get_scheculer` of
`peft_pretraining/training_utils.py`; `torch.optim.AdamW`; in the order of
`torchrun_main.py`: update, learning rate, merge, reset. Packages that the files import
and do not need here (bitsandbytes, loguru, wandb, the model) are empty modules. What the
code redraws is recorded. Zeroed moments are a random pruning of ratio 1, because its
`reset` keeps one entry in a thousand. Pruning has a large eps: the code prunes the two
moments apart, so that with the usual 1e-8 entries of a that keep the first and lose the
second take a step of 4e5 right after the merge, where their gradient is 0.
"""

import numpy as np
from inputs import stub, write

COMMIT = '176f37633fe02019835387258ddabcf6d91e328d'
IN, OUT, RANK, ALPHA, EVERY, STEPS = 10, 6, 3, 6.0, 5, 20
SCHEDULE = dict(
  num_training_steps=20, warmup_steps=2, min_lr_ratio=0.1, restart_warmup_steps=2
)
RESETS = {
  'zero': dict(optimizer_random_pruning=1.0, optimizer_magnitude_pruning=0.0),
  'magnitude': dict(optimizer_random_pruning=0.0, optimizer_magnitude_pruning=0.6),
}
EPS = {'zero': 1e-8, 'magnitude': 0.1}
TABLE = dict(
  num_training_steps=20000,
  first_warmup_steps=500,
  restart_warmup_steps=100,
  restart_every=5000,
  min_lr_ratio=0.1,
  adjust_step=0,
)
AT = [0, 1, 250, 500, 4999, 5000, 5001, 5050, 5100, 9999, 10050, 10100, 15100, 19999]


def imported():
  """The official modules."""
  for name in ('bitsandbytes', 'bitsandbytes.functional', 'wandb'):
    stub(name)
  stub('loguru', logger=Silent())
  stub('peft_pretraining.modeling_llama', LlamaDecoderLayer=None)
  from peft_pretraining import relora, training_utils

  return relora, training_utils


class Silent:
  def __getattr__(self, name):
    return lambda *args, **kwargs: None


def run(
  reset: dict, eps: float, start: np.ndarray, xs: np.ndarray, gs: np.ndarray
) -> dict:
  import torch

  relora, utils = imported()
  torch.manual_seed(0)
  weight = torch.tensor(start.T.copy())
  layer = relora.ReLoRaLinear(
    IN,
    OUT,
    RANK,
    lora_alpha=ALPHA,
    lora_dropout=0.0,
    weight_data=weight,
    bias=False,
    quantize=None,
  )
  factors = [layer.lora_A.weight, layer.lora_B.weight]
  tx = torch.optim.AdamW(factors, lr=0.05, weight_decay=0.0, eps=eps)
  rate = utils.get_scheculer(
    tx, scheduler_type='cosine_restarts', cycle_length=EVERY, **SCHEDULE
  )
  drawn, path = [layer.lora_A.weight.detach().numpy().T.copy()], []
  for update in range(1, STEPS + 1):
    tx.zero_grad()
    (
      layer(torch.tensor(xs[update - 1])) * torch.tensor(gs[update - 1])
    ).sum().backward()
    tx.step()
    rate.step()
    if update > EVERY and update % EVERY == 1:
      layer.merge_and_reinit()
      utils.optimizer_reset(
        tx,
        reset_params=factors,
        optimizer_state_keys=['exp_avg', 'exp_avg_sq'],
        reset_optimizer_on_relora=False,
        **reset,
      )
      drawn.append(layer.lora_A.weight.detach().numpy().T.copy())
    w = (layer.weight, layer.lora_A.weight, layer.lora_B.weight)
    path.append([x.detach().numpy().T.copy() for x in w])
  kernel, a, b = (np.stack(x) for x in zip(*path))
  return {'drawn': np.stack(drawn), 'kernel': kernel, 'a': a, 'b': b}


def main() -> None:
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  out = {
    'start': normal(IN, OUT) / 4,
    'x': normal(STEPS, 7, IN),
    'g': normal(STEPS, 7, OUT),
  }
  for name, reset in RESETS.items():
    arrays = run(reset, EPS[name], out['start'], out['x'], out['g'])
    out |= {f'{name}/{key}': value for key, value in arrays.items()}
  _, utils = imported()
  table = [
    utils._get_cosine_schedule_with_multiple_warmups_lambda(k, **TABLE) for k in AT
  ]
  out['schedule'] = np.array([AT, table])
  meta = dict(repository='Guitaricet/relora', commit=COMMIT, cls='relora.ReLoRaLinear')
  meta |= dict(rank=RANK, alpha=ALPHA, every=EVERY, lr=0.05, **SCHEDULE)
  write('relora', out, 'transformers', **meta, resets=RESETS, eps=EPS)


if __name__ == '__main__':
  main()
