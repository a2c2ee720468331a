"""Inner optimizers against optax and against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from samples import matrix

import lrjax
from lrjax.testing import trajectory

GRADS = [matrix((3, 5), seed) for seed in range(4)]


def test_adam_is_that_of_optax():
  kw = dict(b1=0.8, b2=0.95, eps=1e-3)
  out, state = trajectory(lrjax.adam(**kw), GRADS[0], GRADS)
  want, want_state = trajectory(optax.scale_by_adam(**kw), GRADS[0], GRADS)
  for a, b in zip(out + list(state), want + list(want_state)):
    np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize('kind', ['step', 'none'])
def test_where_the_bias_is_corrected(kind):
  b1, b2, eps = 0.9, 0.999, 1e-2
  out, _ = trajectory(lrjax.adam(b1, b2, eps, bias_correction=kind), GRADS[0], GRADS)
  m = v = np.zeros((3, 5))
  for t, g in enumerate(np.asarray(GRADS, np.float64), 1):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    factor = np.sqrt(1 - b2**t) / (1 - b1**t) if kind == 'step' else 1.0
    # 1 - b**t in float32 is good to 1e-4 at t = 1, b = 0.999.
    np.testing.assert_allclose(out[t - 1], factor * m / (np.sqrt(v) + eps), rtol=1e-4)


def test_moments_have_a_dtype_each_and_arithmetic_is_float32():
  tx = lrjax.adam(mu_dtype=jnp.bfloat16)
  out, state = trajectory(tx, GRADS[0], GRADS)
  assert (state.mu.dtype, state.nu.dtype) == (jnp.bfloat16, jnp.float32)
  want, _ = trajectory(lrjax.adam(), GRADS[0], GRADS)
  np.testing.assert_allclose(out[-1], want[-1], atol=2e-2)  # of mu in bf16
  tx = lrjax.adam(nu_dtype=jnp.bfloat16)
  half = [g.astype(jnp.bfloat16) for g in GRADS]
  out, state = trajectory(tx, half[0], half)
  assert (state.mu.dtype, state.nu.dtype) == (jnp.float32, jnp.bfloat16)
  assert out[-1].dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ('bad', 'error', 'message'),
  [
    (dict(b1=1.0), ValueError, '`b1` must be at least 0 and below 1.0, got 1.0'),
    (dict(b2=-0.1), ValueError, '`b2` must be at least 0 and below 1.0, got -0.1'),
    (dict(eps=float('nan')), ValueError, '`eps`.*got nan'),
    (dict(eps='1e-8'), TypeError, '`eps` must be a number.*type str'),
    (dict(mu_dtype=jnp.int8), TypeError, '`mu_dtype` must be a floating-point'),
    (dict(nu_dtype=jnp.int8), TypeError, '`nu_dtype` must be a floating-point'),
    (dict(bias_correction='moment'), ValueError, "did you mean 'moments'"),
  ],
  ids=str,
)
def test_bad_arguments_of_adam(bad, error, message):
  with pytest.raises(error, match=message):
    lrjax.adam(**bad)


def test_factored_rms_without_parameters():
  tx = lrjax.factored_rms(decay_rate=0.8)
  out, state = trajectory(tx, None, GRADS, tx.init(GRADS[0]))
  want_rows = want_columns = 0.0
  for t, g in enumerate(np.asarray(GRADS, np.float64)):
    decay = 1 - (t + 1.0) ** -0.8
    square = g**2 + 1e-30
    want_rows = decay * want_rows + (1 - decay) * square.mean(axis=1)
    want_columns = decay * want_columns + (1 - decay) * square.mean(axis=0)
    v = np.outer(want_rows, want_columns) / want_rows.mean()
    u = g / np.sqrt(v)
    u = u / max(1.0, np.sqrt(np.mean(u**2)))
    np.testing.assert_allclose(out[t], u, rtol=1e-4)
  sizes = [x.size for x in jax.tree.leaves(state)]
  assert sum(sizes) < 15, 'second moments are not factored'
