"""What low-rank methods promise: finished tasks' factors keep their bits, later ones have no effect."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax.learner import learner
from cl_jax.masks import paths
from cl_jax.methods.lowrank.olora import olora
from cl_jax.methods.lowrank.sdlora import sdlora
from cl_jax.models.mlp import mlp
from cl_jax.streams.take import take
from cl_jax.types import no_tap

MAKE = {
  'olora': lambda tasks: olora(tasks, 2, 3.0, targets='l./w'),
  'sdlora': lambda tasks: sdlora(tasks, 2, targets='l./w'),
}
OPTIMISERS = {
  'momentum': lambda: optax.chain(
    optax.add_decayed_weights(0.1), optax.sgd(0.05, momentum=0.9, nesterov=True)
  ),
  'adamw': lambda: optax.adamw(0.01, weight_decay=0.1),
}


def start(stream, name, tx):
  """A learner on a frozen network, its first state and its compiled functions."""
  model, batch = mlp((16, 12), 6), take(stream, stream.index[0, 0], 0)
  params, _ = model.init(jax.random.key(0), batch)
  learn = learner(model, tx, MAKE[name](stream.tasks), {k: params[k] for k in ('l0', 'l1')})
  return learn.init(jax.random.key(1), batch), jax.jit(learn.step), jax.jit(learn.boundary), learn


def end_of(stream, t):
  return jax.vmap(lambda rows: take(stream, rows, t))(stream.ends[t])


@pytest.mark.parametrize('name', MAKE)
@pytest.mark.parametrize('optimiser', OPTIMISERS)
def test_only_the_task_at_hand_moves_its_factors(name, optimiser, toy_stream):
  """Bit for bit, whatever momentum, Adam and decay still hold; the magnitudes of sdlora go on learning."""
  state, step, boundary, _ = start(toy_stream, name, OPTIMISERS[optimiser]())
  for t in range(3):
    before = paths(state.params[name])
    for i in range(6):
      state, _ = step(state, take(toy_stream, toy_stream.index[t, i], t))
    for path, now in paths(state.params[name]).items():
      moved = {i for i in range(3) if not np.array_equal(now[i], before[path][i])}
      assert moved == (set(range(t + 1)) if path.endswith('/m') else {t}), path
    state = boundary(state, end_of(toy_stream, t))
  after, _ = step(state, take(toy_stream, toy_stream.index[0, 0], 0))  # no slot is left
  for path, now in paths(after.params[name]).items():
    assert path.endswith('/m') or np.array_equal(now, paths(state.params[name])[path]), path


@pytest.mark.parametrize('name', MAKE)
def test_later_slots_have_no_effect(name, toy_stream):
  state, step, boundary, learn = start(toy_stream, name, optax.sgd(0.05))
  for i in range(4):
    state, _ = step(state, take(toy_stream, toy_stream.index[0, i], 0))
  state = boundary(state, end_of(toy_stream, 0))
  wild = jax.tree.map(lambda a: a.at[2:].multiply(5.0), state.params[name])
  batch = take(toy_stream, toy_stream.index[1, 0], 1)
  other = state._replace(params={**state.params, name: wild})
  np.testing.assert_array_equal(learn.predict(state, batch), learn.predict(other, batch))


def test_olora_starts_as_the_model(toy_stream):
  state, _, _, learn = start(toy_stream, 'olora', optax.sgd(0.05))
  batch = take(toy_stream, toy_stream.index[0, 0], 0)
  params, _ = mlp((16, 12), 6).init(jax.random.key(0), batch)
  plain = mlp((16, 12), 6).apply({**params, 'head': state.params['head']}, batch, no_tap, False)
  np.testing.assert_array_equal(learn.predict(state, batch), plain.logits)


def test_the_penalty_of_olora_makes_tasks_orthogonal(toy_stream, monkeypatch):
  """And not training as such: without the penalty the same steps leave them as they were or closer."""

  def overlap(coef, steps):
    monkeypatch.setitem(MAKE, 'olora', lambda n: olora(n, 2, 3.0, coef, targets='l./w'))
    state, step, boundary, _ = start(toy_stream, 'olora', optax.sgd(0.05))
    state = boundary(state, end_of(toy_stream, 0))
    for i in range(steps):
      state, _ = step(state, take(toy_stream, toy_stream.index[1, i], 1))
    factors = [state.params['olora'][layer]['w']['a'] for layer in ('l0', 'l1')]
    return np.array([jnp.abs(a[0].T @ a[1]).sum() for a in factors])

  first = overlap(0.5, 0)
  assert (overlap(0.0, 30) > 0.9 * first).all()
  assert (overlap(0.5, 30) < 0.2 * first).all()


def test_growth_is_a_slot_per_task(toy_stream):
  batch = take(toy_stream, toy_stream.index[0, 0], 0)
  for name, make in MAKE.items():

    def size(tasks, make=make):
      state = learner(mlp((16, 12), 6), optax.sgd(0.1), make(tasks)).init(jax.random.key(0), batch)
      return sum(a.nbytes for a in jax.tree.leaves(state.params))

    slot = 4 * (2 * (8 + 16) + 2 * (16 + 12) + (2 if name == 'sdlora' else 0))
    assert [b - a for a, b in itertools.pairwise(map(size, (1, 2, 3)))] == [slot, slot], name
