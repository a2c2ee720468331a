"""SLTrain against recorded runs of its official layer."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.inputs import SMALL, read

import lrjax

META, RECORDED = read('sltrain')


def convert(arrays, order):
  """Official arrays, (out, in), as ours."""
  turn = lambda x: x.T
  ours = dict(a=turn, b=turn, values=lambda x: x[order], theta=lambda x: x[0])
  return {n: jnp.asarray(ours[n](x)) for n, x in arrays.items()}


def load(name):
  """The recording of one shape, the start as ours, and the gradients there."""
  shape = SMALL[name]
  under = lambda tree, part: {
    n.removeprefix(part): x for n, x in tree.items() if n.startswith(part)
  }
  recorded = under(RECORDED, f'{name}/')
  o, i = np.divmod(recorded['index'], shape[0])
  order = np.argsort(i * shape[1] + o)
  index = jnp.asarray((i * shape[1] + o)[order], jnp.int32)
  start = convert(under(recorded, 'start/'), order)
  gradients = under(recorded, 'gradient/')
  dx = gradients.pop('x')
  return recorded, lrjax.Split(start, {'index': index}), (convert(gradients, order), dx)


@pytest.mark.parametrize('name', META['learned'])
def test_equals_the_official_layer(name):
  recorded, split, want = load(name)
  x, target = recorded['x'], recorded['target']
  p = lrjax.sltrain(
    META['rank'],
    META['sp_ratio'],
    alpha=None if META['learned'][name] else META['lora_alpha'],
    restart_every=META['restart'],
  )
  tx, plan = lrjax.adam(b2=META['b2']), {'q': p}

  def loss(train, x):
    y = p.apply(split._replace(train=train), x)
    return jnp.mean((y - target) ** 2), y

  @jax.jit
  def step(weights):
    train = weights.params['q']['kernel']
    grads, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(train, x)
    u, opt = tx.update({'q': {'kernel': grads[0]}}, weights.opt_state)
    params = jax.tree.map(lambda w, u: w - META['lr'] * u, weights.params, u)
    return lrjax.Weights(params, weights.fixed, opt), y, grads

  params, fixed = {'q': {'kernel': split.train}}, {'q': {'fixed': dict(split.fixed)}}
  weights = lrjax.Weights(params, fixed, tx.init(params))
  outputs = []
  for k in range(META['steps'] + 1):
    weights, _ = lrjax.run_events(plan, lrjax.due_events(plan, k), weights, k, tx=tx)
    weights, y, grads = step(weights)
    outputs.append(y)
    if k == 0:
      chex.assert_trees_all_close(grads, want, atol=1e-7)
  np.testing.assert_allclose(outputs[0], recorded['y'], atol=2e-7)
  # Outputs are of size 1, and 12 updates of 0.01 move each weight; a restart is among them.
  np.testing.assert_allclose(np.stack(outputs[1:]), recorded['path'], atol=1e-6)
