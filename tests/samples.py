"""Gradients that the tests share."""

import jax
import jax.numpy as jnp
import numpy as np


def matrix(shape, seed=0, decay=0.7):
  """A float32 stack of matrices with singular values decay**i in random directions."""
  x = np.random.default_rng(seed).standard_normal(shape)
  u, s, v = np.linalg.svd(x, full_matrices=False)
  return jnp.asarray((u * decay ** np.arange(s.shape[-1])) @ v, jnp.float32)


def gradients(shapes, steps, seed=0):
  """`steps` trees of such matrices, from a dict of shapes."""
  return [
    {
      name: matrix(shape, seed=1000 * seed + 100 * i + t)
      for i, (name, shape) in enumerate(shapes.items())
    }
    for t in range(steps)
  ]


def basis_of(state, name):
  """The basis of one leaf in a `MatricesState`, as numpy."""
  return np.asarray(jax.device_get(state.slots[name].state.basis))
