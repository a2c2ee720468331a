"""LLaMA shapes: the config and the sizes that experiments use."""

import dataclasses
import math
import types
import typing
from typing import Literal

Remat = bool | Literal['low_rank']
Dtype = Literal['float32', 'bfloat16', 'float16']


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """The shape and numerics of a LLaMA decoder; every field is JSON-able.

  Attributes:
    vocab_size: number of tokens.
    hidden_size: width of the residual stream.
    intermediate_size: width of the gated feed-forward layer.
    num_layers: number of decoder layers.
    num_heads: number of query heads; divides `hidden_size` into even parts.
    num_kv_heads: number of key and value heads, a divisor of `num_heads`; None: equal.
    max_seq_len: longest sequence accepted.
    rope_theta: base of the rotary frequencies.
    rms_norm_eps: added to the mean square in RMSNorm.
    tie_embeddings: use the embedding as the output head.
    scan_layers: stack the layers' arrays on a leading axis and loop by `lax.scan`.
    remat: recompute each layer in the backward pass instead of keeping activations;
      low_rank: keep the thin activations x a of low-rank kernels and the residual
      stream, which leaves the products with b and attention to recompute (CoLA-M).
    gate_act: what the gate goes through before it multiplies; none: nothing, for
      kernels that have a nonlinearity themselves (CoLA from 350M on).
    cross_layer: add to each linear output its value in the layer below, times a trained
      scalar, the first layer being dense (CR-Net); see `lrjax.models.crnet`.
    mixer: what mixes positions, attention or an S4D block, whose arrays are then at
      `attn/ssm` and `attn/glu`.
    dtype: what the layers compute in; norms, softmax and logits are float32 always.
    param_dtype: what the parameters are stored in.

  Raises:
    TypeError: for a field of another type.
    ValueError: for a value out of range, or sizes that do not divide.

  Examples:
    >>> config = LLAMA_SIZES['60m']
    >>> config.head_dim
    64
    >>> LlamaConfig(**dataclasses.asdict(config)) == config
    True
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int | None = None
  max_seq_len: int = 1024
  rope_theta: float = 10000.0
  rms_norm_eps: float = 1e-6
  tie_embeddings: bool = False
  scan_layers: bool = True
  remat: Remat = False
  gate_act: Literal['silu', 'none'] = 'silu'
  cross_layer: bool = False
  mixer: Literal['attention', 's4d'] = 'attention'
  dtype: Dtype = 'float32'
  param_dtype: Dtype = 'float32'

  def __post_init__(self):
    for field in dataclasses.fields(self):
      _check(field.name, field.type, getattr(self, field.name))
    if self.hidden_size % self.num_heads:
      raise ValueError(
        f'num_heads must divide hidden_size, got {self.num_heads} heads for '
        f'hidden_size {self.hidden_size}'
      )
    if self.head_dim % 2:
      raise ValueError(
        'hidden_size / num_heads must be even for rotary positions, got '
        f'{self.hidden_size} / {self.num_heads} = {self.head_dim}'
      )
    if self.cross_layer and not (self.scan_layers and self.num_layers > 1):
      raise ValueError(
        'cross_layer needs scan_layers and at least two layers, got scan_layers '
        f'{self.scan_layers}, num_layers {self.num_layers}'
      )
    if self.cross_layer and self.mixer != 'attention':
      raise ValueError(
        f'cross_layer is for mixer attention, whose outputs it carries, got {self.mixer}'
      )
    if self.num_heads % self.kv_heads:
      raise ValueError(
        f'num_kv_heads must divide num_heads, got {self.kv_heads} for '
        f'{self.num_heads} heads'
      )

  @property
  def head_dim(self) -> int:
    """Width of one attention head."""
    return self.hidden_size // self.num_heads

  @property
  def kv_heads(self) -> int:
    """Number of key and value heads."""
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


def _check(name, kind, value):
  """Raises unless `value` is a `kind`, a number in range or one of its names."""
  is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
  kinds = typing.get_args(kind) if is_union else (kind,)
  names = [n for k in kinds for n in typing.get_args(k)]
  accepted = [k if isinstance(k, type) else str for k in kinds]
  fits = isinstance(value, (*accepted, *[int] * (float in kinds)))
  if not fits or (isinstance(value, bool) and bool not in kinds):
    told = ' or '.join(k.__name__ for k in accepted)
    got = f'{value!r} ({type(value).__name__})'
    raise TypeError(f'{name} must be of type {told}, got {got}')
  if isinstance(value, str):
    if value not in names:
      either = 'a bool or ' if bool in kinds else ''
      told = f'{either}one of {", ".join(names)}'
      raise ValueError(f'{name} must be {told}, got {value!r}')
  elif value is not None and bool not in kinds and not 0 < value < math.inf:
    raise ValueError(f'{name} must be positive and finite, got {value!r}')


# 60m to 7b are those of the GaLore paper; tiny and smoke read bytes and fit a laptop.
LLAMA_SIZES = {
  'smoke': LlamaConfig(256, 64, 176, 2, 4),
  'tiny': LlamaConfig(256, 128, 352, 4, 4),
  '60m': LlamaConfig(32000, 512, 1376, 8, 8),
  '130m': LlamaConfig(32000, 768, 2048, 12, 12),
  '350m': LlamaConfig(32000, 1024, 2736, 24, 16),
  '1b': LlamaConfig(32000, 2048, 5461, 24, 32),
  '7b': LlamaConfig(32000, 4096, 11008, 32, 32, max_seq_len=2048),
}
