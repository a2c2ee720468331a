"""Records the trajectories of Flora's official code that `flora_parity_test.py` reads.

Needs torch, bitsandbytes and a checkout of GitHub's BorealisAI/flora-opt at the commit
below, named by PYTHONPATH; then `python tests/parity/record_flora.py`. The file it writes
is data alone; nothing of that code is needed by the tests.

Provenance: 'torch' is class `Flora` of `flora_opt/optimizers/torch/flora.py`, arguments
as below; 'flax' is `flora` of `flora_opt/optimizers/optax/flora.py`. Sketches are recorded
as P (compressed side first), in order of use. What is put right or moved here:

- the torch class changes its sketch at steps kappa - 1, 2 kappa - 1, ... counted from 0.
  Its `kappa` is set before each step so that it changes at kappa, 2 kappa, ...
- the torch file imports accelerate for a class not used here; an empty one stands in.
- the Flax file calls `jax.tree_map`, which is gone like some of its imports, stores the
  momentum in bfloat16, for which float32 is given, and re-projects the momentum with the
  old key on both sides, for which `down_project` is handed the next one there.
"""

import importlib
import types

import numpy as np
from inputs import KEPT, NAMES, inputs, parameter, step, stub, write

COMMIT = 'f329bbc1b6dd08f0d677d369f77ef8cfcae4fcef'
RANK, KAPPA, B1, LR = 4, 5, 0.9, 1e-2


def torch_runs() -> dict:
  stub('accelerate', Accelerator=object)
  from flora_opt.optimizers.torch import flora

  out = {}
  for name in NAMES:
    start, gradients = inputs(name)
    p = parameter(start)
    tx = flora.Flora([p], lr=LR, rank=RANK, beta1=B1, relative_step=False)
    left = p.shape[0] < p.shape[1]

    def sketch(p=p, tx=tx, left=left):
      seed = flora.split_seed(tx.state[p]['seed'])[0 if left else 1]
      shape = (RANK, p.shape[0]) if left else (p.shape[1], RANK)
      drawn = flora.stable_randn(shape, seed=seed).numpy() / RANK**0.5
      return drawn.T if left else drawn

    path, drawn = [], [sketch()]
    for t, g in enumerate(gradients):
      turning = t > 0 and t % KAPPA == 0
      tx.param_groups[0]['kappa'] = 1 if turning else 10**9
      path.append(step(p, tx, g))
      if turning:
        drawn.append(sketch())
    out[f'torch/{name}/params'] = np.stack(path)[KEPT]
    out[f'torch/{name}/drawn'] = np.stack(drawn)
  return out


def flax_runs() -> dict:
  import jax
  import jax.numpy as jnp
  import optax

  jax.tree_map, jax.tree_structure = jax.tree.map, jax.tree.structure
  jax.tree_unflatten = jax.tree.unflatten
  optax._src.clipping = optax.transforms._clipping
  # Its package has a function of the same name.
  flora = importlib.import_module('flora_opt.optimizers.optax.flora')
  in_float32 = lambda dtype: jnp.dtype(jnp.float32)
  flora.utils = types.SimpleNamespace(canonicalize_dtype=in_float32)
  plain_down, plain_up = flora.down_project, flora.up_project
  moving = [False]

  def up_project(*args):
    moving[0] = True
    return plain_up(*args)

  def down_project(key, x, tau):
    # What goes down right after it came up is the momentum at a switch.
    key = flora.next_rng_key(key) if moving[0] else key
    moving[0] = False
    return plain_down(key, x, tau)

  flora.up_project, flora.down_project = up_project, down_project
  out = {}
  for name in NAMES:
    start, gradients = inputs(name)
    w = jnp.asarray(start.T)  # as torch keeps it, so that the same side is compressed
    tx = flora.flora(LR, b1=B1, tau=RANK, kappa=KAPPA, min_dim_size_to_factor=2)
    state = tx.init(w)
    left = w.shape[0] < w.shape[1]
    shape = (RANK, w.shape[0]) if left else (w.shape[1], RANK)
    path, drawn = [], []
    for t, g in enumerate(gradients):
      u, state = tx.update(jnp.asarray(g.T), state, w)
      w = w + u
      if t % KAPPA == 0:
        p = np.asarray(flora.random_generate(state[1].decomposition.proj, shape))
        drawn.append(p.T if left else p)
      path.append(np.asarray(w).T)
    out[f'flax/{name}/params'] = np.stack(path)[KEPT]
    out[f'flax/{name}/drawn'] = np.stack(drawn)
  return out


def main() -> None:
  write(
    'flora',
    torch_runs() | flax_runs(),
    repository='BorealisAI/flora-opt',
    commit=COMMIT,
    cls='flora_opt.optimizers.torch.flora.Flora, flora_opt.optimizers.optax.flora.flora',
    rank=RANK,
    kappa=KAPPA,
    b1=B1,
    lr=LR,
    kept=KEPT,
  )


if __name__ == '__main__':
  main()
