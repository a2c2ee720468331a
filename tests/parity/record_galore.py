"""Records the trajectories of galore-torch that `galore_parity_test.py` reads.

Needs `pip install torch galore-torch bitsandbytes transformers`, then
`python tests/parity/record_galore.py`. The file it writes is data alone; nothing of that
package is needed by the tests.

Provenance: galore-torch 1.0, class `GaLoreAdamW`, arguments as below; the basis of
`GaLoreProjector.get_orthogonal_matrix` gets the sign convention of `lrjax.fix_signs`,
because the trajectory depends on signs that LAPACK leaves open.
"""

from inputs import (
  decaying_gradients,
  fix_signs,
  follow,
  parameter,
  seed,
  weights,
  write,
)

SHAPES = {'tall': (24, 12), 'wide': (12, 24), 'square': (16, 16)}  # (in, out)
ARGS = dict(rank=4, update_proj_gap=10, scale=0.25, proj_type='std')
SETTINGS = dict(lr=1e-2, weight_decay=0.1)


def main() -> None:
  from galore_torch import GaLoreAdamW
  from galore_torch.galore_projector import GaLoreProjector

  fix_signs(GaLoreProjector)
  out = {}
  for name, shape in SHAPES.items():
    start, gradients = weights(shape), decaying_gradients(seed(name), shape)
    p = parameter(start)
    groups = [{'params': [p], **ARGS}]
    tx = GaLoreAdamW(groups, no_deprecation_warning=True, **SETTINGS)
    out[f'{name}/start'], out[f'{name}/params'] = start, follow(p, tx, gradients)
    out[f'{name}/gradients'] = gradients
  write('galore_torch', out, 'galore-torch', **SETTINGS, **ARGS)


if __name__ == '__main__':
  main()
