"""Memories of hidden activations against values computed independently (see reference/README.md)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax import quantise
from cl_jax.methods.heads.cwr import cwr
from cl_jax.methods.replay.latent import latent
from cl_jax.methods.replay.remind import remind
from cl_jax.models import layers
from tests.compiling import quick
from tests.parity.shared import (
  Golden,
  batch_of,
  build,
  close,
  close_trees,
  drawn,
  from_host,
  stacked,
)

pytestmark = pytest.mark.usefixtures('quickly')


@pytest.fixture(autouse=True)
def double():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize('variant', ['plain', 'few', 'short'])
def test_latent_runs(variant, monkeypatch):
  """Parameters, losses and the memory, from the reference's permutations and draws."""
  g = Golden('latent')
  K, D = int(g[f'{variant}/K']), int(g['D'])
  L = build(g, latent('l0', K, D))
  xs, ys = g['xs'], g['ys']
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0]))
  coming = []
  monkeypatch.setattr(jax.random, 'permutation', lambda key, n: coming.pop(0))
  step, predict = quick(L.step), quick(L.predict)

  @quick
  def end(state, batches, *order):
    coming[:] = order
    return L.boundary(state, batches)

  for t in range(3):
    for i in range(xs.shape[1]):
      slots = g[f'{variant}/draw_slots'][t, i]
      assert (np.asarray(state.method.draw.w) > 0).sum() == (slots >= 0).sum()
      state = state._replace(method=state.method._replace(draw=drawn(state.method.rows, slots)))
      state, value = step(state, batch_of(xs[t, i], ys[t, i]))
      close(value, g[f'{variant}/loss'][t, i])
      close_trees(state.params, g.params(f'{variant}/params', t, i))
    order = [jnp.asarray(g[f'{variant}/{n}_perm'][t]) for n in ('examples', 'slots')]
    state = end(state, stacked(xs[t], ys[t]), *order)
    rows = jax.tree.map(lambda a: np.asarray(a)[:K], state.method.rows)
    filled = g[f'{variant}/memory_filled'][t] > 0
    np.testing.assert_array_equal(rows.w > 0, filled)
    close(rows.x[filled], g[f'{variant}/memory_h0'][t][filled])
    np.testing.assert_array_equal(rows.y[filled], g[f'{variant}/memory_y'][t][filled])
    close(predict(state, batch_of(g['probe'], np.zeros(12))), g[f'{variant}/probe_logits'][t])


@pytest.mark.parametrize('variant', ['full', 'room'])
def test_remind_runs(variant, monkeypatch):
  """Codewords, parameters, losses and the memory, from the reference's picks, draws and numbers."""
  g = Golden('remind')
  K, D = int(g[f'{variant}/K']), int(g['D'])
  L = build(g, remind('l0', 4, K, D, 2, 4, int(g['iterations'])))
  xs, ys, flat_y = g['xs'], g['ys'], g['ys'].reshape(-1)
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0]))
  monkeypatch.setattr('cl_jax.quantise.starts', lambda *a: jnp.asarray(g['picks']))
  coming, stored, real = [], list(g['u'][0]), jax.random.uniform
  monkeypatch.setattr(
    jax.random, 'uniform', lambda *a, **k: coming.pop(0)() if coming else real(*a, **k)
  )

  @quick
  def step(state, batch, u):
    coming[:] = [lambda: u]
    return L.step(state, batch)

  @quick
  def end(state, batches):
    coming[:] = [
      lambda: from_host(stored)
    ]  # one place in a loop over the batches of the first task
    return L.boundary(state, batches)

  predict = quick(L.predict)

  def holds(codes, y, stream):
    rows = jax.tree.map(lambda a: np.asarray(a)[:K], state.method.memory.rows)
    there = stream >= 0
    np.testing.assert_array_equal(rows.w > 0, there)
    np.testing.assert_array_equal(rows.x[there], codes[there])
    np.testing.assert_array_equal(rows.y[there], flat_y[stream[there]])
    np.testing.assert_array_equal(rows.y[there], y[there])

  for t in range(3):
    for i in range(xs.shape[1]):
      slots = g[f'{variant}/draw_slots'][t, i]
      held = state.method.memory
      assert (np.asarray(held.draw.w) > 0).sum() == (slots >= 0).sum()
      held = held._replace(draw=drawn(held.rows, slots))
      state = state._replace(method=state.method._replace(memory=held))
      state, value = step(state, batch_of(xs[t, i], ys[t, i]), jnp.asarray(g['u'][t, i]))
      close(value, g[f'{variant}/loss'][t, i])
      close_trees(state.params, g.params(f'{variant}/params', t, i))
      if t:
        holds(*(g[f'{variant}/memory_{n}'][t, i] for n in ('codes', 'y', 'stream')))
    state = jax.block_until_ready(end(state, stacked(xs[t], ys[t])))
    assert not coming and not stored
    if t == 0:
      close(state.method.books, g[f'{variant}/codewords'])
      holds(*(g[f'{variant}/first_{n}'] for n in ('codes', 'y', 'stream')))
    close(predict(state, batch_of(g['probe'], np.zeros(12))), g[f'{variant}/probe_logits'][t])


def test_quantise_is_lloyds_algorithm(monkeypatch):
  """Codewords after every round, with a tie and with a codeword that no point is near."""
  g = Golden('remind')
  x = jnp.asarray(g['quantiser/points'])
  monkeypatch.setattr(quantise, 'starts', lambda *a: jnp.asarray(g['quantiser/picks']))
  for n, theirs in enumerate(g['quantiser/codewords']):
    books = quantise.fit(jax.random.key(0), x, jnp.ones(len(x)), 2, 4, n + 1)
    close(books, theirs)
  np.testing.assert_array_equal(quantise.encode(books, x), g['quantiser/codes'])
  near = quantise.decode(books, quantise.encode(books, x))
  apart = lambda a, b: np.square(a - b).reshape(len(x), 2, 4).sum(-1)  # noqa: E731
  assert (apart(near, x) <= apart(np.roll(near, 1, 0), x) + 1e-12).all()


def test_cwr_runs():
  """Parameters in and after every task; the consolidated weights."""
  g = Golden('cwr')
  L = build(g, cwr())
  xs, ys = g['xs'], g['ys']
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0]))
  step, end, predict = quick(L.step), quick(L.boundary), quick(L.predict)
  for t in range(3):
    for i in range(xs.shape[1]):
      state, value = step(state, batch_of(xs[t, i], ys[t, i]))
      close(value, g['cwr/loss'][t, i])
      close_trees(state.params, g.params('cwr/params', t, i))
    state = end(state, stacked(xs[t], ys[t]))
    close(state.method.consolidated, g['cwr/cw'][t])
    close(state.method.past, g['cwr/past'][t])
    close_trees(state.params, g.params('cwr/after', t))
    close(predict(state, batch_of(g['probe'], np.zeros(12))), g['cwr/probe_logits'][t])


@pytest.mark.parametrize('variant', ['plain', 'weighted'])
def test_batch_renormalisation(variant):
  """Outputs, gradients and running statistics of four calls, and inference after each."""
  g = Golden('renorm')
  at = lambda name: jnp.asarray(g[name])  # noqa: E731
  p = {n: at(n) for n in ('scale', 'bias', 'mean', 'var')}
  bounds = (float(g['rmax']), float(g['dmax']))
  how = {'momentum': float(g['momentum']), 'eps': float(g['eps'])}
  for i in range(4):
    x, w, weight = (at(f'{variant}/{n}')[i] for n in ('x', 'weight', 'g'))

    def total(x, scale, bias, p=p, w=w, weight=weight):
      own = {**p, 'scale': scale, 'bias': bias}
      y, stats = layers.batch_norm(own, x, w, True, **how, renorm=bounds)
      return jnp.sum(y * weight), (y, stats)

    grads, (y, stats) = jax.grad(total, (0, 1, 2), has_aux=True)(x, p['scale'], p['bias'])
    close(y, g[f'{variant}/y'][i])
    for ours, name in zip(grads, ('grad_x', 'grad_scale', 'grad_bias'), strict=True):
      close(ours, g[f'{variant}/{name}'][i])
    for name in ('mean', 'var'):
      close(stats[name], g[f'{variant}/{name}'][i])
    p = {**p, **stats}
    out, _ = layers.batch_norm(p, at('probe'), jnp.ones(3), False, **how, renorm=bounds)
    close(out, g[f'{variant}/inference'][i])
