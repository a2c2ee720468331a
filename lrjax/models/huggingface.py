"""Names and config fields of `transformers.LlamaForCausalLM`."""

from collections.abc import Mapping
from typing import Any

from lrjax.models.llama_config import LlamaConfig

_FIELDS = {
  'vocab_size': 'vocab_size',
  'hidden_size': 'hidden_size',
  'intermediate_size': 'intermediate_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'num_kv_heads': 'num_key_value_heads',
  'max_seq_len': 'max_position_embeddings',
  'rms_norm_eps': 'rms_norm_eps',
  'tie_embeddings': 'tie_word_embeddings',
}
# What our Llama is and has no switch for.
_CONSTANTS = {
  'model_type': 'llama',
  'hidden_act': 'silu',
  'attention_bias': False,
  'mlp_bias': False,
  'rope_scaling': None,
}
_MODULES = {
  'embed': 'model.embed_tokens',
  'norm': 'model.norm',
  'lm_head': 'lm_head',
  'attn': 'self_attn',
  'mlp': 'mlp',
  'attn_norm': 'input_layernorm',
  'mlp_norm': 'post_attention_layernorm',
}


def hf_name(path: str) -> str:
  """The tensor name of a leaf of the unstacked tree.

  Examples:
    >>> hf_name('layers/3/attn/q/kernel')
    'model.layers.3.self_attn.q_proj.weight'
    >>> hf_name('embed/embedding')
    'model.embed_tokens.weight'
  """
  match path.split('/')[:-1]:
    case ['layers', index, module, *role]:
      role = ''.join(f'.{r}_proj' for r in role)
      return f'model.layers.{index}.{_MODULES[module]}{role}.weight'
    case [module]:
      return f'{_MODULES[module]}.weight'
  raise ValueError(f'{path} is not a parameter of an unstacked Llama')


def to_hf(config: LlamaConfig) -> dict[str, Any]:
  """The content of config.json, as transformers 4 and 5 read it.

  Raises:
    ValueError: for a config that is no LLaMA in the strict sense.
  """
  strict = {'gate_act': 'silu', 'cross_layer': False, 'mixer': 'attention'}
  for name, value in strict.items():
    if getattr(config, name) != value:
      raise ValueError(
        f'transformers has no such Llama: {name} must be {value!r}, got '
        f'{getattr(config, name)!r}'
      )
  rope = {'rope_type': 'default', 'rope_theta': config.rope_theta}
  return {
    'architectures': ['LlamaForCausalLM'],
    **_CONSTANTS,
    **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
    'num_key_value_heads': config.kv_heads,
    'head_dim': config.head_dim,
    'rope_theta': config.rope_theta,
    'rope_parameters': rope,
    'torch_dtype': config.param_dtype,
  }


def from_hf(values: Mapping[str, Any]) -> LlamaConfig:
  """The config that a config.json describes.

  Args:
    values: its content; `torch_dtype` (or `dtype`) becomes `param_dtype`.

  Returns:
    A LlamaConfig that scans its layers and computes in float32.

  Raises:
    ValueError: for something our Llama does not do, naming the field.
    TypeError: for a field that is missing or of another type.
  """
  rope = values.get('rope_parameters') or {}
  if not isinstance(rope, Mapping):
    raise TypeError(f'rope_parameters must be an object, got {rope!r}')
  allowed = _CONSTANTS | {'rope_type': 'default'}
  given = {**values, **rope}
  for name, value in allowed.items():
    if given.get(name, value) != value:
      raise ValueError(f'{name} must be {value!r}, got {given[name]!r}')
  fields = {
    ours: values[theirs] for ours, theirs in _FIELDS.items() if theirs in values
  }
  config = LlamaConfig(
    **fields,
    rope_theta=given.get('rope_theta', 10000.0),
    param_dtype=values.get('dtype') or values.get('torch_dtype') or 'float32',
  )
  if values.get('head_dim') not in (None, config.head_dim):
    raise ValueError(
      f'head_dim must be hidden_size / num_attention_heads = {config.head_dim}, got '
      f'{values["head_dim"]!r}'
    )
  return config
