"""Q-GaLore against recorded runs of the official projector and weight quantizer."""

import jax
import numpy as np
import optax
import pytest
from parity.inputs import read

import lrjax
from lrjax import int8_weights
from lrjax.codecs.affine import unpack

META, RECORDED = read('q_galore')


def probe():
  """An inner optimizer that leaves R as it is and shows it as its state."""
  return optax.GradientTransformation(
    lambda low: low, lambda low, s, p=None: (low, low)
  )


def turned(codec):
  """Groups along the columns of P, where the official code keeps it transposed."""
  return lrjax.Codec(lambda p: codec.encode(p.T), lambda stored: codec.decode(stored).T)


def rule(name, quant):
  codec = lrjax.affine(META['n_bit'], META['group_size'])
  # Official: P^T (r, d) for torch weights (out, in) with out >= in, else P (d, r).
  codec = codec if name == 'tall' else turned(codec)
  refresh = lrjax.lazy(
    META['update_proj_gap'],
    threshold=META['cos_threshold'],
    window=META['queue_size'],
    growth=META['gamma_proj'],
    measure='signed_first_vector',
  )
  basis = lrjax.svd(META['rank'])
  return lrjax.low_rank(
    lrjax.stored_as(basis, codec) if quant else basis,
    probe(),
    refresh=refresh,
    residual=lrjax.drop(META['scale']),
  )


@pytest.mark.parametrize(
  ('name', 'kind'),
  [('tall', 'quant'), ('wide', 'quant'), ('square', 'quant'), ('wide', 'plain')],
)
def test_equals_the_official_projector(name, kind):
  want = {
    k.rpartition('/')[2]: v
    for k, v in RECORDED.items()
    if k.startswith(f'{name}/{kind}')
  }
  grads = RECORDED[f'{name}/gradients']
  tx = lrjax.on_matrices(lambda rank: rule(name, kind == 'quant'), rank=META['rank'])
  state, update = tx.init({'w': grads[0]}), jax.jit(tx.update)
  for t, g in enumerate(grads):
    u, state = update({'w': g}, state)
    s = state.slots['w'].state
    # torch keeps (out, in), so its R is ours or ours transposed
    low = want['low'][t] if name == 'tall' else want['low'][t].T
    low = low.T if low.shape != s.inner.shape else low
    np.testing.assert_allclose(s.inner, low, atol=1e-6)
    assert int(s.refresh.gap) == want['gap'][t]
    assert int(s.refresh.refreshes) == want['refreshes'][t]
    queue = want['queue'][t][~np.isnan(want['queue'][t])]
    ours = s.refresh.queue[META['queue_size'] - len(queue) :]
    # The code compares bases before they are quantized, we the ones that are stored.
    np.testing.assert_allclose(ours, queue, atol=0.06 if kind == 'quant' else 1e-6)
    if kind == 'quant':
      codes = unpack(s.basis).reshape(-1, META['group_size'])
      np.testing.assert_array_equal(codes, want['codes'][t])
      np.testing.assert_allclose(s.basis['scale'], want['scales'][t][:, 0], rtol=1e-5)
      np.testing.assert_array_equal(s.basis['zero'], want['zeros'][t][:, 0])
      np.testing.assert_allclose(u['w'], want['back'][t].T, atol=1e-6)


def test_equals_the_official_quantizer_of_weights():
  w = RECORDED['weight/w']
  stored = int8_weights.quantize({'kernel': w}, group=32)['kernel']
  np.testing.assert_array_equal(stored.codes, RECORDED['weight/codes'])
  np.testing.assert_allclose(
    stored.scale.ravel(), RECORDED['weight/scales'][:, 0], rtol=1e-6
  )
  np.testing.assert_array_equal(stored.zero.ravel(), RECORDED['weight/zeros'][:, 0])
