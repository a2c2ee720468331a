"""SNNK against recorded outputs of its official code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.inputs import read

import lrjax
from lrjax.parameterizations import random_features as rf
from lrjax.types import Split

META, RECORDED = read('snnk')


@pytest.mark.parametrize('name', META['relu'])
def test_relu_equals_the_official_code(name):
  args = META['relu'][name]
  o = rf.Features('relu', args.get('normalization_constant'), args.get('constant', 0.0))
  G, x = RECORDED[f'{name}/proj'], jnp.asarray(RECORDED['x'])
  readout = rf.of_weights(o, jnp.asarray(RECORDED['W']), jnp.asarray(G))
  kernel = lrjax.snnk(20, normalize=o.normalize, threshold=o.threshold)
  y = kernel.apply(Split({'readout': readout}, {'proj': G}), x)
  np.testing.assert_allclose(readout, RECORDED[f'{name}/readout'], atol=2e-6)
  np.testing.assert_allclose(y, RECORDED[f'{name}/y'], atol=5e-6)


def test_exp_equals_the_official_code():
  G, x = RECORDED['exp/proj'], jnp.asarray(RECORDED['x'])
  numbers, log = rf.of_inputs(rf.Features('exp'), x @ G, rf.square(x))
  np.testing.assert_allclose(
    numbers * jnp.exp(log), RECORDED['exp/features'], rtol=1e-5
  )


@pytest.mark.parametrize('kind', ['cos', 'sin'])
def test_waves_equal_the_official_code(kind):
  """A bias b is a phase: it turns the pairs (cos, sin) of the readout by b."""
  o = rf.Features(kind, M=META['M'])
  G, b = jnp.asarray(RECORDED[f'{kind}/proj']), jnp.asarray(RECORDED['bias'])
  readout = rf.of_weights(o, jnp.asarray(RECORDED['W']), G)
  re, im = jnp.split(readout, 2)
  c, s = jnp.cos(b)[None], jnp.sin(b)[None]
  turned = jnp.concatenate([re * c + im * s, im * c - re * s])
  split = Split({'readout': turned}, {'proj': G})
  y = jax.jit(lrjax.snnk(20, kind, M=o.M).apply)(split, jnp.asarray(RECORDED['x']))
  want = RECORDED[f'{kind}/y']
  np.testing.assert_allclose(y, want, atol=1e-5 * np.abs(want).max())
