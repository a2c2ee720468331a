"""How leaves are chosen and seen as matrices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import gradients, matrix

import lrjax
from lrjax import View, hidden_kernels, views
from lrjax.testing import trajectory

# leaf: shape, View, shape of the stack of matrices it stands for
LEAVES = {
  'experts': ((2, 3, 8, 6), View(), (6, 8, 6)),
  'scan_heads': ((2, 8, 2, 3), View(1, (2, 3)), (2, 8, 6)),
  'heads_in': ((2, 4, 10), View((0, 1), 2), (8, 10)),
  'conv': ((2, 2, 3, 6), View((0, 1, 2), 3), (12, 6)),
}


def plan(tree, rank=2, side='short', where=None, views_of=None):
  planned = views.planner(rank, side, where, views_of)(tree)
  return {p.path: p for p, _ in planned}


def test_every_view_equals_the_reshaped_problem():
  grads = gradients({name: flat for name, (_, _, flat) in LEAVES.items()}, 4)
  shaped = [{n: g[n].reshape(LEAVES[n][0]) for n in g} for g in grads]
  rules = [(f'^{n}$', view) for n, (_, view, _) in LEAVES.items()]
  kw = dict(rank=2, update_proj_gap=3)
  tx = lrjax.scale_by_galore(**kw, weight_dimension_numbers=rules)
  out, _ = trajectory(tx, shaped[0], shaped)
  want, _ = trajectory(lrjax.scale_by_galore(**kw), grads[0], grads)
  for u, w in zip(out, want):
    for name in LEAVES:
      np.testing.assert_allclose(
        u[name], w[name].reshape(u[name].shape), atol=1e-5, err_msg=name
      )


AXES = st.integers(2, 5).flatmap(
  lambda n: st.tuples(
    st.tuples(*[st.sampled_from([1, 2, 3])] * n),
    st.permutations(range(n)),
    st.integers(1, n - 1),
    st.integers(1, n - 1),
    st.sampled_from(['in', 'out']),
  )
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(AXES)
def test_matrix_and_back_is_the_identity(case):
  shape, order, n_in, n_out, side = case
  ins, outs = order[:n_in], order[n_in : n_in + n_out]
  if not outs:
    ins, outs = ins[:-1] or ins, order[-1:]
    ins = [a for a in ins if a not in outs]
  view = View(tuple(a - len(shape) for a in ins), tuple(outs))
  p = views.LeafPlan('x', shape, views.split_axes('x', shape, view), side)
  x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
  m = views.to_matrix(x, p)
  stack = [a for a in range(len(shape)) if a not in (*ins, *outs)]
  first, second = (ins, outs) if side == 'in' else (outs, ins)
  want = x.transpose([*stack, *first, *second]).reshape(m.shape)
  np.testing.assert_array_equal(m, want)
  assert m.shape == (*p.stack, *p.matrix)
  np.testing.assert_array_equal(views.from_matrix(m, p), x)


def test_all_forms_of_dimension_numbers_say_the_same():
  tree = {'q': {'kernel': jnp.ones((6, 2, 4))}, 'b': {'bias': jnp.ones(3)}}
  theirs = optax.contrib.GaLoreDimensionNumbers(0, (1, 2))
  full = {'q': {'kernel': View(0, (1, 2))}, 'b': {'bias': None}}
  forms = [
    View(0, (1, 2)),
    theirs,
    [('q/', View(0, (1, 2)))],
    full,
    {'q': {'kernel': theirs}, 'b': {'bias': None}},
    lambda tree: full,
    View(np.int64(-3), [-2, -1]),
  ]
  for form in forms:
    plans = plan(tree, views_of=form)
    assert plans['q/kernel'].axes == ((), (0,), (1, 2)), form
    assert plans['q/kernel'].matrix == (6, 8)
    assert plans['b/bias'].reason == 'not chosen'
  assert plan(tree, views_of=[('q', None)])['q/kernel'].reason == 'not a matrix'


def test_a_tree_of_views_still_fits_where_optax_masks_a_part():
  params = {'q': matrix((6, 8)), 'k': matrix((8, 6))}
  tx = lrjax.scale_by_galore(
    rank=2, weight_dimension_numbers={'q': View(0, 1), 'k': View(1, 0)}
  )
  masked = optax.masked(tx, {'q': True, 'k': False})
  u, _ = masked.update(params, masked.init(params))
  np.testing.assert_array_equal(u['k'], params['k'])
  assert float(jnp.abs(u['q'] - params['q']).max()) > 0.1


@pytest.mark.parametrize(
  ('shape', 'view', 'message'),
  [
    ((6, 8), View(0, 2), r"leaf 'q/kernel' of shape \(6, 8\): output_axis 2.*-2 to 1"),
    ((6, 8), View(-3, 1), r'reduction_axis -3.*-2 to 1'),
    ((6, 8), View(0, (0, 1)), 'uses an axis twice'),
    ((6, 8), View((), 1), r'reduction_axis \(\)'),
    ((6, 8), View('in', 1), r"leaf 'q/kernel': reduction_axis must hold ints, got"),
    ((6, 8), {'other': View()}, "no entry for leaf 'q/kernel'; it has other"),
    ((6, 8), (0, 1), "no entry for leaf 'q/kernel'"),
    ((6, 8), {'q': {'kernel': 3}}, "leaf 'q/kernel': a View or None is needed, got 3"),
  ],
)
def test_a_view_that_does_not_fit_is_refused(shape, view, message):
  with pytest.raises((ValueError, TypeError), match=message):
    plan({'q': {'kernel': jnp.ones(shape)}}, views_of=view)


def test_sides_and_ranks():
  tree = {
    'attn': jnp.ones((8, 12)),
    'mlp': jnp.ones((12, 8)),
    'square': jnp.ones((8, 8)),
  }
  sides = lambda side: [p.side for p in plan(tree, side=side).values()]
  assert sides('short') == ['in', 'out', 'in']
  assert sides('long') == ['out', 'in', 'in']
  assert sides('in') == ['in'] * 3
  assert sides('out') == ['out'] * 3
  ranks = lambda rank: [p.rank for p in plan(tree, rank=rank).values()]
  assert ranks(0.25) == [2, 2, 2]
  assert ranks(0.01) == [1, 1, 1]
  assert ranks([('attn', 3), ('mlp|sq', 0.5)]) == [3, 4, 4]
  assert ranks([('attn', None), ('.', 3)]) == [None, 3, 3]
  assert plan(tree, rank=[('attn', 3)])['mlp'].reason == 'no rank rule'
  assert plan(tree, rank=np.int32(8))['mlp'].reason == 'not larger than rank 8'


@pytest.mark.parametrize(
  ('rank', 'error', 'message'),
  [
    (0, ValueError, '`rank` must be at least 1, got 0'),
    (-1, ValueError, '`rank` must be at least 1, got -1'),
    (2.0, TypeError, 'got 2.0 of type float'),
    ('8', TypeError, "got '8' of type str"),
    (True, TypeError, 'got True of type bool'),
    (np.bool_(True), TypeError, 'of type bool'),
    (1.5, ValueError, 'between 0 and 1, got 1.5'),
    (float('nan'), ValueError, 'between 0 and 1, got nan'),
    (jnp.int32(2), TypeError, 'not an array.*static_args'),
    ([('q', 0)], ValueError, '`rank` must be at least 1, got 0'),
    ([8, 4], TypeError, r'pairs \(pattern, rank\), got \[8, 4\]'),
    ([('(', 4)], ValueError, r"`rank`: '\(' is not a regular expression"),
  ],
)
def test_bad_ranks_are_refused(rank, error, message):
  with pytest.raises(error, match=message):
    plan({'q': jnp.ones((6, 8))}, rank=rank)


def test_rules_without_a_leaf_and_ranks_too_large_warn():
  tree = {'q': {'kernel': jnp.ones((6, 8))}, 'v': {'kernel': jnp.ones((6, 8))}}
  with pytest.warns(UserWarning, match="`rank` rule 'attn'.*q/kernel, v/kernel"):
    plan(tree, rank=[('attn', 2), ('kernel', 2)])
  with pytest.warns(UserWarning, match="`weight_dimension_numbers` rule 'attn'"):
    plan(tree, views_of=[('attn', None)])
  with pytest.warns(UserWarning, match=r'q/kernel \(6, 8\): rank 7 .*short side 6'):
    assert plan({'q': tree['q']}, rank=7)['q/kernel'].reason == 'not larger than rank 7'


@pytest.mark.parametrize(
  ('leaf', 'error', 'message'),
  [
    (jnp.ones((4, 4), jnp.int32), TypeError, "leaf 'a/kernel' has dtype int32"),
    (jnp.ones((4, 4), jnp.complex64), TypeError, "leaf 'a/kernel'.*complex64.*masked"),
    (jnp.ones((4, 4), jnp.bool_), TypeError, "leaf 'a/kernel' has dtype bool"),
    (jnp.ones((0, 4)), ValueError, r"leaf 'a/kernel' of shape \(0, 4\) holds no"),
    (1.0, TypeError, "leaf 'a/kernel' must be an array, got 1.0"),
  ],
)
def test_leaves_no_optimizer_can_train_are_refused_at_init(leaf, error, message):
  with pytest.raises(error, match=message):
    lrjax.scale_by_galore(rank=2).init({'a': {'kernel': leaf}})


def test_where_by_pattern_and_function():
  tree = {'q': jnp.ones((6, 8)), 'embed': jnp.ones((6, 8)), 'q_bias': jnp.ones(8)}
  chosen = lambda where: {n for n, p in plan(tree, where=where).items() if not p.reason}
  assert chosen(None) == {'q'}
  assert chosen('q|embed') == {'q', 'embed'}
  assert chosen(lambda path, leaf: path == 'embed') == {'embed'}
  with pytest.raises(TypeError, match=r'`where` must be a pattern.*got 3'):
    plan(tree, where=3)
  with pytest.raises(ValueError, match=r'`where`.*regular expression'):
    plan(tree, where='(')


HIDDEN = (
  'kernel w q/kernel layers/attn/q/kernel blocks/0/mlp/up/kernel h/3/attn/c_attn/kernel'
  ' heads_mix/kernel attention/out/kernel scaled/kernel biased/kernel multihead/kernel'
  ' params/encoder/layer_0/self_attention/query/kernel experts/w1 headless/proj/kernel'
  ' lnet/kernel logits_free/kernel downscale/kernel'
)
PLAIN = (
  'embed/embedding tok_embed/kernel token_embedding/weight params/Embed_0/embedding'
  ' pos_embedding wte wpe transformer/wte/embedding lm_head/kernel decoder/lm_head/kernel'
  ' head/kernel Head/kernel logits/kernel norm/scale layers/attn_norm/scale ln_f/scale'
  ' LayerNorm_0/scale layers/RMSNorm_1/scale ln_1/kernel h/0/ln/weight attn/q/bias bn/scale'
)


def test_hidden_kernels_by_name():
  leaf = jnp.ones((4, 4))
  assert [p for p in HIDDEN.split() if not hidden_kernels(p, leaf)] == []
  assert [p for p in PLAIN.split() if hidden_kernels(p, leaf)] == []
  assert not hidden_kernels('q/kernel', jnp.ones(4))


class Block(linen.Module):
  @linen.compact
  def __call__(self, x):
    x = linen.Embed(11, 6)(x)
    x = linen.MultiHeadDotProductAttention(num_heads=2)(linen.LayerNorm()(x))
    return linen.Dense(11, name='lm_head')(linen.Dense(7, name='up')(x))


class Net(nnx.Module):
  def __init__(self, rngs):
    self.tok_embed = nnx.Embed(11, 6, rngs=rngs)
    self.norm = nnx.RMSNorm(6, rngs=rngs)
    self.layers = nnx.List([nnx.Linear(6, 7, rngs=rngs) for _ in range(2)])
    self.lm_head = nnx.Linear(7, 11, rngs=rngs)


def test_hidden_kernels_of_real_modules():
  heads = [('query|key|value', View(0, (1, 2))), ('out/', View((0, 1), 2))]
  projected = lambda plans: {n for n, p in plans.items() if not p.reason}
  linen_tree = jax.eval_shape(Block().init, jax.random.key(0), jnp.ones((1, 3), int))
  attention = 'params/MultiHeadDotProductAttention_0'
  want = {f'{attention}/{n}/kernel' for n in ('query', 'key', 'value', 'out')}
  got = projected(plan(linen_tree, views_of=heads))
  assert got == {'params/up/kernel'} | want
  state = nnx.state(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), nnx.Param)
  raw = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(state)]
  assert all(re.search('value', p) for p in raw), 'nnx no longer ends its paths so'
  assert projected(plan(state)) == {'layers/0/kernel', 'layers/1/kernel'}


def test_dense_general_without_a_view_is_told_and_left_alone():
  tree = {'q': {'kernel': jax.ShapeDtypeStruct((24, 4, 6), jnp.float32)}}
  with pytest.warns(
    UserWarning, match=r'q/kernel \(24, 4, 6\).*weight_dimension_numbers'
  ):
    assert plan(tree)['q/kernel'].reason == 'axes not told'
  told = [('q/kernel', View(0, (1, 2)))]
  assert plan(tree, views_of=told)['q/kernel'].matrix == (24, 24)
  scanned = {'q': {'kernel': jax.ShapeDtypeStruct((4, 6, 24), jnp.float32)}}
  assert plan(scanned)['q/kernel'].stack == (4,)


def test_two_leaves_with_one_path_are_refused():
  leaf = jax.ShapeDtypeStruct((6, 8), jnp.float32)
  with pytest.raises(ValueError, match=r"share a path: \['a/kernel'\]"):
    plan({'a': {'kernel': leaf}, 'a/kernel': leaf})
