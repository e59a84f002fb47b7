"""Sparse update: the gradient of what is chosen, nothing of the rest, and fewer multiply-adds for it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax import budget, sparse
from cl_jax.compose import chain
from cl_jax.errors import UserError
from cl_jax.learner import learner
from cl_jax.masks import nest, paths
from cl_jax.methods.isolation.hat import hat
from cl_jax.methods.regularisation.ewc import ewc
from cl_jax.methods.replay.er import er
from cl_jax.models.cnn import cnn
from cl_jax.models.mlp import mlp
from cl_jax.models.quantised import quantise_tree
from cl_jax.models.vit import Config, vit
from cl_jax.types import Batch, no_tap

TX = optax.adam(1e-2)
MLP, CNN = mlp((8, 6), 4, bias=0.1), cnn((4, 6), (8,), 4)
VIT = vit(Config(8, 4, 1, 8, 4, 2, 12), 4, init=0.4)
MODELS = {'mlp': MLP, 'cnn': CNN, 'vit': VIT}
SLICES = {
  'mlp': (('l0/.*', 'in 0.25'), ('l1/.*', 'out 0.5'), ('head/.*', 'all')),
  'cnn': (('c0/.*', 'out 0.5'), ('c1/.*', 'in 0.5'), ('l0/.*', 'out 0.25'), ('head/.*', 'bias')),
  'vit': (
    ('backbone/layers/(up|down)/.*', 'out 0.25'),
    ('backbone/layers/(q|v)/.*', 'in 0.5'),
    ('backbone/layers/o/.*', 'last 2'),
    ('backbone/.*', 'none'),
    ('head/.*', 'all'),
  ),
}


def batch(seed: int = 0, rows: int = 6) -> Batch:
  x = jax.random.normal(jax.random.key(seed), (rows, 8, 8, 1))
  return Batch(x, jnp.arange(rows) % 4, jnp.ones(rows), jnp.full(rows, -1))


def begun(model, rules, orders=None):
  """(sparse model, its parameters, those of the plain one)."""
  made = sparse.sparse(model, rules, orders)
  key = jax.random.key(1)
  return made, made.init(key, batch())[0], model.init(key, batch())[0]


def by_size(model, rules):
  plain = model.init(jax.random.key(1), batch())[0]
  return sparse.order(jax.tree.map(jnp.square, plain), rules)


def gradient(model, params, frozen=None):
  """Of the mean loss, with respect to what is not frozen."""
  held = {} if frozen is None else paths(frozen)
  own = nest({p: a for p, a in paths(params).items() if p not in held})

  def loss(own):
    full = nest({**held, **paths(own)})
    return model.loss(model.apply(full, batch(), no_tap, True), batch()).mean()

  return jax.grad(loss)(own)


@pytest.mark.parametrize('chosen', ['first', 'magnitude'])
@pytest.mark.parametrize('name', MODELS)
def test_outputs_and_gradients_are_those_of_the_plain_network(name, chosen):
  model, rules = MODELS[name], SLICES[name]
  orders = by_size(model, rules) if chosen == 'magnitude' else None
  made, params, plain = begun(model, rules, orders)
  np.testing.assert_allclose(
    made.apply(params, batch(), no_tap, True).logits,
    model.apply(plain, batch(), no_tap, True).logits, rtol=1e-5, atol=1e-5,
  )  # fmt: skip
  jax.tree.map(np.testing.assert_array_equal, sparse.whole(params, orders), plain)
  # The gradients of own and rest, put together, are the plain network's.
  got = sparse.whole(gradient(made, params), orders)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, gradient(model, plain)
  )
  own = gradient(made, params, sparse.frozen(params, rules))
  jax.tree.map(np.testing.assert_allclose, own, nest({p: paths(gradient(made, params))[p] for p in paths(own)}))


def test_everything_chosen_is_the_dense_step_bit_for_bit():
  rules = (('l0/.*', 'in 1'), ('l1/.*', 'out 1.0'), ('.*', 'all'))
  made, params, _ = begun(MLP, rules)
  assert sparse.frozen(params, rules) == {}
  method = chain(er=er(capacity=8, draw=4), ewc=ewc(3.0))
  one, two = (learner(m, TX, method) for m in (MLP, made))
  a, b = (L.init(jax.random.key(0), batch()) for L in (one, two))
  for i in range(3):
    (a, _), (b, _) = one.step(a, batch(i)), two.step(b, batch(i))
  same = lambda x, y: np.testing.assert_array_equal(x, y)  # noqa: E731
  jax.tree.map(same, (a.params, a.opt), (b.params, b.opt))


@pytest.mark.parametrize('chosen', ['first', 'magnitude'])
@pytest.mark.parametrize('name', ['mlp', 'vit'])
def test_only_what_is_chosen_moves_and_state_has_its_size(name, chosen):
  model, rules = MODELS[name], SLICES[name]
  orders = by_size(model, rules) if chosen == 'magnitude' else None
  made, params, plain = begun(model, rules, orders)
  L = learner(made, TX, chain(er=er(capacity=8, draw=4), ewc=ewc(3.0)), sparse.frozen(params, rules))
  state = L.init(jax.random.key(0), batch())
  first = state.params
  for i in range(3):
    state, _ = L.step(state, batch(i))
    if i == 1:
      state = L.boundary(state, jax.tree.map(lambda a: a[None], batch()))
  new = sparse.whole({**nest({**paths(sparse.frozen(params, rules)), **paths(state.params)})}, orders)
  old = sparse.whole({**nest({**paths(sparse.frozen(params, rules)), **paths(first)})}, orders)
  of = sparse.parts(plain, rules)
  for path, a in paths(old).items():
    moved = np.asarray(paths(new)[path] != a)
    kind, count = of[path]
    if kind in ('all', 'none'):
      assert moved.any() == (kind == 'all'), path
      continue
    axis = {'out': -1, 'in': -2, 'last': 0}[kind]
    lines = np.moveaxis(moved, axis, 0).reshape(moved.shape[axis], -1).any(1)
    if kind == 'last':
      assert not lines[:-count].any() and lines[-count:].all()
    elif orders is None:
      assert not lines[count:].any() and lines[:count].any(), path
    elif orders[path].ndim == 1:
      assert not lines[np.setdiff1d(np.arange(len(lines)), orders[path][:count])].any(), path
  sizes = budget.state_bytes(state)
  assert sizes['optimiser'] == 2 * sizes['trainable'] + 4  # Adam's two moments and its count
  assert sizes['method/ewc'] == 2 * sizes['trainable'] + 4


def macs(model, rules, rows: int = 6) -> dict[str, int]:
  made, params, _ = begun(budget.scoped(model), rules)
  L = learner(made, TX, frozen=sparse.frozen(params, rules))
  state = jax.eval_shape(L.init, jax.random.key(0), batch())
  return budget.macs(L.step, state, batch())


def test_multiply_adds_by_hand():
  """64-8-6-4 on 6 rows: a slice's gradient is its share; nothing is passed below the lowest that is trained."""
  n, l0, l1, head = 6, 64 * 8, 8 * 6, 6 * 4
  dense = macs(MLP, (('.*', 'all'),))
  assert dense['backward'] == n * (l0 + 2 * l1 + 2 * head)
  assert dense['forward'] == n * (l0 + l1 + head)
  for rules, backward in {
    (('l0/.*', 'in 0.25'), ('.*', 'all')): n * (l0 // 4 + 2 * l1 + 2 * head),
    (('l0/w', 'out 0.5'), ('.*', 'all')): n * (l0 // 2 + 2 * l1 + 2 * head),
    (('l0/.*', 'none'), ('l1/.*', 'out 0.5'), ('head/.*', 'all')): n * (l1 // 2 + 2 * head),
    (('.*', 'bias'),): n * (l1 + head),
    (('l.*', 'none'), ('head/.*', 'all')): n * head,
  }.items():
    got = macs(MLP, rules)
    assert got['backward'] == backward, rules
    assert got['forward'] == dense['forward'] and got['other'] == 0


@pytest.mark.parametrize('name', MODELS)
def test_a_share_of_the_channels_costs_strictly_less(name):
  sparse_, dense = macs(MODELS[name], SLICES[name]), macs(MODELS[name], (('.*', 'all'),))
  assert sparse_['forward'] == dense['forward'] and sparse_['backward'] < dense['backward']


def test_the_lower_layers_of_a_stack_run_without_a_backward_pass():
  """Backward of 2 of 4 layers is half of that of all, less what the lowest need not pass on."""
  rules = lambda n: (  # noqa: E731
    ('backbone/layers/.*', f'last {n}'), ('backbone/(norm)/.*', 'all'), ('backbone/.*', 'none'), ('.*', 'all')
  )  # fmt: skip
  one, two, all_ = (macs(VIT, rules(n))['backward'] for n in (1, 2, 4))
  assert 0 < one < two < all_ and two - one == pytest.approx((all_ - two) / 2, rel=0.01)

  def peak(n):
    made, params, _ = begun(VIT, rules(n))
    L = learner(made, TX, frozen=sparse.frozen(params, rules(n)))
    big = batch(rows=64)
    return budget.compiled(L.step, jax.eval_shape(L.init, jax.random.key(0), big), big).temporary

  assert peak(1) < 0.6 * peak(4)


def test_the_rest_may_be_stored_in_few_bits():
  rules = SLICES['vit']
  made, params, _ = begun(VIT, rules)
  held = quantise_tree(sparse.frozen(params, rules), 8)
  L = learner(made, TX, frozen=held)
  state = L.init(jax.random.key(1), batch())
  new, loss = L.step(state, batch())
  assert jnp.isfinite(loss)
  exact = learner(made, TX, frozen=sparse.frozen(params, rules))
  want = exact.predict(exact.init(jax.random.key(1), batch()), batch())
  np.testing.assert_allclose(L.predict(state, batch()), want, atol=0.05)


def test_the_order_of_a_choice():
  sizes = {'l0': {'w': jnp.array([[1.0, 5.0, 2.0], [1.0, 0.0, 4.0]]), 'b': jnp.array([9.0, 0.0, 0.0])}}
  chosen = sparse.order(sizes, (('.*', 'out 0.6'),))
  assert chosen['l0/w'].tolist() == [1, 2, 0] and chosen['l0/b'].tolist() == [1, 2, 0]
  chosen = sparse.order(sizes, (('l0/w', 'in 0.5'), ('.*', 'all')))
  assert chosen == {'l0/w': pytest.approx([0, 1])}


def test_gradients_of_the_first_task_by_hand():
  params, stats = MLP.init(jax.random.key(0), batch())
  two = jax.tree.map(lambda *a: jnp.stack(a), batch(1), batch(2))
  got = sparse.squared_gradients(MLP, params, stats, two)

  def loss(p, b):
    return MLP.loss(MLP.apply(p, b), b).mean()

  each = [jax.grad(loss)(params, batch(i)) for i in (1, 2)]
  want = jax.tree.map(lambda a, b: a**2 + b**2, *each)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-9), got, want)


@pytest.mark.parametrize(
  'rules, message',
  [
    ((('.*', 'half'),), "update 'half' for l0/b"),
    ((('.*', 'out 0'),), "use 'all'"),
    ((('.*', 'in 1.5'),), "use 'all'"),
    ((('.*', 'last 70'),), 'has'),
    ((('l0/.*', 'all'),), 'no pattern covers'),
    ((('l9/.*', 'all'), ('.*', 'none')), "'l9/.*' matches no parameter"),
  ],
)
def test_mistakes_are_named(rules, message):
  with pytest.raises(UserError, match=message):
    begun(MLP, rules)


def test_methods_that_share_units_out_are_refused():
  made, params, _ = begun(MLP, SLICES['mlp'])
  method = hat(2, 2, wires=made.wires)
  with pytest.raises(UserError, match='hat needs hidden units'):
    learner(made, TX, method, sparse.frozen(params, SLICES['mlp'])).init(jax.random.key(0), batch())
