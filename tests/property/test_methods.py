"""What the papers promise, for random inputs."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_jax.budget import passes, state_bytes
from cl_jax.compose import chain, gated
from cl_jax.errors import UserError
from cl_jax.learner import learner
from cl_jax.loop import run
from cl_jax.lowrank import merged
from cl_jax.masks import paths
from cl_jax.methods.closed_form.fecam import fecam
from cl_jax.methods.closed_form.ncm import ncm
from cl_jax.methods.closed_form.ranpac import ranpac
from cl_jax.methods.closed_form.slda import slda
from cl_jax.methods.heads.current_head import current_head
from cl_jax.methods.heads.cwr import cwr
from cl_jax.methods.heads.seen_head import seen_head
from cl_jax.methods.heads.slca import roots, sample, slca
from cl_jax.methods.heads.task_head import task_head
from cl_jax.methods.isolation.first_session import first_session
from cl_jax.methods.isolation.hat import HATState, hat
from cl_jax.methods.isolation.packnet import packnet
from cl_jax.methods.isolation.pnn import pnn
from cl_jax.methods.lowrank.lora import lora
from cl_jax.methods.regularisation.ebll import ebll
from cl_jax.methods.regularisation.ewc import ewc
from cl_jax.methods.regularisation.lwf import lwf
from cl_jax.methods.regularisation.si import si
from cl_jax.methods.replay.agem import AGEMState, agem
from cl_jax.methods.replay.dgr import dgr
from cl_jax.methods.replay.dreamnet import dreamnet
from cl_jax.methods.replay.er import er
from cl_jax.methods.replay.gdumb import gdumb
from cl_jax.methods.replay.gem import gem
from cl_jax.models.cnn import cnn
from cl_jax.models.identity import identity
from cl_jax.models.mlp import mlp
from cl_jax.models.resnet import resnet
from cl_jax.models.vit import Config as vit_config
from cl_jax.models.vit import vit
from cl_jax.streams.take import take
from cl_jax.types import Batch, Method, no_tap, overlay
from tests.compiling import compiled, quick

pytestmark = pytest.mark.usefixtures('quickly')


@given(seed=st.integers(0, 10_000))
def test_agem_never_goes_against_the_reference(seed):
  """<g, r> >= 0 after the projection, and a gradient that agrees is left bit for bit."""
  a, b = jax.random.normal(jax.random.key(seed), (2, 7))
  method = agem(20, 5, 2)
  batch = Batch(jnp.zeros((5, 1)), jnp.zeros(5, jnp.int32), jnp.ones(5), jnp.zeros(5, jnp.int32))
  s = method.init(None, None, batch, None)[1]
  s = AGEMState(s.memory._replace(draw=batch), s.finished)
  out, _ = method.grads(s, {'p': a}, None, batch, lambda p, d: ((0.0, None), {'p': b}))
  dot = float(a @ b)
  assert float(out['p'] @ b) >= -1e-5
  if dot >= 0:
    assert np.array_equal(out['p'], a)
  empty = s._replace(memory=s.memory._replace(draw=batch._replace(w=jnp.zeros(5))))
  same, _ = method.grads(empty, {'p': a}, None, batch, lambda p, d: ((0.0, None), {'p': b}))
  assert np.array_equal(same['p'], a)  # nothing to refer to


def test_agem_refers_to_finished_tasks_alone_where_their_labels_come_again():
  """Nobody tells the task: rows of the one at hand go to rings of their own, counted by boundaries."""
  learn = compiled(learner(mlp((), 2), optax.sgd(0.1), chain(agem=agem(24, 8, 2, tasks=3))))
  blank = Batch(jnp.zeros((10, 1)), jnp.arange(10) % 2, jnp.ones(10), jnp.full(10, -1))
  state = learn.init(jax.random.key(0), blank)
  for task in range(3):
    for _ in range(4):
      drawn = state.method['agem'].memory.draw
      assert bool(drawn.w.any()) == (task > 0) and not drawn.w[drawn.x[:, 0] >= task].any()
      state, _ = learn.step(state, blank._replace(x=jnp.full((10, 1), float(task))))
    state = learn.boundary(state, jax.tree.map(lambda a: a[None], blank))


def test_passes_of_gem_are_those_of_its_last_task():
  """A finished task's 25 rows take 2.5 passes of a batch of 10, and there are 19 then."""
  learn = learner(mlp((), 2), optax.sgd(0.1), chain(gem=gem(20, 500)))
  batch = Batch(
    jnp.zeros((10, 3)), jnp.zeros(10, jnp.int32), jnp.ones(10), jnp.zeros(10, jnp.int32)
  )
  state = jax.eval_shape(learn.init, jax.random.key(0), batch)
  counted = passes(
    lambda scoped: learner(scoped, optax.sgd(0.1), chain(gem=gem(20, 500))),
    mlp((), 2),
    state,
    batch,
  )
  assert counted['train_forward'] == counted['train_backward'] == 1 + 19 * 2.5


def test_cwr_consolidates_what_si_leaves_free():
  """AR1: the output layer has no importance, so nothing pulls it back from where it was put."""
  method = chain(si=si(skip='head/.*'), cwr=cwr())
  learn = compiled(learner(mlp((4,), 2), optax.sgd(0.1), method))
  rng = np.random.default_rng(0)
  batch = Batch(
    jnp.asarray(rng.normal(size=(10, 3)), jnp.float32),
    jnp.arange(10) % 2,
    jnp.ones(10),
    jnp.zeros(10),
  )
  state = learn.init(jax.random.key(0), batch)
  for _ in range(3):
    state, _ = learn.step(state, batch)
  state = learn.boundary(state, jax.tree.map(lambda a: a[None], batch))
  important = paths(state.method['si'].importance)
  assert {p for p, a in important.items() if bool((a > 0).any())} == {'l0/w', 'l0/b'}
  with pytest.raises(UserError, match='matches no parameter'):
    learner(mlp((4,), 2), optax.sgd(0.1), si(skip='heads/.*')).init(jax.random.key(0), batch)


def training(method):
  """(stream, seed) -> what a run gives; compiled once for all seeds."""
  build = lambda hp, w: learner(mlp((16, 12), 6), optax.sgd(0.02), method)  # noqa: E731
  program = quick(lambda k, s: run(build, None, k, s))
  return lambda stream, seed=0: program(jax.random.key(seed), stream)


@pytest.fixture(scope='module')
def naive():
  return training(Method())


@pytest.mark.parametrize(
  'method',
  [
    lambda: ewc(0.0),
    lambda: lwf(0.0),
    lambda: er(30, 10, coef=0.0),
    lambda: chain(a=ewc(0.0, online=True), b=lwf(0.0)),
  ],
  ids=['ewc', 'lwf', 'er', 'both'],
)
def test_coefficient_zero_is_naive(method, toy_stream, naive):
  state, record = training(method())(toy_stream)
  plain, expected = naive(toy_stream)
  np.testing.assert_allclose(record.R, expected.R, atol=0.011)  # one of 100 examples
  for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(plain.params), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_ewc_normalised_does_not_depend_on_the_scale(toy_stream):
  """The penalty with F and with 100 F is the same, and the largest weight of a gap is coef / 2."""
  method = ewc(2.0, online=True, normalise=True)
  params = {'w': jnp.array([1.0, 2.0])}
  s = method.init(None, {'w': jnp.zeros(2)}, None, None)[1]
  assert float(method.loss(s, params, None, None, None)) == 0  # nothing is known yet
  first = s._replace(importance={'w': jnp.array([3.0, 1.5])})
  second = s._replace(importance={'w': jnp.array([300.0, 150.0])})
  assert float(method.loss(first, params, None, None, None)) == pytest.approx(1.0 + 0.5 * 4.0)
  assert float(method.loss(second, params, None, None, None)) == pytest.approx(3.0)
  with pytest.raises(ValueError, match='needs online'):
    ewc(1.0, normalise=True)


@pytest.mark.parametrize('tx', [optax.sgd(0.02, momentum=0.9), optax.adamw(0.01, weight_decay=0.1)])
def test_packnet_keeps_frozen_weights_for_ever(tx, toy_stream):
  """Weights of finished tasks keep their bits under momentum and weight decay, and so do predictions."""
  heads = toy_stream.task_classes
  method = chain(pack=packnet(0.5, 0.5, 20), head=task_head(heads, 6))
  learn = compiled(learner(mlp((16, 12), 6), tx, method))
  step, end, predict = learn.step, learn.boundary, learn.predict
  state = learn.init(jax.random.key(0), take(toy_stream, toy_stream.index[0, 0], 0))
  probe = jax.tree.map(lambda a: a[0, 0], toy_stream.test)
  kept = None
  for t in range(3):
    for i in range(30):
      state, _ = step(state, take(toy_stream, toy_stream.index[t, i], t))
      if kept is not None:
        owner, values, answers = kept
        for name in ('l0', 'l1'):
          mine = np.asarray(owner[f'{name}/w'] == 1)
          assert mine.any()
          assert np.array_equal(np.asarray(state.params[name]['w'])[mine], values[name][mine])
        if i in (0, 19, 29):
          assert np.array_equal(predict(state, probe), answers)
    state = end(state, jax.vmap(lambda r, t=t: take(toy_stream, r, t))(toy_stream.ends[t]))
    if t == 0:
      values = {n: np.asarray(state.params[n]['w']) for n in ('l0', 'l1')}
      kept = (state.method['pack'].owner, values, predict(state, probe))
  owned = [np.mean(np.asarray(state.method['pack'].owner['l0/w']) == k) for k in range(4)]
  assert owned[1] == 0.5 and abs(owned[2] - 0.25) < 0.01 and abs(owned[0] - 0.125) < 0.01


@pytest.mark.parametrize(
  'method',
  [dgr(5, (8,), 3, outputs='seen'), dreamnet(5, outputs='seen')],
  ids=['dgr', 'dreamnet'],
)
def test_dreams_are_of_no_class(method):
  """Tasks {2, 3} and {1}: class 0, of which nothing was seen, is not trained on what is dreamt."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.random((8, 6)), jnp.float32)

  def of(*classes):
    y = jnp.asarray(classes * (8 // len(classes)), jnp.int32)
    return Batch(x, y, jnp.ones(8), jnp.zeros(8, jnp.int32))

  learn = compiled(learner(mlp((8,), 4), optax.sgd(0.1), chain(own=method, head=seen_head(4))))
  state = learn.init(jax.random.key(0), of(2, 3))
  for batch in (of(2, 3), of(1)):
    for _ in range(4):
      state, _ = learn.step(state, batch)
    state = learn.boundary(state, jax.tree.map(lambda a: a[None], batch))
  bias = np.asarray(state.params['head']['b'])
  assert bias[0] == 0 and (bias[1:] != 0).all()


def test_packnet_prunes_each_task_in_its_own_time(toy_stream):
  """A task of 6 steps after its fourth, one of 12 after its eighth, and it goes on with what it kept."""
  method = chain(pack=packnet(0.5, 0.5, (4, 8)), head=task_head(toy_stream.task_classes, 6))
  learn = compiled(learner(mlp((16, 12), 6), optax.sgd(0.02), method))
  state = learn.init(jax.random.key(0), take(toy_stream, toy_stream.index[0, 0], 0))
  pruned = []
  for t, steps in enumerate((6, 12)):
    for i in range(steps):
      state, _ = learn.step(state, take(toy_stream, toy_stream.index[t, i], t))
      owner = np.asarray(state.method['pack'].owner['l0/w'])
      pruned.append((t, i + 1, bool((owner == t + 1).any())))
    ends = jax.vmap(lambda r, t=t: take(toy_stream, r, t))(toy_stream.ends[t])
    state = learn.boundary(state, ends)
  late = [(0, i) for i in range(4, 7)] + [(1, i) for i in range(8, 13)]
  assert [(t, i) for t, i, now in pruned if now] == late


def test_hat_protects_what_it_used(toy_stream):
  """Units that a finished task used do not move; those that it left free do."""
  model = mlp((16, 12), 6)
  method = chain(hat=hat(3, 15, 0.1, wires=model.wires), head=task_head(toy_stream.task_classes, 6))
  learn = compiled(learner(model, optax.sgd(0.05), method))
  step, end = learn.step, learn.boundary
  state = learn.init(jax.random.key(0), take(toy_stream, toy_stream.index[0, 0], 0))
  for i in range(30):
    state, _ = step(state, take(toy_stream, toy_stream.index[0, i], 0))
  state = end(state, jax.vmap(lambda r: take(toy_stream, r, 0))(toy_stream.ends[0]))
  used = np.asarray(state.method['hat'].used['l0'])
  before = np.asarray(state.params['l0']['w'])
  for i in range(30):
    state, _ = step(state, take(toy_stream, toy_stream.index[1, i], 1))
  moved = np.abs(np.asarray(state.params['l0']['w']) - before).max(0)
  assert (used > 0.999).any() and (used < 0.001).any()
  assert moved[used > 0.9999999].max(initial=0) == 0
  assert moved[used < 0.001].max() > 1e-3


@pytest.mark.parametrize('smax', [0.2, 400.0])
def test_hat_gates_never_get_less_steep_within_an_epoch(smax):
  """The gradient of an embedding of 0 is multiplied by smax over the steepness."""
  method, none = hat(1, 5, 0.0, smax), jnp.zeros(1, bool)
  e = {'hat': {'l0': jnp.zeros((1, 1))}}
  zero = jnp.zeros(1)
  at = lambda i: HATState({'l0': zero}, none, none, zero, jnp.int32(i), jnp.int32(0))  # noqa: E731
  ones = jax.tree.map(jnp.ones_like, e)
  steep = [
    smax / float(method.grads(at(i), ones, e, None, None)[0]['hat']['l0'][0, 0]) for i in range(5)
  ]
  assert steep == sorted(steep) and steep[-1] == pytest.approx(smax)


def test_hat_has_a_cycle_for_each_task():
  """Tasks of unequal length: the first has epochs of 3 steps, the second of 5."""
  method, none, zero = hat(2, (3, 5), 0.0, 8.0), jnp.zeros(1, bool), jnp.zeros(2)
  e = {'hat': {'l0': jnp.zeros((2, 1))}}
  for done, length in ((0, 3), (1, 5)):
    at = lambda i, d=done: HATState({'l0': zero}, none, none, zero, jnp.int32(i), jnp.int32(d))  # noqa: E731
    ones = jax.tree.map(jnp.ones_like, e)
    grads = [
      float(method.grads(at(i), ones, e, None, None)[0]['hat']['l0'][0, 0]) for i in range(9)
    ]
    assert [i for i, g in enumerate(grads) if g == pytest.approx(1.0)] == [
      *range(length - 1, 9, length)
    ]


def test_hat_has_a_loss_where_no_unit_is_free():
  """Gates that are exactly 1 in f32 leave nothing to share the sparsity term out over."""
  s = HATState({'l0': jnp.ones(4)}, None, None, jnp.zeros(2), jnp.int32(0), jnp.int32(1))
  batch = Batch(None, None, None, jnp.ones(3, jnp.int32))
  assert float(hat(2, 5).loss(s, {'hat': {'l0': jnp.ones((2, 4))}}, batch, None, None)) == 0


NETWORKS = {
  'mlp': lambda: mlp((16, 12), 6),
  'cnn': lambda: cnn((4, 6), (8,), 6),
  'resnet': lambda: resnet(6, 4, (1, 1)),
  'vit': lambda: vit(vit_config(image=8, patch=4, channels=1, d=8, depth=2, heads=2, ffn=12), 6),
}


def two_tasks(model, tx, method):
  """(state after a task of one step, step, batch(i, task), the first task's answers to rows of its own)."""
  rng = np.random.default_rng(3)
  x = jnp.asarray(rng.normal(size=(5, 12, 8, 8, 1)), jnp.float32)
  y = jnp.asarray(rng.integers(0, 3, (5, 12)), jnp.int32)
  batch = lambda i, t: Batch(x[i], y[i] + 3 * t, jnp.ones(12), jnp.full(12, t))  # noqa: E731
  learn = compiled(learner(model, tx, chain(own=method, head=task_head(((0, 1, 2), (3, 4, 5)), 6))))
  step, end, predict = learn.step, learn.boundary, learn.predict

  def finish(state):
    state, _ = step(state, batch(0, 0))  # norm statistics that are not those of the beginning
    return end(state, jax.tree.map(lambda a: a[None], batch(0, 0)))

  return (
    learn.init(jax.random.key(0), batch(0, 0)),
    finish,
    lambda state, i: step(state, batch(i, 1))[0],
    lambda state: np.asarray(predict(state, batch(4, 0)))[:, :3],
  )


SGD, ADAMW = optax.sgd(0.1, momentum=0.9), optax.adamw(0.01, weight_decay=0.1)
# Every network under the optimiser that remembers most and decays weights, one of them under the other too.
EVERY = pytest.mark.parametrize(
  ('name', 'tx'),
  [('mlp', SGD), *((name, ADAMW) for name in NETWORKS)],
  ids=['mlp-sgd', *(f'{name}-adamw' for name in NETWORKS)],
)


@EVERY
def test_hat_forgets_nothing_where_gates_are_shut_or_open(name, tx):
  """With gates of exactly 0 and 1 a finished task's answers keep their bits, under momentum and decay."""
  model = NETWORKS[name]()
  state, finish, step, answers = two_tasks(model, tx, hat(2, 5, 0.1, wires=model.wires))
  rng = np.random.default_rng(5)
  sign = lambda a: jnp.asarray(np.where(rng.random(a.shape) < 0.5, -6.0, 6.0), a.dtype)  # noqa: E731
  gates = jax.tree.map(sign, state.params['hat'])
  state = finish(state._replace(params={**state.params, 'hat': gates}))
  for tap, used in state.method['own'].used.items():
    assert set(np.unique(used)) == {0.0, 1.0}, tap
  before, weights = answers(state), paths(state.params)
  for i in range(4):
    state = step(state, i)
  assert np.array_equal(answers(state), before)
  moved = {p for p, a in paths(state.params).items() if not np.array_equal(a, weights[p])}
  assert {f'{w.layer}/w' for w in model.wires} & set(weights) <= moved


def test_hat_reads_a_finished_task_with_its_own_smax():
  """Hyperparameters that are chosen task by task change smax: what is finished keeps its answers."""
  model = mlp((16,), 6)

  def learn(smax):
    return two_tasks(model, optax.sgd(0.1), hat(2, 5, 0.1, smax, wires=model.wires))

  state, finish, _, answers = learn(20.0)
  _, finish_gentle, _, answers_gentle = learn(2.0)
  assert (
    np.abs(answers(state) - answers_gentle(state)).max() > 1e-3
  )  # not finished: with the latest
  state = finish(state)
  before = answers(state)
  assert np.array_equal(answers_gentle(state), before)
  again = finish_gentle(state)  # the same task, learnt once more
  assert np.array_equal(again.method['own'].smax, [2.0, 0.0])
  assert np.array_equal(answers_gentle(again), answers(again))


def test_hat_embeddings_begin_as_said():
  """'uniform' opens every gate at the start; 'normal' about half of them."""
  model = mlp((400,), 6)
  for name, least, most in (('uniform', 0.0, 2.0), ('normal', -6.0, 6.0)):
    state, *_ = two_tasks(model, optax.sgd(0.1), hat(2, 5, wires=model.wires, embedding=name))
    e = np.asarray(state.params['hat']['l0'])
    assert least <= e.min() and e.max() <= most
    assert np.mean(e > 0) == (1.0 if name == 'uniform' else pytest.approx(0.5, abs=0.1))
    assert e.mean() == pytest.approx(1.0 if name == 'uniform' else 0.0, abs=0.15)
  with pytest.raises(ValueError, match='one of'):
    hat(2, 5, embedding='ones')


@pytest.mark.parametrize(
  'tx', [optax.adam(0.01), optax.sgd(0.1, 0.9), optax.adamw(0.01, weight_decay=0.1)]
)
def test_hat_keeps_the_embeddings_of_other_tasks(tx):
  """Gates near their threshold, where a hundredth turns one over: momentum and decay leave them alone."""
  model = mlp((16,), 6)
  state, finish, step, _ = two_tasks(model, tx, hat(2, 5, wires=model.wires))
  gates = {'l0': jnp.tile(jnp.array([0.05, -0.05]), (2, 8))}
  state = state._replace(params={**state.params, 'hat': gates})
  first = step(state, 0)  # of the second task: the first one's embeddings wait
  assert np.array_equal(first.params['hat']['l0'][0], gates['l0'][0])
  state = finish(state)
  before = state.params['hat']['l0']
  assert not np.array_equal(before[0], gates['l0'][0])
  for i in range(4):
    state = step(state, i)
  after = state.params['hat']['l0']
  assert np.array_equal(after[0], before[0]) and not np.array_equal(after[1], before[1])


@EVERY
def test_packnet_forgets_nothing_in_any_network(name, tx):
  model = NETWORKS[name]()
  state, finish, step, answers = two_tasks(model, tx, packnet(0.5, 0.5))
  state = finish(state)
  owner = state.method['own'].owner
  for path, a in owner.items():  # in a stack every layer loses half of its weights
    share = (np.asarray(a) == 1).reshape(a.shape[0] if a.ndim == 3 else 1, -1).mean(1)
    assert np.abs(share - 0.5).max() < 0.02, path
  before, weights = answers(state), paths(state.params)
  for i in range(4):
    state = step(state, i)
  assert np.array_equal(answers(state), before)
  after = paths(state.params)
  assert all(not np.array_equal(after[p], weights[p]) for p in owner)


@pytest.mark.parametrize(('name', 'tx'), [('mlp', SGD), ('cnn', ADAMW)], ids=['mlp', 'cnn'])
def test_progressive_networks_forget_nothing(name, tx):
  """A finished column keeps its bits and its answers; the new one reads it through laterals."""
  model = NETWORKS[name]()
  method = pnn(2, ((0, 1, 2), (3, 4, 5)), wires=model.wires)
  state, finish, step, answers = two_tasks(model, tx, method)
  state = finish(state)
  before, weights = answers(state), paths(state.params)
  for i in range(4):
    state = step(state, i)
  assert np.array_equal(answers(state), before)
  moved = {p for p, a in paths(state.params).items() if not np.array_equal(a, weights[p])}
  assert moved == {p for p in weights if p.startswith('pnn/column1')}
  assert any(p.endswith('/u') for p in moved)


@pytest.mark.parametrize('name', ['resnet', 'vit'])
def test_progressive_networks_refuse_what_they_cannot_widen(name):
  model = NETWORKS[name]()
  with pytest.raises(UserError, match='columns of layers between taps'):
    two_tasks(model, optax.sgd(0.1), pnn(2, ((0, 1, 2), (3, 4, 5)), wires=model.wires))


def test_gdumb_predicts_with_norm_statistics_of_its_own_training():
  """A network with batch norm, trained at the boundary on what is stored, fits it."""
  rng = np.random.default_rng(2)
  y = np.arange(24) % 6
  x = rng.normal(size=(24, 8, 8, 1)) + 2 * rng.normal(size=(6, 8, 8, 1))[y]
  batch = Batch(
    jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32), jnp.ones(24), jnp.full(24, -1)
  )
  learn = compiled(learner(resnet(6, 4, (1, 1)), optax.sgd(0.1), gdumb(6, 24, 20, 8)))
  state = learn.init(jax.random.key(0), batch)
  state, _ = learn.step(state, batch)
  state = learn.boundary(state, jax.tree.map(lambda a: a[None], batch))
  right = np.asarray(learn.predict(state, batch).argmax(-1)) == y
  assert right.mean() > 0.9
  own, at_start = state.method.stats, state.method.start
  assert not np.array_equal(own['stem']['mean'], at_start['stem']['mean'])
  moved = state._replace(
    stats=jax.tree.map(lambda a: a + 7.0, state.stats)
  )  # the stream's: of no use
  assert np.array_equal(learn.predict(moved, batch), learn.predict(state, batch))


def test_gdumb_takes_its_steps_on_what_is_stored():
  """Slots that are empty take no part: a memory with room left learns as one that is full."""
  y = jnp.arange(24) % 6
  x = 3 * jax.nn.one_hot(y, 6) + jax.random.normal(jax.random.key(0), (24, 6))
  batch = Batch(x, y, jnp.ones(24), jnp.full(24, -1))
  losses = []
  for capacity in (24, 400):
    learn = compiled(learner(mlp((8,), 6), optax.sgd(0.1), gdumb(6, capacity, 5, 8, lr=0.01)))
    state = learn.init(jax.random.key(0), batch)
    state, _ = learn.step(state, batch)
    state = learn.boundary(state, jax.tree.map(lambda a: a[None], batch))
    logits = learn.predict(state, batch)
    losses.append(float(jnp.mean(jax.nn.logsumexp(logits, -1) - logits[jnp.arange(24), y])))
  assert losses[1] == pytest.approx(losses[0], rel=0.1), losses


@pytest.mark.parametrize('lam', [None, 1e-9, 0.0])
def test_ranpac_answers_where_a_ridge_parameter_is_too_small(lam):
  """A sum of rank 20 in 300 dimensions cannot be factorised with what few examples of a task find best."""
  y = jnp.arange(20) % 4
  x = 30.0 * jax.nn.one_hot(y, 6) + jax.random.normal(jax.random.key(0), (20, 6))
  batch = Batch(x, y, jnp.ones(20), jnp.zeros(20, jnp.int32))
  learn = compiled(learner(identity(4), optax.identity(), ranpac(4, 300, lam)))
  state = learn.init(jax.random.key(1), batch)
  state, _ = learn.step(state, batch)
  state = learn.boundary(state, jax.tree.map(lambda a: a[None], batch))
  found = learn.predict(state, batch)
  assert jnp.isfinite(found).all() and (found.argmax(-1) == y).mean() > 0.9


@cache
def closed_form(name, when):
  """Compiled init, step and boundary, kept over the examples that hypothesis tries."""
  method = {
    'ncm': lambda: ncm(4, when=when),
    'slda': lambda: slda(4, when=when),
    'ranpac': lambda: ranpac(4, 16, 1.0, when),
    'fecam': lambda: fecam(4, per_class=when == 'step'),  # it has the boundary only
  }[name]()
  learn = learner(identity(4), optax.sgd(0.0), method)
  return quick(learn.init), quick(learn.step), quick(learn.boundary)


@settings(max_examples=5)
@given(seed=st.integers(0, 10_000))
@pytest.mark.parametrize('when', ['step', 'boundary'])
@pytest.mark.parametrize('name', ['ncm', 'ranpac', 'slda', 'fecam'])
def test_closed_forms_do_not_depend_on_the_order(name, when, seed):
  """The same head from the same examples in any order and any cut into batches (SLDA: its means)."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(60, 5)).astype(np.float32)
  y = rng.integers(0, 4, 60).astype(np.int32)
  init, step, end = closed_form(name, when)

  def fit(order, size):
    rows = order.reshape(-1, size)
    ones = lambda i: (np.ones(i.shape, np.float32), np.full(i.shape, -1, np.int32))  # noqa: E731
    batch = lambda i: Batch(x[i], y[i], *ones(i))  # noqa: E731
    state = init(jax.random.key(0), batch(rows[0]))
    for i in rows:
      state, _ = step(state, batch(i))
    return end(state, batch(rows)).method

  a, b = fit(np.arange(60), 10), fit(rng.permutation(60), 12)
  if name == 'slda':
    a, b = (a.mean, a.count, a.seen), (b.mean, b.count, b.seen)
  for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(u, v, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('name', ['ncm', 'ranpac', 'slda', 'fecam'])
def test_at_the_boundary_epochs_do_not_count(name, toy_stream):
  """Learnt at the boundary from features that stand still, two epochs give bitwise what one gives."""
  factory = {
    'ncm': lambda: ncm(6, when='boundary'),
    'slda': lambda: slda(6, when='boundary'),
    'ranpac': lambda: ranpac(6, 16, when='boundary'),
    'fecam': lambda: fecam(6),
  }[name]
  results = []
  for epochs in (1, 2):
    index = jnp.tile(toy_stream.index, (1, epochs, 1))
    stream = dataclasses.replace(toy_stream, index=index)
    build = lambda hp, w: learner(identity(6), optax.sgd(0.0), factory())  # noqa: E731
    state, record = quick(lambda k, s, b=build: run(b, None, k, s))(jax.random.key(0), stream)
    results.append((state.method, record.R))
    assert record.R[-1].mean() > 0.8
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_first_session_adaptation_learns_with_the_adapted_network(toy_stream):
  """RanPAC's first phase: adapters move in the first task only, statistics are of the adapted network."""
  model, tx = mlp((16, 12), 6), optax.adamw(0.01, weight_decay=0.1)
  first = take(toy_stream, toy_stream.index[0, 0], 0)
  params, _ = model.init(jax.random.key(5), first)
  frozen = {k: params[k] for k in ('l0', 'l1')}
  low = lora(2, 4.0, 'l./w')
  method = chain(lora=low, only=first_session(), ranpac=ranpac(6, 24, when='boundary'))
  learn = compiled(learner(model, tx, method, frozen))
  step, end = learn.step, learn.boundary
  state = learn.init(jax.random.key(0), first)
  start, settled = state.params, None
  ends = [jax.vmap(lambda r, t=t: take(toy_stream, r, t))(toy_stream.ends[t]) for t in range(3)]
  for t in range(3):
    for i in range(8):
      state, _ = step(state, take(toy_stream, toy_stream.index[t, i], t))
    state = end(state, ends[t])
    settled = state.params if t == 0 else settled
    jax.tree.map(np.testing.assert_array_equal, state.params, settled)
  apart = lambda a, b: not np.array_equal(a, b)  # noqa: E731
  assert jax.tree.all(jax.tree.map(apart, start, settled))

  def gram(params):
    whole = jax.tree.map(
      lambda *a: jnp.concatenate([b.reshape(-1, *b.shape[2:]) for b in a]), *ends
    )
    f = model.apply(merged(low, (), {**frozen, **params}), whole, no_tap, False).features
    h = jax.nn.relu(f @ state.method['ranpac'].projection)
    return h.T @ h

  np.testing.assert_allclose(state.method['ranpac'].gram, gram(settled), rtol=1e-3, atol=1e-2)
  assert not np.allclose(state.method['ranpac'].gram, gram(start), rtol=1e-1)
  test = jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:]), toy_stream.test)
  assert (learn.predict(state, test).argmax(-1) == test.y).mean() > 0.8


def test_the_first_session_ends_for_norm_statistics_too():
  model = resnet(4, width=2, blocks=(1,))
  x = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype(np.float32)
  batch = Batch(x, np.arange(6) % 4, np.ones(6, np.float32), np.zeros(6, np.int32))
  learn = compiled(learner(model, optax.sgd(0.1, momentum=0.9), first_session()))
  step = learn.step
  state = learn.init(jax.random.key(0), batch)
  before = state.stats
  state, _ = step(state, batch)
  apart = lambda a, b: not np.array_equal(a, b)  # noqa: E731
  assert jax.tree.all(jax.tree.map(apart, before, state.stats))
  settled = learn.boundary(state, jax.tree.map(lambda a: a[None], batch))
  state = step(settled, batch)[0]
  same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)  # noqa: E731
  same((state.params, state.stats), (settled.params, settled.stats))


def test_a_merged_first_session_keeps_the_network_that_it_began_with():
  """Its parameters and norm statistics but for the head, charged; the other half of the features adapts."""
  model = resnet(4, width=2, blocks=(1,))
  x = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype(np.float32)
  batch = Batch(x, np.arange(6) % 4, np.ones(6, np.float32), np.zeros(6, np.int32))
  method = chain(only=first_session(merge=True), ncm=ncm(4, when='boundary'))
  learn = compiled(learner(model, optax.sgd(0.1, momentum=0.9), method))
  begun = state = learn.init(jax.random.key(0), batch)
  for _ in range(2):
    state, _ = learn.step(state, batch)
  ended = learn.boundary(state, jax.tree.map(lambda a: a[None], batch))
  features = quick(lambda s: model.apply(overlay(s.stats, s.params), batch, no_tap, False).features)
  halves = jnp.concatenate([features(begun), features(state)], -1)
  assert not np.allclose(*jnp.split(halves, 2, -1), rtol=0.1)
  s = ended.method['ncm']
  np.testing.assert_allclose(s.total, np.eye(4)[batch.y].T @ halves, rtol=1e-4, atol=1e-4)
  mine = sum(a.nbytes for k, a in paths((begun.params, begun.stats)).items() if 'head' not in k)
  assert state_bytes(ended)['method/only'] == 1 + mine


def test_a_merged_first_session_pays_for_its_second_pass_at_test_alone(toy_stream):
  """In training nothing reads the features of the network before."""
  model, batch = mlp((16, 12), 6), take(toy_stream, toy_stream.index[0, 0], 0)
  cost = []
  for both in (False, True):
    method = chain(only=first_session(both), ncm=ncm(6, when='boundary'))
    build = lambda model, m=method: learner(model, optax.sgd(0.1), m)  # noqa: E731
    state = jax.eval_shape(build(model).init, jax.random.key(0), batch)
    cost.append(passes(build, model, state, batch))
  plain, merged = cost
  assert plain['train_forward'] == merged['train_forward'] == 1
  assert merged['predict_forward'] == pytest.approx(2 * plain['predict_forward'], abs=0.01)


def test_merging_what_does_not_differ_is_refused(toy_stream):
  """Where the head alone is trained, or the adaptation comes later; nor is there one shape for a gate."""
  model, batch = mlp((16, 12), 6), take(toy_stream, toy_stream.index[0, 0], 0)
  params, _ = model.init(jax.random.key(0), batch)
  frozen = {k: params[k] for k in ('l0', 'l1')}
  only, adapter = first_session(merge=True), lora(2, 4.0, 'l./w')
  for method, message in (
    (only, 'nothing but the head is trained'),
    (chain(only=only, lora=adapter), 'put it behind'),
    (chain(lora=adapter, only=gated(1.0, only)), 'cannot be gated'),
  ):
    learn = learner(model, optax.sgd(0.1), method, frozen)
    with pytest.raises(UserError, match=message) as caught:
      jax.eval_shape(lambda k, b, f=learn: f.predict(f.init(k, b), b), jax.random.key(0), batch)
    assert '\n' not in str(caught.value)


def test_fecam_adds_to_the_moments_of_a_class_that_comes_back():
  """Mean and unbiased covariance are those of all its examples together; NaN in padding is nothing."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(50, 5)).astype(np.float32) ** 2
  y = rng.integers(0, 3, 50).astype(np.int32)
  w = np.ones(50, np.float32)
  x[47:], w[47:] = np.nan, 0
  learn = compiled(learner(identity(4), optax.sgd(0.0), fecam(4)))
  parts = [Batch(x[i], y[i], w[i], 0 * y[i]) for i in (np.arange(20), np.arange(20, 50))]
  state = learn.init(jax.random.key(0), parts[0])
  for part in parts:
    state = learn.boundary(state, jax.tree.map(lambda a: jnp.asarray(a)[None], part))
  m = state.method.moments
  for c in range(3):
    own = np.sqrt(x[:47][y[:47] == c])
    np.testing.assert_allclose(m.mean[c], own.mean(0), rtol=1e-5)
    np.testing.assert_allclose(m.scatter[c] / (m.count[c] - 1), np.cov(own.T), rtol=1e-4, atol=1e-5)
  assert m.count[3] == 0
  scores = learn.predict(state, parts[0])
  assert np.isfinite(scores).all() and (scores[:, 3] < scores[:, :3].min()).all()


def test_lwf_of_old_outputs_beside_the_loss_of_the_current_ones(toy_stream):
  """The loss is that of the new task's classes, and 2 T^2 times teacher against network on the old ones."""
  model, T, classes = mlp((16,), 6), 3.0, toy_stream.task_classes
  chosen = chain(lwf=lwf(2.0, T, 'old'), current_head=current_head(6))
  learn = learner(model, optax.sgd(0.1), chosen)
  state = quick(learn.init)(jax.random.key(1), take(toy_stream, toy_stream.index[0, 0], 0))
  step = quick(learn.step)
  for i in range(4):
    state, _ = step(state, take(toy_stream, toy_stream.index[0, i], 0))
  ends = jax.vmap(lambda rows: take(toy_stream, rows, 0))(toy_stream.ends[0])
  state = quick(learn.boundary)(state, ends)
  teacher = state.params
  for i in range(3):
    batch = take(toy_stream, toy_stream.index[1, i], 1)
    y, w = np.asarray(batch.y), np.asarray(batch.w, np.float64)
    old, new = (
      np.asarray(model.apply(p, batch, no_tap, False).logits, np.float64)
      for p in (teacher, state.params)
    )
    logp = lambda z: z - np.log(np.exp(z).sum(-1, keepdims=True))  # noqa: E731
    now = sorted(
      {*np.concatenate([toy_stream.y[r] for r in toy_stream.index[1, : i + 1]]).tolist()}
    )
    assert set(now) <= set(classes[1])
    task = -logp(new[:, now])[np.arange(len(y)), [now.index(int(c)) for c in y]]
    was = list(classes[0])
    kd = -(T**2) * (np.exp(logp(old[:, was] / T)) * logp(new[:, was] / T)).sum(-1)
    want = ((task + 2.0 * kd) * w).sum() / w.sum()
    state, loss = step(state, batch)
    np.testing.assert_allclose(loss, want, rtol=1e-5)


@pytest.mark.parametrize(('name', 'make'), [('ebll', partial(ebll, 3)), ('dreamnet', dreamnet)])
def test_old_outputs_are_taught_though_the_head_masks_them(name, make, toy_stream):
  """Beside a loss over the task's own classes, without the huge numbers of masked logits."""
  chosen = chain(**{name: make(outputs='old')}, current_head=current_head(6))
  learn = learner(mlp((16,), 6), optax.sgd(0.1), chosen)
  state = quick(learn.init)(jax.random.key(1), take(toy_stream, toy_stream.index[0, 0], 0))
  step = quick(learn.step)
  state, _ = step(state, take(toy_stream, toy_stream.index[0, 0], 0))
  ends = jax.vmap(lambda rows: take(toy_stream, rows, 0))(toy_stream.ends[0])
  state, loss = step(
    quick(learn.boundary)(state, ends), take(toy_stream, toy_stream.index[1, 0], 1)
  )
  assert 0 < loss < 1e4 and all(np.isfinite(a).all() for a in jax.tree.leaves(state.params))
  with pytest.raises(ValueError, match="dgr outputs 'old'"):
    dgr(outputs='old')


def test_slca_aligns_the_head_alone(toy_stream):
  """It mends what fine-tuning did to the output layer, with draws of the classes' own moments."""
  model = mlp((16, 12), 6)
  slow = optax.multi_transform(
    {'head': optax.sgd(0.05), 'rest': optax.sgd(0.0005)},
    lambda p: {k: 'head' if k == 'head' else 'rest' for k in p},
  )
  build = lambda m: lambda hp, w: learner(model, slow, m)  # noqa: E731
  key = jax.random.key(0)
  (aligned, a), (_, b) = (
    quick(lambda k, m=m: run(build(m), None, k, toy_stream))(key)
    for m in (slca(samples=64), Method())
  )
  assert a.R[-1].mean() > b.R[-1].mean() + 0.2
  ends = jax.vmap(lambda r: take(toy_stream, r, 2))(toy_stream.ends[2])
  after = quick(build(slca(samples=64))(None, None).boundary)(aligned, ends).params
  for layer in ('l0', 'l1'):
    jax.tree.map(np.testing.assert_array_equal, after[layer], aligned.params[layer])
  assert not np.array_equal(after['head']['w'], aligned.params['head']['w'])
  m = aligned.method
  drawn = sample(key, m.mean, roots(m, 1e-6), 20_000)
  for c in range(6):
    np.testing.assert_allclose(drawn[c].mean(0), m.mean[c], atol=0.1)
    scale = float(jnp.trace(m.scatter[c] / (m.count[c] - 1)))
    assert np.abs(np.cov(drawn[c].T) - m.scatter[c] / (m.count[c] - 1)).max() < 0.03 * scale


def test_what_closed_forms_and_alignment_cannot_be():
  for make in (ncm, slda, ranpac):
    with pytest.raises(UserError, match="when='end': choose step or boundary"):
      make(4, when='end')
  with pytest.raises(UserError, match='samples=10 is not a multiple of chunks=4'):
    slca(samples=10, chunks=4)
  learn = learner(identity(4), optax.sgd(0.1), slca())
  with pytest.raises(UserError, match='slca needs a trained output layer'):
    learn.init(jax.random.key(0), Batch(*(jnp.ones((3, 2)), *jnp.zeros((3, 3), jnp.int32))))


def test_lora_starts_as_the_model(toy_stream):
  model = mlp((16, 12), 6)
  batch = take(toy_stream, toy_stream.index[0, 0], 0)
  params, _ = model.init(jax.random.key(0), batch)
  frozen = {k: params[k] for k in ('l0', 'l1')}
  learn = learner(model, optax.sgd(0.05), lora(2, 4.0, 'l./w'), frozen)
  state = learn.init(jax.random.key(1), batch)
  plain = model.apply({**frozen, **state.params}, batch, no_tap, False)
  np.testing.assert_array_equal(learn.predict(state, batch), plain.logits)


def test_replay_helps_and_regularisation_remembers(toy_stream, naive):
  """Over 4 seeds the first task is kept better than by fine-tuning (two-sided: and not perfectly)."""
  gain, replay = [], training(er(60, 10))
  for seed in range(4):
    kept = replay(toy_stream, seed)[1].R[-1, 0]
    lost = naive(toy_stream, seed)[1].R[-1, 0]
    gain.append(float(kept - lost))
  assert 0.05 < np.mean(gain) < 0.9
