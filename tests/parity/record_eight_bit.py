"""Records the 8-bit map and 8-bit Adam of bitsandbytes, for `eight_bit_test.py`.

Needs `pip install torch bitsandbytes`, then `python tests/parity/record_eight_bit.py`. The
file it writes is data alone; nothing of that package is needed by the tests.

Provenance: bitsandbytes 0.50.2 on a CPU: `functional.create_dynamic_map`, the operator
`quantize_blockwise`, and `optim.Adam8bit` with `min_8bit_size=0`. Patched here: the CPU
kernel of `quantize_blockwise` looks codes up in a coarse table and misses the nearest one
by up to six places for small values; recorded is the package's own default kernel, which
is exact. Gradients keep away from zero, since bitsandbytes rounds the smallest second
moments to zero and lrjax does not.
"""

import numpy as np
from inputs import write

SHAPE, STEPS, BLOCK = (64, 8), 12, 256  # (k, r): bitsandbytes has rows first
ARGS = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def gradients() -> np.ndarray:
  rng = np.random.default_rng(0)
  x = rng.standard_normal((STEPS, *SHAPE)) * np.exp(rng.standard_normal(SHAPE))
  return (x + 0.05 * np.sign(x)).astype(np.float32)


def main() -> None:
  import bitsandbytes as bnb
  import torch
  from bitsandbytes.backends.cpu import ops

  keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
  exact = lambda x, code: torch.ops.bitsandbytes.quantize_blockwise.default.redispatch(
    keys, x, code, BLOCK
  )

  def store(x, code, absmax, out, blocksize):
    assert blocksize == BLOCK
    codes, scale = exact(x, code)
    out.copy_(codes)
    absmax.copy_(scale)

  ops._quant_blockwise_fp32_direct = store
  out = {'gradients': gradients()}
  x = np.random.default_rng(1).standard_normal(600).astype(np.float32)
  for name, signed in (('signed', True), ('unsigned', False)):
    code = bnb.functional.create_dynamic_map(signed=signed)
    values = x if signed else np.square(x)
    codes, scale = exact(torch.tensor(values), code)
    out |= {f'{name}/map': code.numpy(), f'{name}/x': values}
    out |= {f'{name}/codes': codes.numpy(), f'{name}/scale': scale.numpy()}

  p = torch.nn.Parameter(torch.zeros(SHAPE))
  tx = bnb.optim.Adam8bit([p], min_8bit_size=0, **ARGS)
  seen = []
  for g in gradients():
    p.grad = torch.tensor(g)
    tx.step()
    s = tx.state[p]
    assert (s['state2'] > 0).all()
    names = ('state1', 'state2', 'absmax1', 'absmax2')
    seen.append(
      {n: s[n].numpy().copy() for n in names} | {'p': p.detach().numpy().copy()}
    )
  out |= {f'adam/{n}': np.stack([s[n] for s in seen]) for n in seen[0]}
  write('eight_bit', out, 'bitsandbytes', **ARGS)


if __name__ == '__main__':
  main()
