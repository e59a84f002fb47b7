"""What low-rank methods promise: finished tasks' factors keep their bits, later ones have no effect."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax.errors import UserError
from cl_jax.learner import learner
from cl_jax.lowrank import merged
from cl_jax.masks import paths
from cl_jax.methods.lowrank.adapter import adapter
from cl_jax.methods.lowrank.ease import ease
from cl_jax.methods.lowrank.inflora import inflora
from cl_jax.methods.lowrank.lora import lora
from cl_jax.methods.lowrank.olora import olora
from cl_jax.methods.lowrank.sdlora import sdlora
from cl_jax.models import causal, clip
from cl_jax.models.decoder import decoder
from cl_jax.models.layers import layer_norm
from cl_jax.models.mlp import mlp
from cl_jax.models.vit import Config, vit
from cl_jax.streams.take import take
from cl_jax.types import Batch, no_tap
from tests.compiling import compiled, quick

pytestmark = pytest.mark.usefixtures('quickly')

MAKE = {
  'olora': lambda tasks: olora(tasks, 2, 3.0, targets='l./w'),
  'sdlora': lambda tasks: sdlora(tasks, 2, targets='l./w'),
  # The inputs have 8 and 16 directions: less energy than usual leaves some of them free.
  'inflora': lambda tasks: inflora(tasks, warm=2, rank=2, energy=0.6, targets='l./w'),
}
# LoRA has no slot of its own for a task.
ALL = {**MAKE, 'lora': lambda tasks: lora(2, 3.0, targets='l./w')}
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
  learn = learner(model, tx, ALL[name](stream.tasks), {k: params[k] for k in ('l0', 'l1')})
  state = quick(learn.init)(jax.random.key(1), batch)
  return state, quick(learn.step), quick(learn.boundary), learn


@pytest.mark.parametrize('name', ALL)
def test_merged_weights_compute_the_same(name, toy_stream):
  """After two tasks, to 1e-5; and training may go on above them, or, bit for bit, without them."""
  state, step, boundary, learn = start(toy_stream, name, optax.sgd(0.1))
  model, batch = mlp((16, 12), 6), take(toy_stream, toy_stream.index[0, 0], 0)
  params, _ = model.init(jax.random.key(0), batch)
  frozen = {k: params[k] for k in ('l0', 'l1')}
  for t in range(2):
    for i in range(6):
      state, _ = step(state, take(toy_stream, toy_stream.index[t, i], t))
    state = boundary(state, end_of(toy_stream, t))
  variables = {**frozen, **state.params}
  before, logits = jax.tree.map(np.array, variables), learn.predict(state, batch)
  plain = merged(ALL[name](toy_stream.tasks), state.method, variables)
  assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, params)
  got = model.apply(plain, batch, no_tap, False).logits
  np.testing.assert_allclose(got, logits, rtol=1e-5, atol=1e-5)
  assert jnp.abs(plain['l0']['w'] - frozen['l0']['w']).max() > 1e-3
  jax.tree.map(np.testing.assert_array_equal, variables, before)
  np.testing.assert_array_equal(learn.predict(state, batch), logits)


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
  """Nor has that of a task whose boundary was told and which has not begun."""
  state, step, boundary, learn = start(toy_stream, name, optax.sgd(0.05))
  for i in range(4):
    state, _ = step(state, take(toy_stream, toy_stream.index[0, i], 0))
  state = boundary(state, end_of(toy_stream, 0))
  wild = jax.tree.map(lambda a: a.at[1:].multiply(5.0), state.params[name])
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
    monkeypatch.setitem(ALL, 'olora', lambda n: olora(n, 2, 3.0, coef, targets='l./w'))
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


def test_inflora_reads_no_direction_of_earlier_tasks(toy_stream):
  """Its down projections are orthonormal and orthogonal to what is protected."""
  state, step, boundary, _ = start(toy_stream, 'inflora', optax.sgd(0.05))
  for t in range(2):
    old = state.method.old
    for i in range(4):
      state, _ = step(state, take(toy_stream, toy_stream.index[t, i], t))
      batch = toy_stream.x[toy_stream.index[t, : i + 1]].reshape(-1, 8)
      if i < 2:  # the first layer reads the inputs themselves
        np.testing.assert_allclose(state.method.moment['l0/w'], batch.T @ batch, rtol=1e-5)
        assert not state.params['inflora']['l0']['w']['b'][t].any()
    for layer in ('l0', 'l1'):
      own = state.params['inflora'][layer]['w']
      assert own['b'][t].any() and not own['a'][t + 1].any()
      np.testing.assert_allclose(own['a'][t].T @ own['a'][t], np.eye(2), atol=1e-5)
      np.testing.assert_allclose(old[f'{layer}/w'] @ own['a'][t], 0, atol=1e-5)
    state = boundary(state, end_of(toy_stream, t))
    for path, p in state.method.old.items():
      np.testing.assert_allclose(p @ p, p, atol=1e-5)
      assert 0 < np.trace(p) < len(p) and np.trace(p) >= np.trace(old[path]) - 1e-4


VIT = Config(2, 1, 2, 8, 2, 2, 12)


def images(stream, t, i):
  batch = take(stream, stream.index[t, i], t)
  return batch._replace(x=batch.x.reshape(-1, 2, 2, 2))


def test_inflora_measures_every_layer_of_a_stack_without_padding(toy_stream):
  batch = images(toy_stream, 0, 0)
  batch = batch._replace(w=batch.w.at[6:].set(0), x=batch.x.at[6:].set(jnp.nan))
  model = vit(VIT, 6, init=0.3)
  learn = learner(model, optax.sgd(0.1), inflora(2, warm=3, rank=2))
  state = learn.init(jax.random.key(0), batch)
  seen = {}

  def look(name, h, layer):
    seen.setdefault(name, h)
    return h

  real = Batch(*(a[:6] for a in batch))
  model.apply(state.params, real, look, False)
  norm = jax.tree.map(lambda a: a[0], state.params['backbone']['layers']['norm1'])
  x = layer_norm(norm, seen['embed'], VIT.eps).reshape(-1, 8)
  moment = quick(learn.step)(state, batch)[0].method.moment
  k, v = (moment[f'backbone/layers/{n}/w'] for n in 'kv')
  np.testing.assert_allclose(k[0], x.T @ x, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(k, v)
  assert k.shape == (2, 8, 8) and np.isfinite(k).all() and not np.allclose(k[0], k[1], rtol=0.1)


@pytest.mark.parametrize('parallel', [False, True])
def test_adapters_start_as_the_model_and_sit_at_every_layer(parallel, toy_stream):
  model, batch = vit(VIT, 6, init=0.3), images(toy_stream, 0, 0)
  params, _ = model.init(jax.random.key(0), batch)
  frozen = {'backbone': params['backbone']}
  learn = learner(model, optax.sgd(0.5), adapter(3, parallel=parallel, scale=0.5), frozen)
  state = learn.init(jax.random.key(1), batch)
  plain = model.apply({**frozen, **state.params}, batch, no_tap, False)
  np.testing.assert_array_equal(learn.predict(state, batch), plain.logits)
  own = state.params['adapter']
  assert set(own) == ({'feedforward'} if parallel else {'attention', 'feedforward'})
  moved, _ = quick(learn.step)(state, batch)
  for place in own:
    up = moved.params['adapter'][place]['up']['w']
    assert up.shape == (2, 3, 8) and up[0].any() and up[1].any()


LLAMA = causal.Config(30, 8, 2, 2, 1, 12, 12)
TOKENS = np.random.default_rng(0).integers(0, 30, (4, 5)).astype(np.int32)
SEEN = np.ones(TOKENS.shape, bool)
ROWS = Batch(None, np.arange(4, dtype=np.int32), np.ones(4, np.float32), np.zeros(4, np.int32))
OTHERS = {
  'decoder': (decoder(LLAMA, 6, init=0.3), {'tokens': TOKENS, 'mask': SEEN}),
  'clip': (
    clip.clip(clip.Config(2, 1, 2, 8, 2, 2, 12, projection=5), 6, init=0.3, mean=0.0, std=1.0),
    np.random.default_rng(1).normal(size=(4, 2, 2, 2)).astype(np.float32),
  ),
}


@pytest.mark.parametrize('name', OTHERS)
def test_adapters_in_decoders_and_clip(name):
  """They start as the model, and one step moves those of every layer; EASE traces there."""
  model, x = OTHERS[name]
  batch = ROWS._replace(x=x)
  params, _ = quick(model.init)(jax.random.key(0), batch)
  frozen = {'backbone': params['backbone']}
  learn = compiled(learner(model, optax.sgd(0.5), adapter(3), frozen))
  state = learn.init(jax.random.key(1), batch)
  plain = quick(model.apply, static_argnums=(2, 3))(
    {**frozen, **state.params}, batch, no_tap, False
  )
  np.testing.assert_array_equal(learn.predict(state, batch), plain.logits)
  moved, _ = learn.step(state, batch)
  for place in ('attention', 'feedforward'):
    assert moved.params['adapter'][place]['up']['w'].any((1, 2)).tolist() == [True, True]
  every = learner(model, optax.sgd(0.5), ease(6, 3, 3), frozen)
  begun = jax.eval_shape(every.init, jax.random.key(1), batch)
  begun = jax.eval_shape(every.boundary, begun, jax.tree.map(lambda a: a[None], batch))
  assert jax.eval_shape(every.predict, begun, batch).shape == (4, 6)


def test_olora_without_its_penalty_is_a_lora_per_stage_that_is_merged():
  """On a language model: a stage trains as a LoRA of its own does above the merger of all earlier ones."""
  model, targets = decoder(LLAMA, 6, output='tokens', init=0.3), 'backbone/layers/(q|v)/w'
  drawn = np.random.default_rng(3).integers(0, 30, (2, 3, 4, 5)).astype(np.int32)  # stage, step
  text = lambda t, i: ROWS._replace(x={'tokens': drawn[t, i], 'mask': SEEN, 'learn': SEEN})  # noqa: E731
  frozen, _ = quick(model.init)(jax.random.key(0), text(0, 0))
  tx, method = optax.sgd(0.5, momentum=0.9), olora(3, 2, 4.0, coef=0.0, targets=targets)
  learn = compiled(learner(model, tx, method, frozen))
  state = learn.init(jax.random.key(1), text(0, 0))
  for i in range(3):
    state, _ = learn.step(state, text(0, i))
  state = learn.boundary(state, jax.tree.map(lambda a: a[None], text(0, 0)))
  first = paths(state.params['olora'])
  assert all(a[0].any() for a in first.values())

  base = quick(partial(merged, method, state.method))({**frozen, **state.params})
  for n in 'kqv':
    change = base['backbone']['layers'][n]['w'] - frozen['backbone']['layers'][n]['w']
    assert (jnp.abs(change).max() > 1e-3) == (n != 'k')
  alone = lora(2, 4.0, targets)
  begun = jax.tree.map(lambda a: a[1], state.params['olora'])
  alone = compiled(learner(model, tx, alone._replace(init=lambda *_: ({'lora': begun}, ())), base))
  other = alone.init(jax.random.key(1), text(1, 0))
  for i in range(3):
    state, loss = learn.step(state, text(1, i))
    other, same = alone.step(other, text(1, i))
    np.testing.assert_allclose(loss, same, rtol=1e-5)
  for path, a in paths(state.params['olora']).items():
    np.testing.assert_allclose(a[1], paths(other.params['lora'])[path], rtol=1e-4, atol=1e-5)
    assert not np.allclose(a[1], first[path][1], atol=1e-3), path
    np.testing.assert_array_equal(a[0], first[path][0])
    np.testing.assert_array_equal(a[2], first[path][2])


def test_ease_refuses_a_language_model():
  batch = ROWS._replace(x={'tokens': TOKENS, 'mask': SEEN, 'learn': SEEN})
  learn = learner(decoder(LLAMA, 6, output='tokens'), optax.sgd(0.5), ease(6, 3))
  with pytest.raises(UserError, match=r'logits .* \(4, 5, 30\): take a classifier') as caught:
    jax.eval_shape(learn.init, jax.random.key(1), batch)
  assert '\n' not in str(caught.value)


def test_ease_keeps_adapters_and_means_of_features(toy_stream):
  model = vit(VIT, 6, init=0.3)
  params, _ = quick(model.init)(jax.random.key(0), images(toy_stream, 0, 0))
  frozen = {'backbone': params['backbone']}
  tx = optax.adamw(0.01, weight_decay=0.1)
  learn = compiled(learner(model, tx, ease(6, 3, 3, scale=1.0), frozen))
  state = learn.init(jax.random.key(1), images(toy_stream, 0, 0))
  step, boundary = learn.step, learn.boundary
  for t in range(2):
    before = paths(state.params['ease'])
    for i in range(4):
      state, _ = step(state, images(toy_stream, t, i))
    for path, now in paths(state.params['ease']).items():
      assert [not np.array_equal(now[i], before[path][i]) for i in range(3)] == [
        i == t for i in range(3)
      ], path
    ends = end_of(toy_stream, t)
    state = boundary(state, ends._replace(x=ends.x.reshape(*ends.y.shape, 2, 2, 2)))
  mean, count = state.method.mean, state.method.count
  assert state.method.own.tolist() == [0, 0, 1, 1, -1, -1]
  assert (count > 0).tolist() == [
    [True] * 4 + [False] * 2,
    [False] * 2 + [True] * 2 + [False] * 2,
    [False] * 6,
  ]
  # Old classes under the new adapter lie between its own classes' means.
  share = [np.linalg.lstsq(np.stack([mean[1, 2], mean[1, 3]], 1), mean[1, c])[0] for c in (0, 1)]
  for s in share:
    assert s.sum() == pytest.approx(1, abs=1e-4) and (s > 0).all()
  logits = learn.predict(state, images(toy_stream, 1, 0))
  assert (logits[:, 4:] < -1e8).all() and np.isfinite(logits).all()


@pytest.mark.parametrize('make', [adapter, lambda: ease(6, 3)])
def test_adapters_need_a_transformer(make, toy_stream):
  batch = take(toy_stream, toy_stream.index[0, 0], 0)
  with pytest.raises(UserError, match='needs the taps .* of a transformer') as caught:
    learner(mlp((16, 12), 6), optax.sgd(0.1), make()).init(jax.random.key(0), batch)
  assert 'l0, l1' in str(caught.value)
