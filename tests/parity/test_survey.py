"""Methods that the survey compares, against values computed independently (see reference/README.md)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax.compose import chain
from cl_jax.learner import learner
from cl_jax.methods.heads.task_head import task_head
from cl_jax.methods.isolation.pnn import pnn
from cl_jax.methods.regularisation.ebll import ebll
from cl_jax.methods.replay.dreamnet import dreamnet
from cl_jax.methods.replay.rehearsal import rehearsal
from cl_jax.models.mlp import mlp
from tests.compiling import quick
from tests.parity.shared import OURS, Golden, batch_of, build, close, close_trees, fixed, stacked

HEADS = ((0, 1), (2, 3), (4, 5))


@pytest.fixture(autouse=True)
def double():
  with jax.enable_x64(True):
    yield


def test_ebll_runs(monkeypatch):
  """Network, losses, and the encoder of every task but the last, whose own is never needed."""
  g = Golden('ebll')
  starts = []
  monkeypatch.setattr('cl_jax.methods.regularisation.ebll.autoencoder', lambda *a: starts.pop(0))
  method = ebll(
    3, float(g['lam']), float(g['beta']), g['auto/E'].shape[-1], float(g['alpha']), int(g['epochs']),
    float(g['lr_a']), float(g['T']), 'heads', HEADS,
  )  # fmt: skip
  L = build(g, chain(ebll=method, head=task_head(HEADS, 6)), 6)
  xs, ys = g['xs'], g['ys']
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0], 0))
  step = quick(L.step)
  for t in range(3):
    for i in range(xs.shape[1]):
      state, value = step(state, batch_of(xs[t, i], ys[t, i], t))
      close(value, g['ebll/loss'][t, i])
      close_trees(state.params, g.params('ebll/params', t, i))
    auto = {n: jnp.asarray(g[f'auto/{n}'][t]) for n in 'EeDd'}
    starts.append(
      {'encoder': {'w': auto['E'], 'b': auto['e']}, 'decoder': {'w': auto['D'], 'b': auto['d']}}
    )
    state = L.boundary(state, stacked(xs[t], ys[t], t))
    close(L.predict(state, batch_of(g['probe'], np.zeros(12))), g['ebll/probe_logits'][t])
    kept = state.method['ebll'].encoders
    for k in range(min(t + 1, 2)):
      close(kept['w'][k], g['ebll/auto/E'][k])
      close(kept['b'][k], g['ebll/auto/e'][k])


def columns(g, prefix, *where):
  """The reference's columns as our parameters; the first one's output layer has all six classes."""
  found = {}
  for k in range(3):
    at = lambda name, k=k: jnp.asarray(g[f'{prefix}/{k}/{name}'][where])  # noqa: E731
    found[k] = {ours: {p: at(f'{theirs}/{p}') for p in 'wb'} for theirs, ours in OURS.items()}
    if k:
      for name, layer in (('u1', 'l1'), ('u2', 'head')):
        found[k][layer]['u'] = jnp.stack([at(f'{name}/{j}') for j in range(k)])
  return found


def test_pnn_runs():
  """Weights of all columns after every step, those of other tasks unmoved."""
  g = Golden('pnn')
  start = columns(g, 'init')
  wide = {'w': jnp.zeros((7, 6)), 'b': jnp.zeros(6)}
  first = {**start[0], 'head': {n: a.at[..., :2].set(start[0]['head'][n]) for n, a in wide.items()}}
  model = fixed(mlp((8, 7), 6), first)
  method = pnn(3, HEADS, wires=model.wires)
  tied = method._replace(
    init=lambda *a: ({'pnn': {f'column{k}': start[k] for k in (1, 2)}}, method.init(*a)[1])
  )
  L = learner(model, optax.sgd(float(g['lr'])), chain(pnn=tied, head=task_head(HEADS, 6)))
  xs, ys = g['xs'], g['ys']
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0], 0))
  step = quick(L.step)
  for t in range(3):
    for i in range(xs.shape[1]):
      state, value = step(state, batch_of(xs[t, i], ys[t, i], t))
      close(value, g['pnn/loss'][t, i])
      theirs = columns(g, 'pnn/params', t, i)
      for k in (1, 2):
        close_trees(state.params['pnn'][f'column{k}'], theirs[k])
      own = {n: a[..., :2] for n, a in state.params['head'].items()}
      close_trees({**state.params, 'head': own}, theirs[0])
    state = L.boundary(state, stacked(xs[t], ys[t], t))
    close(L.predict(state, batch_of(g['probe'], np.zeros(12))), g['pnn/probe_logits'][t])


def test_dreamnet_runs():
  """Network, decoder and losses, from the reference's noise."""
  g = Golden('dreamnet')
  R, noise = int(g['R']), g['dreamnet/noise']
  theirs = lambda prefix, *where: {  # noqa: E731
    f'd{i}': {p: jnp.asarray(g[f'{prefix}/l{i}/{p}'][where]) for p in 'wb'} for i in range(2)
  }
  method = dreamnet(R * noise.shape[2], R, float(g['coef']), float(g['rho']), (5,))

  def init(key, params, batch, fwd):
    _, s = method.init(key, params, batch, fwd)
    return {'decoder': theirs('dec')}, s

  L = build(g, method._replace(init=init))
  xs, ys = g['xs'], g['ys']
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0]))
  step = quick(L.step)
  for t in range(len(xs)):
    for i in range(xs.shape[1]):
      state = state._replace(method=state.method._replace(noise=jnp.asarray(noise[t, i])))
      state, value = step(state, batch_of(xs[t, i], ys[t, i]))
      close(value, g['dreamnet/loss'][t, i])
      close_trees(state.params, g.params('dreamnet/params', t, i))
      close_trees(state.params['decoder'], theirs('dreamnet/dec', t, i))
    state = L.boundary(state, stacked(xs[t], ys[t]))
    close(L.predict(state, batch_of(g['probe'], np.zeros(12))), g['dreamnet/probe_logits'][t])


@pytest.mark.parametrize(('variant', 'share'), [('pm', 'partial'), ('fm', 'full')])
def test_rehearsal_runs(variant, share):
  """Parameters, losses, and which row lies in which place of which task's ring."""
  g = Golden('rehearsal')
  K = int(g['K'])
  L = build(g, rehearsal(3, K, int(g['D']), share, float(g['coef'])))
  xs, ys = g['xs'], g['ys']
  flat = xs.reshape(-1, xs.shape[-1])
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0]))
  step = quick(L.step)
  for t in range(3):
    for i in range(xs.shape[1]):
      x, y, w = (g[f'{variant}/draw_{n}'][t, i] for n in ('x', 'y', 'weight'))
      memory, aux = jax.tree.map(np.asarray, (state.method.rows.x, state.method.aux))
      held = {
        tuple(row)
        for row, owner, filled in zip(memory, aux.owner, aux.filled, strict=False)
        if filled and owner < t
      }
      ours = state.method.draw
      assert {tuple(row) for row in np.asarray(ours.x)[np.asarray(ours.w) > 0]} <= held
      assert (np.asarray(ours.w) > 0).sum() == min(len(held), int(g['D']))
      rows = batch_of(x, np.maximum(y, 0))._replace(w=jnp.asarray(w, jnp.float64))
      state = state._replace(method=state.method._replace(draw=rows))
      state, value = step(state, batch_of(xs[t, i], ys[t, i]))
      close(value, g[f'{variant}/loss'][t, i])
      close_trees(state.params, g.params(f'{variant}/params', t, i))
      memory, aux = jax.tree.map(np.asarray, (state.method.rows.x, state.method.aux))
      stream = g[f'{variant}/memory_stream'][t, i]
      for task in range(3):
        place = {
          int(p): n for n, p in enumerate(aux.position) if aux.filled[n] and aux.owner[n] == task
        }
        assert sorted(place) == list(np.flatnonzero(stream[task] >= 0))
        for p, n in place.items():
          close(memory[n], flat[stream[task, p]])
    state = L.boundary(state, stacked(xs[t], ys[t]))
    close(L.predict(state, batch_of(g['probe'], np.zeros(12))), g[f'{variant}/probe_logits'][t])
