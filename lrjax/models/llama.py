"""LLaMA decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023,
arXiv 2302.13971. Numbers follow `transformers.LlamaForCausalLM`.

Axis letters: B batch, T positions, D hidden, F feed-forward, H query heads, K key-value
heads, C width of a head, L layers, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lrjax.models import crnet
from lrjax.models.attention import causal_attention, rotary, rotate
from lrjax.models.llama_config import LlamaConfig
from lrjax.models.llama_params import shard_batch
from lrjax.models.remat import rematerialize, residual
from lrjax.modules.nnx import Dense
from lrjax.modules.s4d import S4D
from lrjax.parameterizations.dense import dense
from lrjax.types import Parameterization

_DENSE = dense()


class Llama(nnx.Module):
  """A LLaMA decoder whose seven kernels per layer are one parameterization.

  Parameter paths are `embed/embedding`, `layers/attn/{q,k,v,o}/kernel`,
  `layers/mlp/{gate,up,down}/kernel`, `layers/{attn,mlp}_norm/scale`, `norm/scale` and
  `lm_head/kernel`. With `config.scan_layers` the leaves under `layers` have a leading
  axis L, otherwise they are at `layers/<i>/...`; both hold the same numbers for the
  same seed. A parameterization with several arrays has `.../kernel/<name>`. With
  `config.cross_layer` the first layer is dense, at `first/...`, `layers` are the others,
  and `cross/{q,k,v,o,gate,up,down}` holds a scalar for each of these.

  Train it as a function of plain trees:

    graphdef, params, rest = lrjax.modules.nnx.split(model)
    logits = nnx.merge(graphdef, params, rest)(tokens)

  `nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))` has all shapes and
  allocates nothing.

  Args:
    config: shape and numerics.
    kernel: parameterization of q, k, v, o, gate, up and down; its `init` must be
      traceable. The embedding and the head are always dense.
    rngs: its `params` stream draws the parameters, all from N(0, 0.02^2) when dense.

  Examples:
    >>> from flax import nnx
    >>> config = LlamaConfig(11, 8, 16, num_layers=2, num_heads=2)
    >>> model = Llama(config, rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((3, 5), jnp.int32)).shape
    (3, 5, 11)
  """

  def __init__(
    self,
    config: LlamaConfig,
    *,
    kernel: Parameterization = _DENSE,
    rngs: nnx.Rngs,
  ):
    self.config = config
    self.embed = Embed(config, rngs=rngs)
    layer = lambda key: Layer(config, kernel, nnx.Rngs(key))
    keys = jax.random.split(rngs.params(), config.num_layers - config.cross_layer)
    self.layers: Any = (
      nnx.vmap(layer)(keys)
      if config.scan_layers
      else nnx.List([layer(key) for key in keys])
    )
    if config.cross_layer:
      self.first = Layer(config, _DENSE, rngs)
      self.cross = crnet.scales(config)
    self.norm = RMSNorm(config)
    if not config.tie_embeddings:
      self.lm_head = _dense(config, config.hidden_size, config.vocab_size, _DENSE, rngs)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Predicts the next token at each position.

    Args:
      tokens: integer ids (B, T), T at most `config.max_seq_len`. Values cannot be
        checked under jit: an id of `vocab_size` or more makes the logits of its
        sequence NaN, a negative id counts from the end.

    Returns:
      Logits (B, T, V), float32.

    Raises:
      TypeError: if `tokens` is not of integers.
      ValueError: if `tokens` is not (B, T) or is longer than `config.max_seq_len`.
    """
    _check_tokens(tokens, self.config.max_seq_len)
    x = self.embed(tokens)
    rotation = rotary(tokens.shape[1], self.config.head_dim, self.config.rope_theta)
    x = self.norm(self._run_layers(x, rotation))
    head = self.embed.attend if self.config.tie_embeddings else self.lm_head
    return head(x).astype(jnp.float32)

  def _run_layers(self, x, rotation):
    scan, remat = self.config.scan_layers, self.config.remat
    if self.config.cross_layer:
      return crnet.run_layers(
        self.first, self.layers, self.cross, x, rotation, self.config
      )

    def run(layer):
      graphdef, state = nnx.split(layer)
      step = lambda x, state: nnx.merge(graphdef, state)(x, rotation)
      return rematerialize(step, remat, scanned=scan), state

    x = shard_batch(x)
    if scan:
      step, states = run(self.layers)
      carry = lambda x, state: (shard_batch(step(x, state)), None)
      return jax.lax.scan(carry, x, states)[0]
    for layer in self.layers:
      step, state = run(layer)
      x = shard_batch(step(x, state))
    return x


def _apply(role, kernel, x):
  """How layers apply a kernel, unless told otherwise."""
  return kernel(x)


class Layer(nnx.Module):
  """x + attn(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, config, kernel, rngs):
    self.attn_norm = RMSNorm(config)
    mixer = S4DMixer if config.mixer == 's4d' else Attention
    self.attn = mixer(config, kernel, rngs)
    self.mlp_norm = RMSNorm(config)
    self.mlp = MLP(config, kernel, rngs)

  def __call__(self, x, rotation, linear=_apply):
    # The sum returned is an argument of the next layer, and so kept without a name.
    x = residual(x + self.attn(self.attn_norm(x), rotation, linear))
    return x + self.mlp(self.mlp_norm(x), linear)


class Attention(nnx.Module):
  """Causal self-attention with rotary positions; K key-value heads serve H queries."""

  def __init__(self, config, kernel, rngs):
    self.head_dim = config.head_dim
    D, KC = config.hidden_size, config.kv_heads * config.head_dim
    self.q = _dense(config, D, D, kernel, rngs)
    self.k = _dense(config, D, KC, kernel, rngs)
    self.v = _dense(config, D, KC, kernel, rngs)
    self.o = _dense(config, D, D, kernel, rngs)

  def __call__(self, x, rotation, linear=_apply):
    heads = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)  # (B, T, H or K, C)
    kernels = ('q', self.q), ('k', self.k), ('v', self.v)
    q, k, v = (heads(linear(role, kernel, x)) for role, kernel in kernels)
    q, k = rotate(q, rotation), rotate(k, rotation)
    return linear('o', self.o, causal_attention(q, k, v).reshape(*x.shape[:2], -1))


class S4DMixer(S4D):
  """State spaces in the place of attention; they need no positions."""

  def __init__(self, config, kernel, rngs):
    dtypes = dict(dtype=config.dtype, param_dtype=config.param_dtype)
    super().__init__(config.hidden_size, kernel=kernel, rngs=rngs, **dtypes)

  def __call__(self, x, rotation, linear=_apply):
    return super().__call__(x)


class MLP(nnx.Module):
  """SwiGLU: (silu(x gate) * (x up)) down, without the silu for `gate_act='none'`."""

  def __init__(self, config, kernel, rngs):
    D, F = config.hidden_size, config.intermediate_size
    self.gate = _dense(config, D, F, kernel, rngs)
    self.up = _dense(config, D, F, kernel, rngs)
    self.down = _dense(config, F, D, kernel, rngs)
    self.gate_act = config.gate_act

  def __call__(self, x, linear=_apply):
    gate, up = linear('gate', self.gate, x), linear('up', self.up, x)
    gate = jax.nn.silu(gate) if self.gate_act == 'silu' else gate
    return linear('down', self.down, gate * up)


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in float32."""

  def __init__(self, config):
    self.scale = nnx.Param(jnp.ones(config.hidden_size, config.param_dtype))
    self.eps = config.rms_norm_eps

  def __call__(self, x):
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    scale = self.scale[...].astype(jnp.float32)
    return (y * jnp.broadcast_to(scale, y.shape)).astype(x.dtype)


class Embed(nnx.Module):
  """A table (V, D) of token vectors."""

  def __init__(self, config, *, rngs):
    shape = (config.vocab_size, config.hidden_size)
    draw = jax.nn.initializers.normal(0.02)
    self.embedding = nnx.Param(draw(rngs.params(), shape, config.param_dtype))
    self.dtype = config.dtype

  def __call__(self, tokens):
    return jnp.take(self.embedding[...], tokens, axis=0).astype(self.dtype)

  def attend(self, x):
    """x (B, T, D) to logits (B, T, V)."""
    return x @ self.embedding[...].astype(self.dtype).T


def next_token_loss(
  logits: jax.Array,
  targets: jax.Array,
  mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Summed cross entropy and the number of tokens in it.

  Divide sums, not means, when batches are combined: sum(nats) / sum(count) is the
  token-weighted mean whatever the masks.

  Args:
    logits: (B, T, V).
    targets: integer ids (B, T); `targets[:, t]` is what follows position t.
    mask: (B, T), nonzero where a token counts; None: everywhere.

  Returns:
    The sum of -log p(target) in nats, float32, and the count, int32.

  Examples:
    >>> window = jnp.array([[1, 2, 3, 4]])      # tokens and targets, one apart
    >>> logits = jnp.zeros((*window[:, :-1].shape, 10))
    >>> nats, count = next_token_loss(logits, window[:, 1:])
    >>> print(f'{nats / count:.4f}, log(10) = {jnp.log(10):.4f}')
    2.3026, log(10) = 2.3026
  """
  logits = logits.astype(jnp.float32)
  nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  if mask is None:
    return nats.sum(), jnp.int32(nats.size)
  counts = mask != 0
  return jnp.where(counts, nats, 0.0).sum(), counts.sum(dtype=jnp.int32)


def _dense(config, in_features, out_features, kernel, rngs):
  """A layer's Dense in the config's dtypes."""
  return Dense(
    in_features,
    out_features,
    kernel=kernel,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    rngs=rngs,
  )


def _check_tokens(tokens, max_seq_len):
  if not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise TypeError(f'tokens must be integers, got dtype {tokens.dtype}')
  if tokens.ndim != 2:
    raise ValueError(f'tokens must be (batch, positions), got shape {tokens.shape}')
  if tokens.shape[1] > max_seq_len:
    raise ValueError(
      f'got {tokens.shape[1]} positions, config.max_seq_len is {max_seq_len}'
    )
