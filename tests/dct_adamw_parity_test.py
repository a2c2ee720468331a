"""DCT-AdamW against recorded trajectories of the official code."""

import functools

import pytest
from parity.inputs import read
from replay import decayed_before, replay

import lrjax

# Its `matmul` mode has the transpose of the DCT-II for a basis, its `makhoul` mode not.
BASES = {
  'every_step': dict(form='dct3'),
  'feedback': dict(form='dct3', path='fft'),
  'gap': dict(form='dct3', norm='l2'),
  'fft': dict(path='fft'),
  'fft_gap_feedback': dict(path='matmul'),
}


def official_schedule(period):
  """At its first step and at every one, counted from one, that `period` divides."""
  due = lambda s, step, phase: (step == 0) | ((step + 1) % period == 0)
  return lrjax.every(period)._replace(due=due)


@pytest.mark.parametrize('case', BASES)
def test_equals_the_official_code(case):
  meta, _ = read('dct_adamw')
  args = meta['cases'][case]
  basis = functools.partial(lrjax.dct, **BASES[case])
  if args['update_proj_gap'] == 1:
    feedback = 'full' if args.get('use_ef') else 'none'
    tx = lrjax.scale_by_dct_adamw(meta['rank'], error_feedback=feedback, basis=basis)
  else:
    rule = lambda rank: lrjax.low_rank(
      basis(rank),
      lrjax.adam(),
      refresh=official_schedule(args['update_proj_gap']),
      residual=lrjax.error_feedback() if args.get('use_ef') else lrjax.drop(),
      transport=lrjax.rotate_abs,
    )
    tx = lrjax.on_matrices(rule, rank=meta['rank'])
  move = decayed_before(meta)
  error, _ = replay(tx, 'dct_adamw', key=lambda name: f'{name}/{case}', move=move)
  assert error <= 2e-6
