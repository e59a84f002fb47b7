"""Sparse update: the gradient of what is chosen, nothing of the rest, and fewer multiply-adds for it."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax import budget, masks, sparse
from cl_jax.compose import chain
from cl_jax.errors import UserError
from cl_jax.learner import learner
from cl_jax.masks import paths
from cl_jax.methods.isolation.hat import hat
from cl_jax.methods.lowrank.ease import ease
from cl_jax.methods.regularisation.ewc import ewc
from cl_jax.methods.replay.er import er
from cl_jax.models.cnn import cnn
from cl_jax.models.mlp import mlp
from cl_jax.models.vit import Config, vit
from cl_jax.types import Batch, no_tap, overlay
from tests.compiling import quick

pytestmark = pytest.mark.usefixtures('quickly')

TX = optax.adam(1e-2)
MLP, CNN = mlp((8, 6), 4, bias=0.1), cnn((4, 6), (8,), 4)
VIT = vit(Config(8, 4, 1, 4, 4, 1, 4), 4, init=0.4)
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


def by_size(model, rules):
  plain = quick(model.init)(jax.random.key(1), batch())[0]
  return sparse.order(jax.tree.map(jnp.square, plain), rules)


CASES = [('mlp', 'first'), ('cnn', 'magnitude'), ('vit', 'magnitude')]


@pytest.mark.parametrize('name, chosen', CASES)
def test_outputs_and_gradients_are_those_of_the_plain_network(name, chosen):
  model, rules = MODELS[name], SLICES[name]
  orders = by_size(model, rules) if chosen == 'magnitude' else {}
  assert bool(orders) == (chosen == 'magnitude')
  made = sparse.sparse(model, rules, orders)

  @jax.jit  # to the bit, so as a user's programs are compiled
  def begun(key):
    return made.init(key, batch())[0], model.init(key, batch())[0]

  @quick
  def both(params, plain):
    held = sparse.frozen(params, rules)
    own = masks.subtract(params, held)
    whole = lambda own, rest: sparse.whole(overlay(rest, own), orders)  # noqa: E731
    take = lambda f: jax.value_and_grad(f, has_aux=True)  # noqa: E731
    got, g = take(lambda p: value(made, overlay(held, p)))(own)
    want, full = take(lambda p: value(model, p))(plain)
    g = whole(g, held)
    chosen = whole(jax.tree.map(jnp.ones_like, own), jax.tree.map(jnp.zeros_like, held))
    return got, want, whole(own, held), plain, g, full, chosen

  got, want, again, plain, g, full, chosen = both(*begun(jax.random.key(1)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
  jax.tree.map(np.testing.assert_array_equal, again, plain)
  for path, mask in paths(chosen).items():
    mask, a, b = np.asarray(mask) > 0, np.asarray(paths(g)[path]), np.asarray(paths(full)[path])
    np.testing.assert_allclose(a[mask], b[mask], rtol=1e-4, atol=1e-5, err_msg=path)
    kind, count = sparse.parts(plain, rules)[path]
    share = {'all': 1.0, 'none': 0.0}.get(kind)
    size = mask.shape[{'out': -1, 'in': -2, 'last': 0}[kind]] if share is None else 1
    assert mask.mean() == pytest.approx(count / size if share is None else share), path


def value(model, params):
  out = model.apply(params, batch(), no_tap, True)
  return model.loss(out, batch()).mean(), out.logits


def test_everything_chosen_is_the_dense_program():
  """The same program text, so the same step bit for bit."""
  rules = (('l0/.*', 'in 1'), ('l1/.*', 'out 1.0'), ('.*', 'all'))
  made = sparse.sparse(MLP, rules)
  params, _ = jax.eval_shape(made.init, jax.random.key(1), batch())
  assert sparse.frozen(params, rules) == {}

  def text(model, held):
    L = learner(model, TX, chain(er=er(capacity=8, draw=4), ewc=ewc(3.0)), held)
    state = jax.eval_shape(L.init, jax.random.key(0), batch())
    return jax.jit(L.step).lower(state, batch()).as_text()

  assert text(made, {}) == text(MLP, None)
  some = sparse.sparse(MLP, SLICES['mlp'])
  assert text(some, {}) != text(MLP, None)


def trained(model, held, steps: int):
  """The state after so many steps and, half-way, a boundary."""
  L = learner(model, TX, chain(er=er(capacity=8, draw=4), ewc=ewc(3.0)), held)
  state = quick(L.init)(jax.random.key(0), batch())
  step, boundary = quick(L.step), quick(L.boundary)
  for i in range(steps):
    state, _ = step(state, batch(i))
    if i == 1:
      state = boundary(state, jax.tree.map(lambda a: a[None], batch()))
  return state


def test_only_what_is_chosen_moves_and_state_has_its_size():
  rules = SLICES['mlp']
  orders = by_size(MLP, rules)
  made = sparse.sparse(MLP, rules, orders)
  params, _ = quick(made.init)(jax.random.key(1), batch())
  held = sparse.frozen(params, rules)
  copy = jax.tree.map(np.array, held)
  first, state = trained(made, held, 0), trained(made, held, 3)
  jax.tree.map(np.testing.assert_array_equal, held, copy)
  old, new = (sparse.whole(overlay(held, s.params), orders) for s in (first, state))
  kinds = sparse.parts(old, rules)
  for path, a in paths(old).items():
    moved, (kind, count) = np.asarray(paths(new)[path] != a), kinds[path]
    if kind == 'all':
      assert moved.any(), path
      continue
    lines = moved.any(-1 if kind == 'in' else 0) if moved.ndim == 2 else moved
    chosen = orders[path][:count]
    assert lines[chosen].any() and not np.delete(lines, chosen).any(), path
  sizes = budget.state_bytes(state)
  assert sizes['optimiser'] == 2 * sizes['trainable'] + 4  # Adam's two moments and its count
  assert (
    sizes['method/ewc'] == 2 * sizes['trainable'] + 4
  )  # the importances, the anchor, a constant
  assert sizes['trainable'] == 4 * (16 * 8 + 8 + 8 * 3 + 3 + 6 * 4 + 4)


def macs(model, rules, rows: int = 6) -> dict[str, int]:
  made = sparse.sparse(budget.scoped(model), rules)
  params, _ = jax.eval_shape(made.init, jax.random.key(0), batch())
  step = lambda held, *args: learner(made, TX, frozen=held).step(*args)  # noqa: E731
  held = sparse.frozen(params, rules)
  state = jax.eval_shape(learner(made, TX, frozen=held).init, jax.random.key(0), batch())
  return budget.macs(step, held, state, batch())


def test_multiply_adds_by_hand():
  """64-8-6-4 on 6 rows: a slice costs its share; nothing is passed below the lowest that is trained."""
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


def test_prompts_and_adapters_see_all_layers_of_a_stack():
  rules = (('backbone/layers/.*', 'last 1'), ('.*', 'all'))
  for model in (VIT, sparse.sparse(VIT, rules)):
    L = learner(model, TX, ease(4, 2, rank=2))
    state = jax.eval_shape(L.init, jax.random.key(0), batch())
    assert state.params['ease']['down']['w'].shape[:2] == (2, 4)
    assert sparse.layers(state.params) == 4
  assert sparse.layers(jax.eval_shape(MLP.init, jax.random.key(0), batch())[0]) == 0


def test_activations_that_no_gradient_needs_are_not_kept():
  """Of the inputs of a layer the chosen channels alone outlive the forward pass, and one bit a unit above."""
  model, rows = mlp((256, 256), 4), 512
  big = batch(rows=rows)

  def kept(rules):
    made = sparse.sparse(model, rules)
    params, _ = jax.eval_shape(made.init, jax.random.key(0), big)
    held = sparse.frozen(params, rules)

    def pullback(own, held):
      loss = lambda p: model.loss(made.apply(overlay(held, p), big), big).mean()  # noqa: E731
      return jax.vjp(loss, own)[1]

    found = jax.eval_shape(pullback, masks.subtract(params, held), held)
    return Counter(
      (a.shape, a.dtype.name) for a in jax.tree.leaves(found) if a.shape[:1] == (rows,)
    )

  full, some = kept((('.*', 'all'),)), kept((('l0/.*', 'none'), ('.*', 'in 0.125')))
  inputs, units = ((rows, 64), 'float32'), ((rows, 256), 'float32')
  assert full[inputs] == 1 and some[inputs] == 0
  # Two layers read 256 units each; what else there is of the shape are constants of the derivative of relu.
  assert full[units] - some[units] >= 2 and some[(rows, 32), 'float32'] == 2


def test_the_order_of_a_choice():
  sizes = {
    'l0': {'w': jnp.array([[1.0, 5.0, 2.0], [1.0, 0.0, 4.0]]), 'b': jnp.array([9.0, 0.0, 0.0])}
  }
  chosen = sparse.order(sizes, (('.*', 'out 0.6'),))
  assert chosen['l0/w'].tolist() == [1, 2, 0] and chosen['l0/b'].tolist() == [1, 2, 0]
  chosen = sparse.order(sizes, (('l0/w', 'in 0.5'), ('.*', 'all')))
  assert chosen == {'l0/w': pytest.approx([0, 1])}
  # A matrix that is no 'w' has channels, and no layers; one below `layers` has both.
  matrix = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 4.0]])
  chosen = sparse.order(
    {'embed': {'tokens': matrix}, 'layers': {'b': matrix}}, (('.*', 'out 0.4'),)
  )
  assert chosen['embed/tokens'].tolist() == [2, 0, 1]
  assert chosen['layers/b'].tolist() == [[0, 1, 2], [2, 0, 1]]


def test_gradients_of_the_first_task_by_hand():
  params, stats = quick(MLP.init)(jax.random.key(0), batch())
  two = jax.tree.map(lambda *a: jnp.stack(a), batch(1), batch(2))
  got = sparse.squared_gradients(MLP, params, stats, two)

  def loss(p, b):
    return MLP.loss(MLP.apply(p, b), b).mean()

  each = [quick(jax.grad(loss))(params, batch(i)) for i in (1, 2)]
  want = jax.tree.map(lambda a, b: a**2 + b**2, *each)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-9), got, want)


@pytest.mark.parametrize(
  'rules, message',
  [
    ((('.*', 'half'),), "update 'half' for head/b"),
    ((('.*', 'out 0'),), "use 'all'"),
    ((('.*', 'in 1.5'),), "use 'all'"),
    ((('.*', 'last 1'),), 'of no stack of layers'),
    ((('l0/.*', 'all'),), 'no pattern covers'),
    ((('l9/.*', 'all'), ('.*', 'none')), "'l9/.*' matches no parameter"),
  ],
)
def test_mistakes_are_named(rules, message):
  with pytest.raises(UserError, match=message):
    sparse.sparse(MLP, rules).init(jax.random.key(0), batch())


def test_more_layers_than_there_are():
  rules = (('backbone/layers/.*', 'last 5'), ('.*', 'all'))
  with pytest.raises(UserError, match="update 'last 5': backbone/layers/.* has 4 layers"):
    sparse.parts(jax.eval_shape(VIT.init, jax.random.key(0), batch())[0], rules)


def test_methods_that_share_units_out_are_refused():
  made = sparse.sparse(MLP, SLICES['mlp'])
  with pytest.raises(UserError, match='hat needs hidden units'):
    jax.eval_shape(learner(made, TX, hat(2, 2, wires=made.wires)).init, jax.random.key(0), batch())
