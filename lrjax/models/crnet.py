r"""CR-Net: each linear output is that of the layer below, rescaled, plus a low-rank term.

Kong, Liang, Liu, Deng, Yuan, "CR-Net: Scaling Parameter-Efficient Training with
Cross-Layer Low-Rank Structure", 2025, arXiv 2509.18993. A reconstruction: the repository
that the paper names could not be had. Sure are the equations, the dense first layer, that
:math:`\beta` is trained, and the parameter totals, which come out. Not found, and our
choice: that :math:`\beta` starts at 0.5, the factors as their parameterization has it, and
that :math:`\beta = 0` counts as positive.

For each of the positions P = q, k, v, o, gate, up, down, before rotation and activation:

.. math::
  Y_1^P = X_1^P W^P, \qquad
  Y_l^P = \tilde\beta_l^P Y_{l-1}^P + X_l^P A_l^P B_l^P, \qquad
  \tilde\beta = \mathrm{sign}(\beta) (|\beta| + 10^{-6}),\ \mathrm{sign}(0) = 1

A Llama is such a network with `LlamaConfig(cross_layer=True)`; its kernel, such as
`factorized(r)`, is that of the terms :math:`X A B`.

Weights: 4 h^2 + 3 h f in the first layer, (L - 1) (11 h r + 3 f r + 7) in the others.
Kept for the backward pass beyond what low-rank layers keep: 5 h + 2 f outputs a token and
layer. With `remat` these are kept at every eighth layer alone, from which the outputs of
the next eight are computed forward again; the first such segment has the dense layer and
what eight does not divide. 'low_rank' keeps all x A and the residual stream too, so that
outputs cost the products with B and no attention.

The paper goes backward instead, :math:`Y_{l-1} = (Y_l - X_l A_l B_l) / \tilde\beta_l`,
which we have not: in bfloat16 five such steps, with terms as large as the outputs or
smaller, have a relative error of 0.3 to 1.4 % at :math:`\beta = 0.9`, 10 to 80 % at 0.3
and above 1000 at 0.05. Outputs kept are as many either way.

Choose it for a low-rank model of the perplexity of full rank up to about 1B; published
margins shrink with size and turn at 13B. Layers cannot be dropped, left early or merged
into dense ones, and stages of a pipeline pass seven more arrays on.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lrjax.models.llama_config import LlamaConfig
from lrjax.models.llama_params import shard_batch
from lrjax.models.remat import rematerialize

ROLES = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
SEGMENT = 8  # layers from one set of kept outputs to the next, with remat


def scales(config: LlamaConfig) -> nnx.Dict:
  """The scalars beta by role, one for each layer but the first.

  They are float32 always, because bfloat16 would round most of their updates away.
  """
  start = lambda: jnp.full(config.num_layers - 1, 0.5, jnp.float32)
  return nnx.Dict({role: nnx.Param(start()) for role in ROLES})


def run_layers(
  first: nnx.Module,
  layers: nnx.Module,
  beta: nnx.Dict,
  x: jax.Array,
  rotation: tuple[jax.Array, jax.Array],
  config: LlamaConfig,
) -> jax.Array:
  """The residual stream after all layers.

  Args:
    first: a layer, `(x, rotation, linear) -> x`, where `linear(role, kernel, x)`
      applies a kernel.
    layers: the others, their arrays stacked.
    beta: of `scales`.
    x: the residual stream (B, T, D).
    rotation: of the attention.
    config: for `remat`.

  Returns:
    (B, T, D).
  """
  graphdef, states = nnx.split(layers)

  def step(carry, layer):
    (x, below), (state, beta) = carry, layer
    scale = jax.tree.map(away_from_zero, beta)
    return run_layer(nnx.merge(graphdef, state), x, below, scale, rotation), None

  step = rematerialize(step, config.remat, scanned=True)
  run = lambda carry, stack: jax.lax.scan(step, carry, stack)
  start = lambda x, stack: run(run_layer(first, x, {}, {}, rotation), stack)[0]
  count = config.num_layers - 1
  head = count % SEGMENT if config.remat else count
  stack = states, {role: b[...] for role, b in beta.items()}
  begin = jax.tree.map(lambda a: a[:head], stack)
  carry = rematerialize(start, config.remat, scanned=False)(shard_batch(x), begin)
  if head < count:
    # A scan, so that no segment is computed again before its turn.
    run = rematerialize(run, config.remat, scanned=True)
    segments = lambda a: a[head:].reshape(-1, SEGMENT, *a.shape[1:])
    carry, _ = jax.lax.scan(run, carry, jax.tree.map(segments, stack))
  return carry[0]


def run_layer(layer, x, below, scale, rotation):
  """The residual stream after one layer, and its linear outputs by role.

  Args:
    layer: see `run_layers`.
    x: the residual stream (B, T, D).
    below: the outputs of the layer below by role; empty for the first layer.
    scale: what they are multiplied with, by role.
    rotation: of the attention.
  """
  outputs = {}

  def linear(role, kernel, x):
    y = kernel(x)
    if below:
      y = (y + scale[role] * below[role]).astype(y.dtype)
    outputs[role] = y
    return y

  x = shard_batch(layer(x, rotation, linear))
  return x, outputs


def away_from_zero(beta: jax.Array) -> jax.Array:
  """sign(beta) (|beta| + 1e-6), with derivative 1 everywhere."""
  return beta + jnp.where(beta < 0, -1e-6, 1e-6)
