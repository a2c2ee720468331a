"""Predictions of steps that cannot be run here, and the counting they rest on."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from runner import tiny

from experiments import hlo, predict, program
from experiments.config import Mesh
from experiments.errors import ConfigError
from experiments.hlo import Collective

MESH = jax.make_mesh((2, 4), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
TINY = tiny(mesh=Mesh(data=2, fsdp=2, tensor=2), steps=100)
TINY = dataclasses.replace(
  TINY,
  model=dataclasses.replace(
    TINY.model, hidden_size=32, intermediate_size=64, remat=True
  ),
  data=dataclasses.replace(TINY.data, batch_size=8),
)


def text(f, *args):
  return jax.jit(f).lower(*args).compile().as_text()


def shape(*dims, dtype='float32'):
  return jax.ShapeDtypeStruct(dims, dtype)


def test_collectives_in_a_loop_are_counted_exactly_and_as_often_as_they_run():
  def each(x):
    def body(x, _):
      whole = jax.lax.all_gather(x, 'b', tiled=True)
      part = jax.lax.psum_scatter(whole, 'b', tiled=True)
      return jax.lax.psum(jnp.sin(part), 'a'), None

    return jax.lax.ppermute(jax.lax.scan(body, x, length=5)[0], 'a', [(0, 1), (1, 0)])

  f = jax.shard_map(each, mesh=MESH, in_specs=P('b'), out_specs=P('b'), check_vma=False)
  found = hlo.cost(text(f, shape(8, 6)))
  assert found.collectives == {
    Collective('all-gather', 'f32', 8 * 6 * 4, 4): 5,
    Collective('reduce-scatter', 'f32', 8 * 6 * 4, 4): 5,
    Collective('all-reduce', 'f32', 2 * 6 * 4, 2): 5,
    Collective('collective-permute', 'f32', 2 * 6 * 4, 2): 1,
  }
  assert found.sent == 5 * (2 * 192 * 3 / 4 + 2 * 48 / 2) + 48
  assert not found.endless and not found.uncounted


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_products_in_nested_loops(dtype):
  def f(x, w):
    inner = lambda x, w: (jnp.einsum('bmk,bkn->bmn', x, w), None)
    outer = lambda x, _: (jax.lax.scan(inner, x, w)[0], None)
    return jax.lax.scan(outer, x, length=3)[0]

  args = shape(2, 8, 16, dtype=dtype), shape(5, 2, 16, 16, dtype=dtype)
  assert hlo.cost(text(f, *args)).flops.total() == 3 * 5 * 2 * (2 * 8 * 16 * 16)


def test_a_loop_that_ends_by_its_data_counts_once_and_is_told():
  f = lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)
  found = hlo.cost(text(f, shape(8, 8)))
  assert found.endless == 1
  assert found.flops.total() == 2 * 8**3


def test_either_branch_of_a_conditional():
  f = lambda p, x: jax.lax.cond(p, lambda x: x @ x @ x, lambda x: x + 1, x)
  found = text(f, shape(dtype='bool'), shape(8, 8))
  assert hlo.cost(found, 'cheapest').flops.total() == 0
  assert hlo.cost(found, 'dearest').flops.total() == 2 * 2 * 8**3


def test_bytes_of_operations_and_of_slices():
  x = shape(1024, 256)
  assert hlo.cost(text(lambda x: 2 * x + 1, x)).bytes == 2 * 4 * 1024 * 256
  one = hlo.cost(text(lambda x, i: jax.lax.dynamic_index_in_dim(x, i), x, 3)).bytes
  assert 2 * 4 * 256 <= one < 2 * 4 * 256 + 64


# Lines as the compilers of TPUs and GPUs write them.
TPU = """HloModule jit_f, num_partitions=8
%test (p: (s32[], bf16[4,8,16], s32[])) -> pred[] {
  %p = (s32[]{:T(128)}, bf16[4,8,16]{2,1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=2
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}
%body (q: (s32[], bf16[4,8,16], s32[])) -> (s32[], bf16[4,8,16], s32[]) {
  %q = (s32[]{:T(128)}, bf16[4,8,16]{2,1,0}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %two = s32[] constant(2)
  %k = s32[] add(%j, %two)
  %x = bf16[4,8,16]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%q), index=1
  %m = s32[] get-tuple-element(%q), index=2
  %w = bf16[4,16,16]{2,1,0:S(1)} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}
  %y = bf16[4,8,16]{2,1,0} convolution(%x, %w), WINDOW, dim_labels=0bf_0io->0bf
  ROOT %out = (s32[], bf16[4,8,16], s32[]) tuple(%k, %y, %m)
}
ENTRY %main (x: bf16[4,8,16]) -> bf16[4,8,16] {
  %x = bf16[4,8,16]{2,1,0} parameter(0)
  %zero = s32[] constant(0)
  %end = s32[]{:T(128)} constant(13)
  %start = (s32[], bf16[4,8,16], /*index=2*/s32[]) tuple(%zero, %x, %end)
  %loop = (s32[], bf16[4,8,16], s32[]) while(%start), condition=%test, body=%body
  ROOT %y = bf16[4,8,16]{2,1,0} get-tuple-element(%loop), index=1
}
""".replace('WINDOW', 'window={size=4 stride=3 lhs_dilate=4}')
GPU = """HloModule jit_f, num_partitions=8
ENTRY %main (x: f32[8,16], w: f32[16,32]) -> f32[8,32] {
  %x = f32[8,16]{1,0} parameter(0)
  %w = f32[16,32]{1,0} parameter(1)
  %start = (f32[8,16]{1,0}, f32[64,16]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %done = f32[64,16]{1,0} all-gather-done(%start)
  %gemm = (f32[8,32]{1,0}, s8[99]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]},"precision_config":{"operand_precision":["HIGHEST","HIGHEST"]}}}
  %solve = f32[8,8]{1,0} custom-call(%x), custom_call_target="cusolver_syevd_ffi"
  ROOT %y = f32[8,32]{1,0} get-tuple-element(%gemm), index=0
}
"""  # noqa: E501

PIECES = """HloModule jit_f, num_partitions=8
%slice (a: f32[32,4,8], j: s32[]) -> f32[1,4,8] {
  %a = f32[32,4,8]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,4,8]{2,1,0} dynamic-slice(%a, %j, %zero, %zero)
}
%piece (x: f32[32,4,8], i: s32[], w: bf16[1,8]) -> (f32[1,4,8], bf16[1,8]) {
  %x = f32[32,4,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %w = bf16[1,8]{1,0} parameter(2)
  %y = f32[1,4,8]{2,1,0} fusion(%x, %i), kind=kLoop, calls=%slice
  %all = bf16[8,8]{1,0:S(1)} all-gather(%w), channel_id=3, dimensions={0}
  ROOT %out = (f32[1,4,8], bf16[1,8]) tuple(%y, %w)
}
ENTRY %main (x: f32[32,4,8], i: s32[], w: bf16[1,8]) -> bf16[1,8] {
  %x = f32[32,4,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %w = bf16[1,8]{1,0} parameter(2)
  %first = (f32[1,4,8], bf16[1,8]) fusion(%x, %i, %w), kind=kOutput, calls=%piece
  %v = bf16[1,8]{1,0} get-tuple-element(%first), index=1
  %second = (f32[1,4,8], bf16[1,8]) fusion(%x, %i, %v), kind=kOutput, calls=%piece
  ROOT %u = bf16[1,8]{1,0} get-tuple-element(%second), index=1
}
"""


def test_a_collective_in_pieces_counts_once_and_a_slice_in_a_nested_fusion_by_its_part():
  found = hlo.cost(PIECES)
  assert found.collectives == {Collective('all-gather', 'bf16', 8 * 8 * 2, 8): 1}
  row, index, shard = 4 * 4 * 8, 4, 2 * 8
  assert found.bytes == 2 * (row + index + row) + shard


def test_programs_for_tpus():
  found = hlo.cost(TPU)
  assert found.flops == {'bf16': 7 * 4 * 2 * 8 * 16 * 16}
  assert found.collectives == {
    Collective('all-gather', 'bf16', 4 * 4 * 8 * 16 * 2, 4): 7
  }
  # What is in memory S(1) is on the chip; k = j + 2 is three integers.
  assert found.bytes == 7 * (2 * 4 * 8 * 16 + 3 * 4)
  assert not found.endless


def test_programs_for_gpus():
  found = hlo.cost(GPU)
  assert found.flops == {'highest': 2 * 8 * 16 * 32}
  assert found.collectives == {Collective('all-gather', 'f32', 8 * 8 * 16 * 4, 8): 1}
  assert found.uncounted == {'cusolver_syevd_ffi': 1}


@pytest.fixture(scope='module')
def compiled():
  """The step, compiled for devices that it never runs on."""
  return predict.compile_step(TINY, 'h200:8', 'cpu')


@pytest.fixture(scope='module')
def found(compiled):
  return predict.predict(compiled, predict.DEVICES['h200'])


def model_flops(model, tokens):
  """Products of a step: forward, twice that backward, and what is computed again."""
  d, f = model.hidden_size, model.intermediate_size
  layer = 4 * d * d + 3 * d * f + 2 * 16 * d  # attention without its causal half
  again = layer - d * f  # nothing depends on the last product of a layer
  return (
    2 * tokens * (model.num_layers * (3 * layer + again) + 3 * model.vocab_size * d)
  )


def galore_flops(model, rank=4):
  """R = P^T G and U = P N of all matrices."""
  d, f = model.hidden_size, model.intermediate_size
  return model.num_layers * 4 * rank * (4 * d * d + 3 * d * f)


def test_flops_of_a_step_are_those_of_the_closed_form(found):
  tokens = TINY.data.batch_size * TINY.data.seq_len
  # Each of the two copies along `data` updates all of its state.
  closed = model_flops(TINY.model, tokens) / 8 + galore_flops(TINY.model) / 4
  assert found[0].cost.flops.total() == pytest.approx(closed, rel=0.002)


def test_arguments_are_the_state_divided(found):
  axes = ('data', 'fsdp', 'tensor')
  mesh = jax.make_mesh((2, 2, 2), axes, axis_types=(AxisType.Auto,) * 3)
  state = program.build(TINY, mesh).state
  local = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  tokens = (8 // 4) * 17 * 4
  assert found[0].arguments == sum(map(local, jax.tree.leaves(state))) + tokens


def test_a_table_has_a_row_for_each_kind_of_step(found):
  assert [p.step for p in found] == ['steady', 'refresh']
  steady, refresh = found
  assert refresh.cost.flops.total() > steady.cost.flops.total()
  assert steady.peak >= steady.arguments
  assert steady.overlapped <= steady.serial <= steady.overlapped + steady.network
  head, line, *rows = predict.table('tiny', found, predict.DEVICES['h200']).splitlines()
  assert {row.count('|') for row in (head, line, *rows)} == {12}
  assert [row.split('|')[2].strip(' *') for row in rows] == ['steady', 'refresh']
  assert 'all-reduce f32' in predict.collectives(steady.cost)


@pytest.mark.parametrize('name', ['v5e', 'v5e:16', 'v5e:0x4', 'h200:9', 'tpu:8', ''])
def test_unknown_topologies_are_refused_with_what_is_known(name):
  with pytest.raises(ConfigError, match=r'v5e:<rows>x<columns>.*h200:<1 to 8>'):
    predict.parse_topology(name)


def test_a_mesh_must_match_the_topology(capsys):
  with pytest.raises(ConfigError, match='= 8, but h200:4 has 4 devices'):
    predict.compile_step(TINY, 'h200:4', 'cpu')
  with pytest.raises(ConfigError, match='v5e:16x16 needs 256 simulated'):
    predict.compile_step(TINY, 'v5e:16x16', 'cpu')
  assert predict.main(['--topology', 'v5p:2x2']) == 2
  assert "'v5p:2x2'; write" in capsys.readouterr().err


def test_the_command_prints_the_table(monkeypatch, capsys, compiled):
  monkeypatch.setattr(predict, 'compile_step', lambda *asked: compiled)
  words = ['--preset', 'smoke', '--topology', 'h200:8', '--compiler', 'cpu']
  assert predict.main(words) == 0
  out = capsys.readouterr().out
  assert '| smoke, galore | steady |' in out
  assert 'refresh lacks: 0 loops of unknown length' in out
  assert predict.DEVICES['h200'].source in out
