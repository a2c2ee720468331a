"""Llama in the three parts that the layer-wise update asks for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lrjax.layerwise import Parts
from lrjax.models.attention import rotary
from lrjax.models.llama import Llama
from lrjax.models.llama_params import shard_batch
from lrjax.modules.nnx import split
from lrjax.types import PyTree


def llama_parts(
  model: Llama, loss: Callable, tokens: Callable = lambda batch: batch
) -> Parts:
  """The embedding, one layer and the head of a Llama with `scan_layers=True`.

  Parameters are the plain tree of `lrjax.modules.nnx.split(model)`.

  Args:
    model: the model; one made by `nnx.eval_shape` will do.
    loss: `(logits (B, T, V), batch) -> (loss, aux)`.
    tokens: `batch -> ids (B, T)`, the model's input.

  Returns:
    `lrjax.layerwise.Parts`.

  Raises:
    ValueError: if layers are not stacked or take more than the residual stream from
      the one below (`cross_layer`), or their kernels have fixed arrays.

  Examples:
    >>> import optax
    >>> from lrjax.layerwise import layerwise
    >>> from lrjax.models import LlamaConfig
    >>> model = Llama(LlamaConfig(11, 8, 16, 2, 2), rngs=nnx.Rngs(0))
    >>> parts = llama_parts(model, lambda logits, batch: (logits.mean(), None))
    >>> train = layerwise(parts, optax.sgd(0.1), optax.sgd(0.1))
    >>> params, batch = split(model)[1], jnp.zeros((3, 5), jnp.int32)
    >>> run = lambda params, batch: train.step(params, train.init(params), batch)
    >>> params, state, loss, aux = jax.eval_shape(run, params, batch)
    >>> params['layers']['attn']['q']['kernel'].shape
    (2, 8, 8)
  """
  config = model.config
  if not config.scan_layers:
    raise ValueError('the layer-wise update needs stacked layers: scan_layers=True')
  if config.cross_layer:
    raise ValueError('the layer-wise update passes one array on: cross_layer=False')
  layer_def, _, fixed = split(model.layers)
  if jax.tree.leaves(fixed):
    raise ValueError(
      'the layer-wise update of kernels with fixed arrays is not supported; their'
      ' parameterization has them at layers/.../fixed'
    )
  embed, norm = _module(model.embed), _module(model.norm)

  def first(rest: PyTree, batch: Any) -> tuple:
    ids = tokens(batch)
    rotation = rotary(ids.shape[1], config.head_dim, config.rope_theta)
    return shard_batch(embed(rest['embed'])(ids)), rotation

  def layer(params: PyTree, x: jax.Array, rotation: Any, index: Any) -> jax.Array:
    return shard_batch(nnx.merge(layer_def, params, fixed)(x, rotation))

  def last(rest: PyTree, x: jax.Array, batch: Any) -> tuple:
    x = norm(rest['norm'])(x)
    if config.tie_embeddings:
      logits = embed(rest['embed']).attend(x)
    else:
      logits = _module(model.lm_head)(rest['lm_head'])(x)
    return loss(logits.astype(jnp.float32), batch)

  return Parts(first, layer, last)


def _module(module: nnx.Module) -> Callable:
  """`params -> module`."""
  graphdef, _, fixed = split(module)
  return lambda params: nnx.merge(graphdef, params, fixed)
