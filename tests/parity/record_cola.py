"""Records the losses and gradients of CoLA's official models that `cola_test.py` reads.

Needs torch, transformers 4.47.1 and a checkout of GitHub's alvin-zyl/CoLA at the commit
below, named by PYTHONPATH; then `python tests/parity/record_cola.py`. The file it writes
is data alone; nothing of that code is needed by the tests.

Provenance: `ColaForCausalLM` of `cola/modeling_cola.py` with both gates, and
`ColaMForCausalLM` of `cola/modeling_colam.py` on the same weights, whose largest distance
from it in loss and gradients is in the meta. Gradients are one array, in the order of
sorted names of weights. No id is 0, whose embedding the official model, taking it for
padding, does not train; the cache is off, because the official recomputation would put
keys and values into it twice.
"""

import re

import numpy as np
from inputs import write

COMMIT = '91ff0d10809181c6ca430a596c18aea3590cbd24'
SIZES = dict(
  vocab_size=16,
  hidden_size=8,
  intermediate_size=12,
  num_hidden_layers=2,
  num_attention_heads=2,
  max_position_embeddings=8,
)
ARGS = dict(rank=3, rms_norm_eps=1e-6, pad_token_id=0, use_cache=False, **SIZES)


def main() -> None:
  from cola import ColaConfig, ColaForCausalLM, ColaMForCausalLM

  rng = np.random.default_rng(0)
  tokens = rng.integers(1, SIZES['vocab_size'], (3, 7))
  out: dict = {'tokens': tokens.astype(np.int32)}
  weights, apart = None, 0.0
  for gate, only_lr_act in (('silu', False), ('none', True)):
    config = ColaConfig(**ARGS, only_lr_act=only_lr_act, attn_implementation='eager')
    model, colam = ColaForCausalLM(config), ColaMForCausalLM(config)
    if weights is None:
      weights = {
        name: ('norm' in name) + 0.4 * rng.standard_normal(tuple(p.shape))
        for name, p in model.named_parameters()
      }
    loss, grads = run(model, weights, tokens, lambda name: name)
    again = run(colam, weights, tokens, of_colam)
    apart = max(apart, *(distance(again[1][n], g) for n, g in grads.items()))
    apart = max(apart, distance(again[0], loss))
    out[f'{gate}/loss'] = np.float32(loss)
    kept = by_our_names(grads)
    out[f'{gate}/grads'] = np.concatenate([kept[n].ravel() for n in sorted(kept)])
  for name, w in by_our_names(weights).items():
    out[f'weights/{name}'] = w.astype(np.float32)
  cls = 'cola.modeling_cola.ColaForCausalLM'
  meta = dict(repository='alvin-zyl/CoLA', commit=COMMIT, cls=cls, colam_apart=apart)
  write('cola', out, 'transformers', **meta, **ARGS)


def run(model, weights: dict, tokens, name_of) -> tuple[float, dict]:
  """Loss and gradients by names of `ColaForCausalLM`."""
  import torch

  parameters = dict(model.named_parameters())
  assert {name_of(n) for n in weights} == {*parameters}
  with torch.no_grad():
    for name, w in weights.items():
      parameters[name_of(name)].copy_(torch.tensor(w))
  ids = torch.tensor(tokens)
  loss = model.train()(ids, labels=ids).loss
  loss.backward()
  return loss.item(), {n: parameters[name_of(n)].grad.numpy() for n in weights}


def of_colam(name: str) -> str:
  """The name that the split layers of `ColaMForCausalLM` give a parameter."""
  match = re.fullmatch(r'(model\.layers\.)(\d+)\.\w+\.(\w+)_proj\.cola_(\w)', name)
  if not match:
    return name
  layers, i, role, factor = match.groups()
  places = dict.fromkeys('qkv', ('pre_attn', 'self_attn'))
  places |= dict.fromkeys(('gate', 'up'), ('pre_mlp', 'self_mlp'))
  places |= {'o': ('self_attn', 'post_attn'), 'down': ('self_mlp', 'post_mlp')}
  place = places[role]['ab'.index(factor)]
  if place == 'post_mlp' and int(i) + 1 < SIZES['num_hidden_layers']:
    i, place = int(i) + 1, 'last_layer_post_mlp'
  part = {'a': 'pre', 'b': 'post'}[factor]
  return f'{layers}{i}.{place}.{part}_{role}_proj.cola_{factor}'


def by_our_names(arrays: dict) -> dict:
  """The same arrays; the head is (in, out) as all factors are."""
  return {ours(n): a.T if n == 'lm_head.weight' else a for n, a in arrays.items()}


def ours(name: str) -> str:
  """`layers/0/attn/q/kernel/a` for `model.layers.0.self_attn.q_proj.cola_a`."""
  name = name.removeprefix('model.').replace('_proj.cola_', '.kernel.')
  name = name.replace('input_layernorm', 'attn_norm')
  name = name.replace('post_attention_layernorm', 'mlp_norm')
  name = name.replace('self_attn', 'attn').replace('norm.weight', 'norm.scale')
  name = name.replace('embed_tokens.weight', 'embed.embedding')
  return name.replace('lm_head.weight', 'lm_head.kernel').replace('.', '/')


def distance(a, b) -> float:
  return float(np.abs(a - b).max())


if __name__ == '__main__':
  main()
