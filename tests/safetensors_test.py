"""Weights in the layout of transformers: both ways, strict, against the original."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lrjax.models import Llama, LlamaConfig
from lrjax.models.huggingface import from_hf, to_hf
from lrjax.models.safetensors import (
  CONFIG,
  INDEX,
  SUMS,
  WEIGHTS,
  export_safetensors,
  import_safetensors,
  read_config,
)
from lrjax.modules.nnx import split

st = pytest.importorskip('safetensors.numpy')

SETTINGS = LlamaConfig(
  24,
  16,
  20,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  max_seq_len=12,
  rope_theta=500.0,
)


def numbers(config=SETTINGS):
  """Parameters of a config from numpy, large enough that every one matters."""
  abstract = split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))[1]
  rng = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(rng.normal(1, 0.3, x.shape), x.dtype)
  return jax.tree.map(draw, abstract)


def assert_same_bits(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)
  dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
  assert dtypes(a) == dtypes(b)


@pytest.fixture
def exported(tmp_path):
  export_safetensors(numbers(), SETTINGS, tmp_path)
  return tmp_path


def rewrite(directory, change):
  """Changes the tensors of an export and drops its digests, as a stranger would."""
  tensors = st.load_file(directory / WEIGHTS)
  change(tensors)
  st.save_file(tensors, directory / WEIGHTS)
  (directory / SUMS).unlink()


@pytest.mark.parametrize('scan', [True, False])
@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_round_trip(tmp_path, scan, tied, dtype):
  config = dataclasses.replace(
    SETTINGS, scan_layers=scan, tie_embeddings=tied, param_dtype=dtype
  )
  params = numbers(config)
  export_safetensors(params, config, tmp_path / 'new' / 'folder')
  assert_same_bits(import_safetensors(tmp_path / 'new' / 'folder', config), params)


def test_layout(exported):
  params, tensors = numbers(), st.load_file(exported / WEIGHTS)
  assert len(tensors) == 3 + 9 * 2
  q = params['layers']['attn']['q']['kernel']
  np.testing.assert_array_equal(
    tensors['model.layers.1.self_attn.q_proj.weight'], q[1].T
  )
  assert tensors['model.layers.0.mlp.down_proj.weight'].shape == (16, 20)
  assert tensors['model.embed_tokens.weight'].shape == (24, 16)
  assert sorted(os.listdir(exported)) == sorted([WEIGHTS, CONFIG, SUMS])
  modes = {os.stat(exported / file).st_mode for file in os.listdir(exported)}
  assert len(modes) == 1  # what the umask gives, for the weights too


def test_a_scanned_export_loads_into_a_loop_and_updates_a_model(exported):
  loop = dataclasses.replace(SETTINGS, scan_layers=False)
  model = Llama(loop, rngs=nnx.Rngs(0))
  nnx.update(model, import_safetensors(exported, loop))
  row = model.layers[1].mlp.up.kernel[...]
  np.testing.assert_array_equal(row, numbers()['layers']['mlp']['up']['kernel'][1])


def test_stored_config_is_the_config(exported):
  assert read_config(exported) == SETTINGS
  assert from_hf(to_hf(SETTINGS)) == SETTINGS


def test_an_index_names_several_files(exported):
  tensors = st.load_file(exported / WEIGHTS)
  names = sorted(tensors)
  files = {n: f'model-{1 + i % 2}-of-2.safetensors' for i, n in enumerate(names)}
  for file in set(files.values()):
    st.save_file({n: tensors[n] for n in names if files[n] == file}, exported / file)
  (exported / WEIGHTS).unlink()
  (exported / SUMS).unlink()
  index = exported / INDEX
  index.write_text(json.dumps({'metadata': {}, 'weight_map': files}))
  assert_same_bits(import_safetensors(exported, SETTINGS), numbers())

  for bad in (
    '../model.safetensors',
    '/etc/x.safetensors',
    'a\0.safetensors',
    'x.bin',
    3,
  ):
    index.write_text(json.dumps({'weight_map': files | {names[0]: bad}}))
    with pytest.raises(ValueError, match='is not the name of a file beside it'):
      import_safetensors(exported, SETTINGS)
  index.write_text(json.dumps({'weight_map': files | {names[0]: 'gone.safetensors'}}))
  with pytest.raises(FileNotFoundError, match=r'gone\.safetensors'):
    import_safetensors(exported, SETTINGS)
  index.write_text('{}')
  with pytest.raises(ValueError, match='has no weight_map'):
    import_safetensors(exported, SETTINGS)
  st.save_file(tensors, exported / 'model-1-of-2.safetensors')
  index.write_text(json.dumps({'weight_map': files}))
  with pytest.raises(ValueError, match='is in another file too'):
    import_safetensors(exported, SETTINGS)


# What is refused on import.


def rename(old, new):
  return lambda tensors: tensors.update({new: tensors.pop(old)})


def retype(name, dtype):
  return lambda tensors: tensors.update({name: tensors[name].astype(dtype)})


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda t: t.pop('lm_head.weight'), "missing 'lm_head.weight'; unexpected none"),
    (rename('lm_head.weight', 'head'), "missing 'lm_head.weight'; unexpected 'head'"),
    (rename('lm_head.weight', '../x'), r"unexpected '\.\./x'"),
    (rename('lm_head.weight', 'a\0b'), r"unexpected 'a\\x00b'"),
    (
      lambda t: t.update({'model.norm.weight': np.ones(15, 'f')}),
      r'model\.norm\.weight: shape \(15,\), config says \(16,\)',
    ),
    (retype('lm_head.weight', 'float16'), r'lm_head\.weight: dtype float16, .*float32'),
    (retype('lm_head.weight', 'int32'), r'lm_head\.weight: dtype I32'),
  ],
)
def test_other_tensors_are_refused_by_name(exported, change, message):
  rewrite(exported, change)
  with pytest.raises(ValueError, match=message):
    import_safetensors(exported, SETTINGS)


def test_missing_files_are_named(exported):
  (exported / CONFIG).unlink()
  with pytest.raises(FileNotFoundError, match=r'config\.json'):
    import_safetensors(exported, SETTINGS)
  (exported / WEIGHTS).unlink()
  with pytest.raises(FileNotFoundError, match=f'neither {WEIGHTS} nor {INDEX}'):
    import_safetensors(exported, SETTINGS)


def test_a_config_of_equal_shapes_but_another_function_is_refused(exported):
  other = dataclasses.replace(SETTINGS, rope_theta=10.0, num_heads=2, num_kv_heads=1)
  with pytest.raises(ValueError, match=r'num_attention_heads: stored 4, given 2.*rope'):
    import_safetensors(exported, other)
  import_safetensors(exported, dataclasses.replace(SETTINGS, max_seq_len=5))


@pytest.mark.parametrize(
  'change, message',
  [
    ({'hidden_act': 'gelu'}, "hidden_act must be 'silu', got 'gelu'"),
    ({'attention_bias': True}, 'attention_bias must be False'),
    ({'rope_scaling': {'type': 'linear'}}, 'rope_scaling must be None'),
    ({'rope_parameters': {'rope_type': 'yarn'}}, "rope_type must be 'default'"),
    ({'rope_parameters': [1]}, 'rope_parameters must be an object'),
    ({'head_dim': 8}, 'head_dim must be hidden_size / num_attention_heads = 4, got 8'),
    ({'hidden_size': 'wide'}, "hidden_size must be of type int, got 'wide'"),
    ({'dtype': 'float8'}, 'param_dtype must be one of'),
  ],
)
def test_configs_our_llama_cannot_be_are_refused(tmp_path, change, message):
  (tmp_path / CONFIG).write_text(json.dumps(to_hf(SETTINGS) | change))
  with pytest.raises(ValueError, match=message):
    read_config(tmp_path)


@pytest.mark.parametrize(
  'content', [b'{', b'[]', b'\xff', b'[' * 10**6, b'{}', b' ' * (2**24 + 1)]
)
def test_a_config_that_is_no_config_is_refused(tmp_path, content):
  (tmp_path / CONFIG).write_bytes(content)
  with pytest.raises(ValueError, match='json'):
    read_config(tmp_path)


@pytest.mark.parametrize('file', [WEIGHTS, CONFIG, SUMS])
def test_flips_and_cuts_are_noticed(exported, file):
  path, rng = exported / file, np.random.default_rng(0)
  whole = path.read_bytes()
  for trial in range(20):
    at = int(rng.integers(len(whole)))
    damaged = bytearray(whole)
    damaged[at] ^= 1 << int(rng.integers(8))
    path.write_bytes(damaged if trial % 2 else whole[:at])
    with pytest.raises(ValueError, match=rf'SHA256SUMS|{file}'):
      import_safetensors(exported, SETTINGS)


def test_without_digests_a_damaged_header_is_still_a_named_error(exported):
  (exported / SUMS).unlink()
  path, rng = exported / WEIGHTS, np.random.default_rng(0)
  whole = path.read_bytes()
  for at in rng.integers(8, 1000, 20):
    damaged = bytearray(whole)
    damaged[at] = 0x80
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r'model\.safetensors is damaged'):
      import_safetensors(exported, SETTINGS)


# What is refused on export.


def test_only_the_configs_parameters_are_exported(tmp_path):
  factored = numbers()
  q = factored['layers']['attn']['q']
  q['kernel'] = {'a': jnp.ones((2, 16, 1)), 'b': jnp.ones((2, 1, 16))}
  with pytest.raises(ValueError, match="unexpected 'layers/attn/q/kernel/a'"):
    export_safetensors(factored, SETTINGS, tmp_path)
  wide = numbers()
  wide['norm']['scale'] = jnp.ones(17)
  with pytest.raises(
    ValueError, match=r'norm/scale: shape \(17,\), config says \(16,\)'
  ):
    export_safetensors(wide, SETTINGS, tmp_path)
  half = jax.tree.map(lambda a: a.astype(jnp.float16), numbers())
  with pytest.raises(ValueError, match=r'dtype float16, config\.param_dtype is'):
    export_safetensors(half, SETTINGS, tmp_path)
  assert not os.listdir(tmp_path)


def test_a_failed_export_leaves_the_one_before(exported, monkeypatch):
  def fail(tensors, path, metadata):
    path.write_bytes(b'half')
    raise OSError('No space left on device')

  monkeypatch.setattr(st, 'save_file', fail)
  with pytest.raises(OSError, match='No space left'):
    export_safetensors(numbers(), SETTINGS, exported)
  assert sorted(os.listdir(exported)) == sorted([WEIGHTS, CONFIG, SUMS])
  assert_same_bits(import_safetensors(exported, SETTINGS), numbers())


def test_a_symlink_is_replaced_and_its_target_left_alone(tmp_path):
  target = tmp_path / 'precious'
  target.write_text('mine')
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / CONFIG).symlink_to(target)
  export_safetensors(numbers(), SETTINGS, tmp_path / 'out')
  assert target.read_text() == 'mine'
  assert not (tmp_path / 'out' / CONFIG).is_symlink()


# Against the original.


@pytest.mark.slow
@pytest.mark.parametrize('kv_heads', [None, 2])
@pytest.mark.parametrize('tied', [False, True])
def test_equals_transformers_both_ways(tmp_path, kv_heads, tied):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  config = dataclasses.replace(
    SETTINGS,
    num_kv_heads=kv_heads,
    tie_embeddings=tied,
    hidden_size=32,
    rms_norm_eps=1e-5,
  )
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 12))
  model = Llama(config, rngs=nnx.Rngs(0))

  def compare(params, theirs):
    nnx.update(model, params)
    with torch.no_grad():
      expected = theirs(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(model(jnp.asarray(tokens)), expected, atol=1e-4)

  params = jax.tree.map(lambda a: a - 1, numbers(config))  # centred on zero
  export_safetensors(params, config, tmp_path / 'ours')
  theirs, report = transformers.LlamaForCausalLM.from_pretrained(
    tmp_path / 'ours', output_loading_info=True, attn_implementation='eager'
  )
  assert not any(report.values())
  assert theirs.dtype == torch.float32
  compare(params, theirs)

  torch.manual_seed(0)
  fresh = transformers.LlamaForCausalLM(theirs.config)
  for p in fresh.parameters():
    torch.nn.init.normal_(p, std=0.3)
  fresh.save_pretrained(tmp_path / 'theirs', max_shard_size='10KB')
  assert (tmp_path / 'theirs' / INDEX).exists()
  stored = dataclasses.replace(config, num_kv_heads=config.kv_heads)
  assert read_config(tmp_path / 'theirs') == stored
  compare(import_safetensors(tmp_path / 'theirs', config), fresh)
