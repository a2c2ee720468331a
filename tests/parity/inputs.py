"""What the recorded runs of several methods share.

Inputs, official classes run on them, and how the files are written and read. Many runs
have the gradients and first weights of `galore_torch.npz`, kept there once. Torch is
imported by those functions alone that record: the tests read without it.
"""

import importlib.metadata
import json
import pathlib
import sys
import types
from collections.abc import Callable

import numpy as np

HERE = pathlib.Path(__file__).parent
# Weights sum up all updates before them, so a few of them judge every step.
KEPT = [0, 1, 2, 5, 9, 10, 11, 19, 20, 24]
NAMES = ('tall', 'wide', 'square')  # (24, 12), (12, 24), (16, 16) as (in, out)
SMALL = {'tall': (10, 6), 'wide': (6, 10), 'square': (8, 8)}


def inputs(name: str) -> tuple[np.ndarray, np.ndarray]:
  """First weights (in, out) and gradients (25, in, out) of one shape."""
  with np.load(HERE / 'galore_torch.npz', allow_pickle=False) as f:
    return f[f'{name}/start'], f[f'{name}/gradients']


def seed(name: str) -> int:
  return sum(map(ord, name))


def weights(shape: tuple[int, ...], rng: int | np.random.Generator = 7) -> np.ndarray:
  """First weights: small, so that rounding of the sum stays below the tolerance."""
  return (0.1 * np.random.default_rng(rng).standard_normal(shape)).astype(np.float32)


def decaying(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
  """A matrix, each of whose singular values is 0.7 of the one before."""
  s = min(shape)
  u, v = (np.linalg.qr(rng.standard_normal((x, s)))[0] for x in shape)
  return (u * 0.7 ** np.arange(s)) @ v.T


def decaying_gradients(
  seed: int, shape: tuple[int, int], steps: int = 25
) -> np.ndarray:
  """Gradients (steps, in, out) with a decaying spectrum that slowly turns."""
  rng = np.random.default_rng(seed)
  base = decaying(rng, shape)
  return (base + 0.1 * rng.standard_normal((steps, *shape))).astype(np.float32)


def noisy_gradients(seed: int, shape: tuple[int, int], steps: int) -> np.ndarray:
  """Gradients (steps, in, out): one that stays and noise of its size."""
  rng = np.random.default_rng(seed)
  noise = rng.standard_normal((steps, *shape))
  return (rng.standard_normal(shape) + noise).astype(np.float32)


def stub(name: str, path: str | None = None, **members) -> None:
  """Puts an empty module in place of `name`, whose submodules are found at `path`."""
  module = types.ModuleType(name)
  vars(module).update(members)
  if path is not None:
    module.__path__ = [path]
  sys.modules[name] = module


def fix_signs(projector: type, method: str = 'get_orthogonal_matrix') -> None:
  """Gives the bases of an official class the sign convention of `lrjax.fix_signs`."""
  import torch

  plain = getattr(projector, method)

  def fixed(self, weights, rank, type, **rand):
    p = plain(self, weights, rank, type, **rand)
    axis = 0 if type == 'right' else 1  # the axis that runs along the rank
    largest = p.abs().argmax(1 - axis, keepdim=True)
    return p * torch.sign(torch.gather(p, 1 - axis, largest))

  setattr(projector, method, fixed)


def parameter(start: np.ndarray):
  """Weights (in, out) as torch keeps them, (out, in)."""
  import torch

  return torch.nn.Parameter(torch.tensor(start.T.copy()))


def step(p, tx, g: np.ndarray) -> np.ndarray:
  """The weights (in, out) after one more gradient (in, out)."""
  import torch

  p.grad = torch.tensor(g.T.copy())
  tx.step()
  return p.detach().numpy().T.copy()


def follow(p, tx, gradients: np.ndarray) -> np.ndarray:
  """The weights (steps, in, out) after each of the gradients (steps, in, out)."""
  return np.stack([step(p, tx, g) for g in gradients])


def runs(shapes: dict, cases: dict, make: Callable, steps: int = 13) -> dict:
  """The arrays of runs on seeded weights and `noisy_gradients`.

  Args:
    shapes: name -> (in, out).
    cases: name -> what `make` makes an optimizer of.
    make: (torch's parameter, a case) -> optimizer.
    steps: how many.
  """
  out = {}
  for name, shape in shapes.items():
    start, gradients = weights(shape), noisy_gradients(seed(name), shape, steps)
    out |= {f'{name}/start': start, f'{name}/gradients': gradients}
    for case, args in cases.items():
      p = parameter(start)
      out[f'{name}/{case}'] = follow(p, make(p, args), gradients)
  return out


def write(method: str, arrays: dict, *packages: str, **meta) -> None:
  """Writes `<method>.npz` with `meta` and the versions of what ran."""
  names = ('torch', 'numpy', *packages)
  versions = {n: importlib.metadata.version(n) for n in names}
  text = json.dumps(dict(versions=versions, **meta))
  np.savez_compressed(HERE / f'{method}.npz', meta=np.array(text), **arrays)
  print(f'wrote {method}.npz: {text}')


def read(method: str) -> tuple[dict, dict[str, np.ndarray]]:
  """The meta and the arrays of `<method>.npz`."""
  with np.load(HERE / f'{method}.npz', allow_pickle=False) as f:
    return json.loads(str(f['meta'])), {k: f[k] for k in f.files if k != 'meta'}
