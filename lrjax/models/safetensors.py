"""Llama weights to and from safetensors, in the layout of `transformers`.

A directory holds `config.json`, `model.safetensors` (or the files that
`model.safetensors.index.json` names) and, when we wrote it, `SHA256SUMS`, which
`sha256sum -c` reads too. Nothing is pickled, and no tensor name becomes a path.
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lrjax.models.files import SUMS, check_sums, read_json, replacing, sha256
from lrjax.models.huggingface import from_hf, hf_name, to_hf
from lrjax.models.llama import Llama
from lrjax.models.llama_config import LlamaConfig
from lrjax.models.llama_params import stack_layers, unstack_layers
from lrjax.modules.nnx import split
from lrjax.types import PyTree

WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
CONFIG = 'config.json'
_DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}


def export_safetensors(
  params: PyTree, config: LlamaConfig, directory: str | os.PathLike
) -> None:
  """Writes a directory that `LlamaForCausalLM.from_pretrained` loads.

  Each file is written under another name and moved into place whole. A crash between
  the moves leaves digests that do not match, which `import_safetensors` notices.

  Args:
    params: plain tree of a Llama with dense kernels, stacked or not as `config` says.
    config: the model's config.
    directory: made if need be; the files of an earlier export are replaced.

  Raises:
    ValueError: if the tree is not that of `config`'s Llama, naming the leaves. Kernels
      of other parameterizations have to be materialized first.
  """
  from safetensors.numpy import save_file

  leaves, expected = _leaves(params), _leaves(_abstract(config))
  _check_names(leaves, expected, 'params')
  for path, leaf in leaves.items():
    _check_leaf(path, leaf.shape, str(leaf.dtype), expected[path])
  params = jax.device_get(params)
  if config.scan_layers:
    params = unstack_layers(params)
  # safetensors writes the buffer as it lies, so a transposed view would be scrambled.
  oriented = lambda path, a: np.ascontiguousarray(_transpose(path, a))
  tensors = {hf_name(p): oriented(p, a) for p, a in _leaves(params).items()}

  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  with (
    replacing(directory / SUMS) as sums,
    replacing(directory / CONFIG) as settings,
    replacing(directory / WEIGHTS) as weights,
  ):
    save_file(tensors, weights, metadata={'format': 'pt'})
    settings.write_text(json.dumps(to_hf(config), indent=2) + '\n')
    lines = [(weights, WEIGHTS), (settings, CONFIG)]
    sums.write_text(''.join(f'{sha256(file)}  {name}\n' for file, name in lines))


def import_safetensors(directory: str | os.PathLike, config: LlamaConfig) -> PyTree:
  """Reads the parameters of a Llama, refusing what is not exactly `config`'s.

  Args:
    directory: as `export_safetensors` or `save_pretrained` writes it. Where it has a
      `SHA256SUMS`, every file that is read must match it.
    config: the model's config; `read_config(directory)` is the one stored.

  Returns:
    The plain tree of parameters, stacked or not as `config` says, for
    `nnx.merge(graphdef, params, rest)` or `nnx.update(model, params)`.

  Raises:
    FileNotFoundError: if there are no weights or no config.json.
    ValueError: for a damaged file, a digest or config that differs, and for tensors
      missing, unexpected, or of another shape or dtype, each by name.
  """
  directory = Path(directory)
  files = _weight_files(directory)
  check_sums(directory, [CONFIG, *files])
  _check_config(directory, config)
  abstract = _abstract(dataclasses.replace(config, scan_layers=False))
  names = {path: hf_name(path) for path in _leaves(abstract)}
  with _open(directory, files) as tensors:
    _check_names(tensors, names.values(), directory)
    arrays = [
      _transpose(path, _read(tensors[names[path]], names[path], _transpose(path, leaf)))
      for path, leaf in _leaves(abstract).items()
    ]
  params = jax.tree.structure(abstract).unflatten(arrays)
  return stack_layers(params) if config.scan_layers else params


def read_config(directory: str | os.PathLike) -> LlamaConfig:
  """The config that a directory's config.json describes.

  Args:
    directory: as for `import_safetensors`.

  Returns:
    A LlamaConfig that scans its layers and computes in float32.

  Raises:
    FileNotFoundError: if there is no config.json.
    ValueError: if it is not JSON, or describes what our Llama does not do.
  """
  path = Path(directory) / CONFIG
  values = read_json(path)
  try:
    return from_hf(values)
  except (TypeError, ValueError) as error:
    raise ValueError(f'{path}: {error}') from error


def _abstract(config):
  """The parameter tree of `config`'s Llama as ShapeDtypeStructs."""
  return split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))[1]


def _leaves(tree: PyTree) -> dict[str, Any]:
  """{path: leaf}, in the order of the flattened tree."""
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator='/')
  return {name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _transpose(path, leaf):
  """Between our (in, out) kernels and torch's (out, in); either may be abstract."""
  if not path.endswith('/kernel'):
    return leaf
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(leaf.shape[::-1], leaf.dtype)
  return leaf.T


def _check_names(given: Iterable, expected: Iterable, where):
  given, expected = set(given), set(expected)
  if given == expected:
    return
  listed = lambda names: ', '.join(map(repr, sorted(names)[:20])) or 'none'
  raise ValueError(
    f'{where} does not hold the tensors of this config: missing '
    f'{listed(expected - given)}; unexpected {listed(given - expected)}'
  )


def _check_leaf(name, shape, dtype, expected):
  if tuple(shape) != expected.shape:
    raise ValueError(f'{name}: shape {tuple(shape)}, config says {expected.shape}')
  if dtype != str(expected.dtype):
    raise ValueError(f'{name}: dtype {dtype}, config.param_dtype is {expected.dtype}')


def _check_config(directory, config):
  """Compares what changes the function but not the shapes, such as the head count."""
  stored, given = to_hf(read_config(directory)), to_hf(config)
  ignored = {'max_position_embeddings', 'torch_dtype'}
  differ = [key for key in given if key not in ignored and given[key] != stored[key]]
  if differ:
    lines = '; '.join(f'{k}: stored {stored[k]!r}, given {given[k]!r}' for k in differ)
    raise ValueError(f'{directory / CONFIG} differs from the config given: {lines}')


def _weight_files(directory):
  """Names of the files with weights, inside `directory` whatever the index says."""
  if (directory / WEIGHTS).exists():
    return [WEIGHTS]
  path = directory / INDEX
  if not path.exists():
    raise FileNotFoundError(f'{directory} has neither {WEIGHTS} nor {INDEX}')
  files = read_json(path).get('weight_map')
  if not isinstance(files, Mapping):
    raise ValueError(f'{path} has no weight_map')
  for file in files.values():
    plain = re.fullmatch(r'\w[\w.-]*\.safetensors', str(file), re.ASCII)
    if not plain or '..' in file:
      raise ValueError(f'{path}: {file!r} is not the name of a file beside it')
  return sorted(set(files.values()))


@contextlib.contextmanager
def _open(directory, files) -> Iterator[dict[str, Any]]:
  """{tensor name: open file}; reads headers only."""
  from safetensors import SafetensorError, safe_open

  tensors = {}
  with contextlib.ExitStack() as stack:
    for file in files:
      try:
        opened = stack.enter_context(safe_open(directory / file, 'numpy'))
      except SafetensorError as error:
        raise ValueError(f'{directory / file} is damaged: {error}') from error
      for name in opened.keys():  # noqa: SIM118
        if name in tensors:
          raise ValueError(f'{directory / file}: {name!r} is in another file too')
        tensors[name] = opened
    yield tensors


def _read(file, name, expected):
  entry = file.get_slice(name)
  dtype = _DTYPES.get(entry.get_dtype(), entry.get_dtype())
  _check_leaf(name, entry.get_shape(), dtype, expected)
  return jnp.asarray(file.get_tensor(name))
