"""Causal grouped-query attention and rotary positions, as plain functions.

Axis letters: B batch, T positions, H query heads, K key-value heads, C width of a head.
"""

import jax
import jax.numpy as jnp


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """softmax(q k^T / sqrt(C) + causal mask) v, the softmax in float32.

  Equal to `jax.nn.dot_product_attention(q, k, v, is_causal=True)`, and a quarter faster
  over a training step of the tiny model on two CPU cores.

  Args:
    q: (B, T, H, C).
    k: (B, T, K, C); query head h reads key-value head h // (H / K).
    v: (B, T, K, C).

  Returns:
    (B, T, H, C).
  """
  B, T, H, C = q.shape
  K = k.shape[2]
  q, k, v = (a.swapaxes(1, 2) for a in (q * C**-0.5, k, v))
  q = q.reshape(B, K, -1, C)  # the queries of a group are more rows against one key
  scores = jnp.einsum('bkqc,bksc->bkqs', q, k, preferred_element_type=jnp.float32)
  mask = jnp.where(jnp.tri(T, dtype=bool), 0.0, -1e30)
  p = jax.nn.softmax(scores.reshape(B, H, T, T) + mask[None, None])
  y = p.astype(v.dtype).reshape(B, K, -1, T) @ v
  return y.reshape(B, H, T, C).swapaxes(1, 2)


def rotary(length: int, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
  """cos and sin (T, C) of t * theta^(-2i/C), i = 0..C/2-1 twice over, in float32."""
  frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angle = jnp.tile(jnp.outer(jnp.arange(length), frequency), (1, 2))
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates the pairs (x_i, x_(i+C/2)) of x (B, T, H, C); the halves are HF's order."""
  cos, sin = (a[None, :, None] for a in rotation)
  y = x.astype(jnp.float32)
  low, high = jnp.split(y, 2, axis=-1)
  return (y * cos + jnp.concatenate([-high, low], axis=-1) * sin).astype(x.dtype)
