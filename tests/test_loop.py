"""The loop: evaluations inside a leg, ragged legs, confusion, costs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax import budget, metrics
from cl_jax.compose import chain
from cl_jax.errors import UserError
from cl_jax.learner import learner
from cl_jax.loop import confusion, evaluate, host_feed, run, run_chunks
from cl_jax.masks import mark, nest, paths, split, subtract
from cl_jax.methods.closed_form.ncm import ncm
from cl_jax.methods.lowrank.lora import lora
from cl_jax.methods.regularisation.ewc import ewc
from cl_jax.methods.replay.er import er
from cl_jax.models.identity import identity
from cl_jax.models.mlp import mlp
from cl_jax.streams import schedules
from cl_jax.streams.take import take
from cl_jax.types import Batch, Learner, Method, overlay


def build(hp, weights):
  return learner(mlp((8,), 6), optax.sgd(hp), er(20, 5))


@pytest.fixture(scope='module')
def ragged(toy_stream):
  """Legs of 30, 17 and 23 steps."""
  return dataclasses.replace(toy_stream, steps=jnp.array([30, 17, 23], jnp.int32))


@pytest.fixture(scope='module')
def ran(ragged):
  return jax.jit(run, static_argnums=(0, 5))(build, 0.05, jax.random.key(0), ragged, None, 10)


def test_ragged_legs_and_curves(ragged, ran):
  """Every 10 steps accuracy is measured while the leg lasts; losses after its end are NaN."""
  state, record = ran
  assert int(state.step) == 70
  assert np.isnan(record.loss[1, 17:]).all() and np.isfinite(record.loss[1, :17]).all()
  inside = np.isfinite(np.asarray(record.curve)).all(-1)
  np.testing.assert_array_equal(inside, [[True] * 3, [True, False, False], [True, True, False]])
  np.testing.assert_array_equal(
    record.curve[0, 2], record.R[0]
  )  # the leg's end, before its boundary
  low = metrics.minimum_accuracy(record.R, record.curve)
  assert low <= metrics.minimum_accuracy(record.R)


def test_ragged_chunks_are_the_same_run(ragged, ran):
  *_, last = run_chunks(build, 0.05, jax.random.key(0), ragged, every=10)
  for ours, theirs in zip(last.record, ran[1], strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_a_run_fed_from_the_host_is_the_same_run(ragged, ran):
  """From the first batch on, of which the initial state is made."""
  feed = host_feed(ragged)
  *_, last = run_chunks(build, 0.05, jax.random.key(0), ragged, every=10, feed=feed)
  for ours, theirs in zip(last.record, ran[1], strict=True):
    np.testing.assert_array_equal(ours, theirs)
  for a, b in zip(jax.tree.leaves(last.state.params), jax.tree.leaves(ran[0].params), strict=True):
    np.testing.assert_array_equal(a, b)


def test_evaluate_and_confusion_count_what_has_weight(toy_stream, ran):
  """Against a plain loop over examples; padding counts nowhere."""
  learn = build(0.05, None)
  test = toy_stream.test._replace(w=toy_stream.test.w.at[:, 1, 40:].set(0))
  acc = evaluate(learn, ran[0], test)
  table = confusion(learn, ran[0], test, 6)
  want, right = np.zeros((6, 6), int), []
  for t in range(3):
    hits = []
    for e in range(2):
      batch = jax.tree.map(lambda a, t=t, e=e: a[t, e], test)
      guess = np.asarray(learn.predict(ran[0], batch)).argmax(-1)
      for y, g, w in zip(batch.y, guess, batch.w, strict=True):
        if w > 0:
          want[int(y), int(g)] += 1
          hits.append(int(y) == int(g))
    right.append(np.mean(hits))
  np.testing.assert_array_equal(table, want)
  np.testing.assert_allclose(acc, right, rtol=1e-6)


def test_boundaries_are_told_or_not(toy_stream):
  """Without boundaries the boundary hook never runs; a method that needs it is refused."""
  called = []

  def boundary(s, params, batches, fwd, key):
    called.append(1)
    return params, s

  silent = schedules.task_free(toy_stream)
  watch = lambda hp, w: learner(mlp((8,), 6), optax.sgd(hp), Method(boundary=boundary))  # noqa: E731
  jax.jit(run, static_argnums=0)(watch, 0.05, jax.random.key(0), silent)
  assert not called
  needy = lambda hp, w: learner(mlp((8,), 6), optax.sgd(hp), ewc(1.0))  # noqa: E731
  with pytest.raises(UserError, match='needs boundary'):
    run(needy, 0.05, jax.random.key(0), silent)


def test_a_learner_of_ones_own(toy_stream):
  """What fits no hook is a Learner directly: here the majority class of the last batch."""

  def init(key, batch):
    return jnp.zeros(6)

  def step(state, batch):
    return state + jax.nn.one_hot(batch.y, 6).sum(0), jnp.float32(0)

  own = Learner(init, step, lambda state, b: state, lambda state, b: jnp.tile(state, (len(b.y), 1)))
  state, record = jax.jit(run, static_argnums=0)(
    lambda hp, w: own, 0.0, jax.random.key(0), toy_stream
  )
  assert float(state.sum()) == 900 and record.R.shape == (3, 3)


def test_frozen_weights_stay_out_of_the_state(toy_stream):
  """Split before the gradient: no gradient, no optimiser state, no copy; and they do not move."""
  model = mlp((8, 7), 6)
  batch = take(toy_stream, toy_stream.index[0, 0], 0)
  params, _ = model.init(jax.random.key(5), batch)
  frozen, _ = split(params, ['l[01]/.*'])
  learn = learner(model, optax.adam(1e-2), Method(), frozen)
  state = learn.init(jax.random.key(0), batch)
  assert set(state.params) == {'head'}
  assert budget.state_bytes(state, frozen)['optimiser'] == 2 * (7 * 6 + 6) * 4 + 4
  after, _ = learn.step(state, batch)
  full = model.apply(overlay(frozen, after.params), batch, lambda n, h, layer=0: h, False)
  np.testing.assert_array_equal(learn.predict(after, batch), full.logits)
  frozen_flops = budget.flops(learn.step, state, batch)
  whole = learner(model, optax.adam(1e-2))
  assert frozen_flops < 0.62 * budget.flops(whole.step, whole.init(jax.random.key(0), batch), batch)


def test_masks_must_cover_and_match():
  tree = {'a': {'w': 1, 'b': 2}, 'head': {'w': 3}}
  assert paths(tree) == {'a/b': 2, 'a/w': 1, 'head/w': 3} and nest(paths(tree)) == tree
  assert mark(tree, [('a/.*', 'slow'), ('.*', 'fast')]) == {
    'a': {'w': 'slow', 'b': 'slow'},
    'head': {'w': 'fast'},
  }
  assert split(tree, ['.*/b']) == ({'a': {'b': 2}}, {'a': {'w': 1}, 'head': {'w': 3}})
  assert subtract(tree, {'a': {'w': 0}}) == {'a': {'b': 2}, 'head': {'w': 3}}
  with pytest.raises(UserError, match="no pattern covers the parameter 'head/w'"):
    mark(tree, [('a/.*', 1)])
  with pytest.raises(UserError, match="'b/w' matches no parameter"):
    split(tree, ['b/w'])


def test_costs_are_counted_exactly():
  """FLOPs of the matrix products by hand; bytes of every leaf; passes in units of the naive step."""
  model = mlp((20,), 6)
  x = Batch(jnp.ones((10, 8)), jnp.zeros(10, jnp.int32), jnp.ones(10), jnp.zeros(10, jnp.int32))
  learn = learner(model, optax.sgd(0.1, momentum=0.9), chain(er=er(50, 30)))
  state = learn.init(jax.random.key(0), x)
  rows = 40  # 10 of the stream and 30 of memory
  forward = 2 * rows * (8 * 20 + 20 * 6)
  backward = 2 * rows * (8 * 20 + 2 * 20 * 6)  # no gradient with respect to the inputs
  assert budget.flops(learn.step, state, x) == forward + backward
  assert budget.flops(
    lambda s, x: jax.lax.scan(lambda s, _: learn.step(s, x), s, None, length=7), state, x
  ) == 7 * (forward + backward)
  weights = 4 * (8 * 20 + 20 + 20 * 6 + 6)
  row = 8 * 4 + 4 + 4 + 4
  assert budget.state_bytes(state) == {
    'frozen': 0,
    'trainable': weights,
    'statistics': 0,
    'optimiser': weights,
    'method/er': 51 * row + 30 * row + 4,
    'loop': 12,
    'total': 2 * weights + 81 * row + 4 + 12,
  }
  make = lambda model: learner(  # noqa: E731
    model, optax.sgd(0.1, momentum=0.9), chain(er=er(50, 30))
  )
  assert budget.passes(make, model, state, x) == {
    'train_forward': 4.0,
    'train_backward': 4.0,
    'predict_forward': 1.0,
  }


def test_passes_are_in_units_of_training_the_whole_model(toy_stream):
  """LoRA on frozen layers, by hand; its own unit must not be the head alone, which is all that it trains."""
  model = mlp((8, 7), 6)
  batch = take(toy_stream, toy_stream.index[0, 0], 0)
  frozen, _ = split(model.init(jax.random.key(0), batch)[0], ['l[01]/.*'])
  make = lambda model: learner(model, optax.sgd(0.1), lora(1, 1.0, 'l./w'), frozen)  # noqa: E731
  found = budget.passes(make, model, make(model).init(jax.random.key(0), batch), batch)
  whole = 8 * 8 + 8 * 7 + 7 * 6
  low = (8 + 8) + (8 + 7)
  backward = 8 * 8 + 2 * (8 * 7 + 7 * 6)
  # Gradients: of the head and its input; of l1's input; of both factors, of what lies between them.
  own = 2 * 7 * 6 + 8 * 7 + 2 * low + 8 + 7 + 8
  assert found['train_forward'] == pytest.approx(1 + low / whole, abs=1e-3)
  assert found['train_backward'] <= own / backward + 0.05 and found['train_backward'] > 0.5
  cached = identity(6)
  features = batch._replace(x=jnp.ones((10, 3)))
  closed = lambda model: learner(model, optax.sgd(0.1), ncm(6))  # noqa: E731
  state = closed(cached).init(jax.random.key(0), features)
  assert set(budget.passes(closed, cached, state, features).values()) == {0.0}


def test_intervals_are_students():
  """Against tabled quantiles: t(0.975, 4) = 2.776 for five seeds."""
  mean, half = metrics.interval([1.0, 2.0, 3.0, 4.0, 5.0])
  assert mean == 3.0 and half == pytest.approx(2.776 * np.std([1, 2, 3, 4, 5], ddof=1) / np.sqrt(5))
  assert metrics.interval([0.5]) == (0.5, None)
  joint = metrics.summary([[0.5, 0.7]])
  assert joint['acc'] == pytest.approx(0.6) and joint['forgetting'] is None


@pytest.mark.parametrize('stride', [1, 2, 4])
def test_gradients_of_strided_convolutions_cost_what_their_forward_pass_does(stride):
  """Products with the zeros between the values of a gradient are not made."""
  x, w = jnp.ones((2, 8, 8, 4)), jnp.ones((stride, stride, 4, 6))

  def f(x):
    way = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(
      x, w, (stride, stride), 'VALID', dimension_numbers=way
    ).sum()

  assert budget.flops(f, x) == 2 * 2 * 8 * 8 * 4 * 6
  assert budget.flops(jax.grad(f), x) == budget.flops(f, x)


def test_what_no_output_needs_is_not_counted():
  x = jnp.ones((4, 4))
  product = 2 * 4**3

  def half(x):
    y = jnp.sin(x) @ x
    return x + 0 * (y @ y).size, y

  assert budget.flops(half, x) == product
  assert budget.flops(jax.jit(lambda x: half(x)[0]), x) == 0
  assert budget.flops(lambda x: jax.grad(lambda a: jnp.sum(a @ a))(x), x) == 2 * product
