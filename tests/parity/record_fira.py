"""Records the trajectories of Fira's official code that `fira_parity_test.py` reads.

Needs torch, transformers and a checkout of GitHub's xichen-fy/Fira at the commit below,
named by PYTHONPATH; then `python tests/parity/record_fira.py`. The file it writes is data
alone; nothing of that code is needed by the tests.

Provenance: class `AdamW` of `optimizer_torch/fira_adamw.py`, arguments as below. The
basis of `GradientProjector.get_orthogonal_matrix` gets the sign convention of
`lrjax.fix_signs`, because the trajectory depends on signs that LAPACK leaves open.
"""

from inputs import KEPT, NAMES, fix_signs, follow, inputs, parameter, write

COMMIT = '5c28b13408282b3ee65386b110318659412ddad9'
ARGS = dict(rank=4, update_proj_gap=10, alpha=0.25, proj_type='std')
SETTINGS = dict(lr=1e-2, weight_decay=0.1)


def main() -> None:
  from optimizer_torch.fira_adamw import AdamW
  from optimizer_torch.gradient_projection import GradientProjector

  fix_signs(GradientProjector)
  out = {}
  for name in NAMES:
    start, gradients = inputs(name)
    p = parameter(start)
    tx = AdamW([{'params': [p], **ARGS}], no_deprecation_warning=True, **SETTINGS)
    out[f'{name}/params'] = follow(p, tx, gradients)[KEPT]
  cls = 'optimizer_torch.fira_adamw.AdamW'
  meta = dict(repository='xichen-fy/Fira', commit=COMMIT, cls=cls, kept=KEPT)
  write('fira', out, **meta, **SETTINGS, **ARGS)


if __name__ == '__main__':
  main()
