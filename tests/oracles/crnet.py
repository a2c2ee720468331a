"""CR-Net in float64 numpy, outputs by their unrolled sum; rotations are complex."""

import numpy as np


def logits(config, params, tokens):
  """(B, T, V) of a cross-layer Llama with factors `a`, `b`."""
  params = _float64(params)
  B, T = tokens.shape
  C, groups = config.head_dim, config.num_heads // config.kv_heads
  frequency = config.rope_theta ** -np.linspace(0, 1, C // 2, endpoint=False)
  turn = np.exp(1j * np.outer(np.arange(T), frequency))
  chains: dict = {role: ([], []) for role in params['cross']}

  def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * scale

  def rope(x):
    z = (x[..., : C // 2] + 1j * x[..., C // 2 :]) * turn[None, :, None]
    return np.concatenate([z.real, z.imag], -1)

  def linear(role, W, x):
    """sum_k (prod_{k < j <= l} beta_j) X_k W_k, of all layers k up to this one."""
    inputs, kernels = chains[role]
    inputs.append(x)
    kernels.append(W)
    beta = np.array([0, *params['cross'][role]])
    beta = np.where(beta < 0, -1, 1) * (np.abs(beta) + 1e-6)
    last = len(inputs)
    weight = lambda k: np.prod(beta[k + 1 : last])
    return sum(weight(k) * (inputs[k] @ kernels[k]) for k in range(last))

  x = params['embed']['embedding'][tokens]
  for i in range(config.num_layers):
    layer = _layer(params, i)
    W = {role: m['kernel'] for role, m in {**layer['attn'], **layer['mlp']}.items()}
    h = norm(x, layer['attn_norm']['scale'])
    q, k, v = (linear(n, W[n], h).reshape(B, T, -1, C) for n in 'qkv')
    q, k = rope(q), np.repeat(rope(k), groups, 2)
    s = np.einsum('bqhc,bkhc->bhqk', q, k) / np.sqrt(C)
    s = np.exp(np.where(np.tri(T), s - s.max(-1, keepdims=True), -np.inf))
    p = s / s.sum(-1, keepdims=True)
    y = np.einsum('bhqk,bkhc->bqhc', p, np.repeat(v, groups, 2))
    x = x + linear('o', W['o'], y.reshape(B, T, -1))
    h = norm(x, layer['mlp_norm']['scale'])
    gate, up = linear('gate', W['gate'], h), linear('up', W['up'], h)
    x = x + linear('down', W['down'], gate / (1 + np.exp(-gate)) * up)
  return norm(x, params['norm']['scale']) @ params['lm_head']['kernel']


def _layer(params, i):
  """Layer i with matrices for kernels."""
  if i == 0:
    return params['first']
  layer = _map(lambda x: x[i - 1], params['layers'])
  for module in (layer['attn'], layer['mlp']):
    for role, m in module.items():
      module[role] = {'kernel': m['kernel']['a'] @ m['kernel']['b']}
  return layer


def _float64(tree):
  return _map(lambda x: np.asarray(x, np.float64), tree)


def _map(f, tree):
  is_dict = isinstance(tree, dict)
  return {k: _map(f, x) for k, x in tree.items()} if is_dict else f(tree)
