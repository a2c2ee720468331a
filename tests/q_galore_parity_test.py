"""Q-GaLore against recorded runs of the official projector and weight quantizer."""

import json
import pathlib

import jax
import numpy as np
import optax
import pytest

import lrjax
from lrjax import int8_weights
from lrjax.codecs.affine import unpack

VECTORS = pathlib.Path(__file__).parent / 'parity' / 'q_galore.npz'


@pytest.fixture(scope='module')
def recorded():
  with np.load(VECTORS, allow_pickle=False) as f:
    return dict(f)


def probe():
  """An inner optimizer that leaves R as it is and shows it as its state."""
  return optax.GradientTransformation(
    lambda low: low, lambda low, s, p=None: (low, low)
  )


def turned(codec):
  """Groups along the columns of P, where the official code keeps it transposed."""
  return lrjax.Codec(lambda p: codec.encode(p.T), lambda stored: codec.decode(stored).T)


def rule(meta, name, quant):
  codec = lrjax.affine(meta['n_bit'], meta['group_size'])
  # Official: P^T (r, d) for torch weights (out, in) with out >= in, else P (d, r).
  codec = codec if name == 'tall' else turned(codec)
  refresh = lrjax.lazy(
    meta['update_proj_gap'],
    threshold=meta['cos_threshold'],
    window=meta['queue_size'],
    growth=meta['gamma_proj'],
    measure='signed_first_vector',
  )
  basis = lrjax.svd(meta['rank'])
  return lrjax.low_rank(
    lrjax.stored_as(basis, codec) if quant else basis,
    probe(),
    refresh=refresh,
    residual=lrjax.drop(meta['scale']),
  )


@pytest.mark.parametrize(
  ('name', 'kind'),
  [('tall', 'quant'), ('wide', 'quant'), ('square', 'quant'), ('wide', 'plain')],
)
def test_equals_the_official_projector(recorded, name, kind):
  meta = json.loads(str(recorded['meta']))
  want = {
    k.rpartition('/')[2]: v
    for k, v in recorded.items()
    if k.startswith(f'{name}/{kind}')
  }
  grads = recorded[f'{name}/gradients']
  tx = lrjax.on_matrices(
    lambda rank: rule(meta, name, kind == 'quant'), rank=meta['rank']
  )
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
    ours = s.refresh.queue[meta['queue_size'] - len(queue) :]
    # The code compares bases before they are quantized, we the ones that are stored.
    np.testing.assert_allclose(ours, queue, atol=0.06 if kind == 'quant' else 1e-6)
    if kind == 'quant':
      codes = unpack(s.basis).reshape(-1, meta['group_size'])
      np.testing.assert_array_equal(codes, want['codes'][t])
      np.testing.assert_allclose(s.basis['scale'], want['scales'][t][:, 0], rtol=1e-5)
      np.testing.assert_array_equal(s.basis['zero'], want['zeros'][t][:, 0])
      np.testing.assert_allclose(u['w'], want['back'][t].T, atol=1e-6)


def test_equals_the_official_quantizer_of_weights(recorded):
  w = recorded['weight/w']
  stored = int8_weights.quantize({'kernel': w}, group=32)['kernel']
  np.testing.assert_array_equal(stored.codes, recorded['weight/codes'])
  np.testing.assert_allclose(
    stored.scale.ravel(), recorded['weight/scales'][:, 0], rtol=1e-6
  )
  np.testing.assert_array_equal(stored.zero.ravel(), recorded['weight/zeros'][:, 0])
