"""Classifiers from statistics, and what goes with them, against the float64 references."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax.compose import chain
from cl_jax.learner import learner
from cl_jax.methods.closed_form.fecam import fecam
from cl_jax.methods.closed_form.ncm import ncm
from cl_jax.methods.closed_form.ranpac import ranpac
from cl_jax.methods.heads import slca as slca_module
from cl_jax.methods.heads.slca import slca
from cl_jax.methods.isolation.first_session import first_session
from cl_jax.methods.lowrank.lora import lora
from cl_jax.models.identity import identity
from tests.compiling import quick
from tests.parity.shared import Golden, batch_of, build, close, close_trees, from_host, stacked


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize('variant', ['per_class', 'weights', 'raw', 'pooled'])
def test_fecam(variant):
  g = Golden('fecam')
  numbers = (float(g[f'{variant}/{k}']) for k in ('tukey', 'g1', 'g2'))
  L = learner(identity(6), optax.sgd(0.0), fecam(6, *numbers, per_class=variant != 'pooled'))
  starts, probe = g['task_start'], batch_of(g['probe'], np.zeros(12))
  state = L.init(jax.random.key(0), probe)
  end = quick(L.boundary)
  for t in range(3):
    rows = slice(starts[t], starts[t + 1])
    state = end(state, stacked(g['x'][None, rows], g['y'][None, rows]))
    seen = 2 * t + 2
    m = state.method.moments
    close(m.mean[:seen], g[f'{variant}/means'][:seen])
    if variant != 'pooled':
      cov = m.scatter[:seen] / (m.count[:seen, None, None] - 1)
      close(cov, g[f'{variant}/covariances'][:seen])
      inverse = np.linalg.inv(g[f'{variant}/normalised'][t, :seen])
      close(state.method.precision[:seen], inverse)
    scores = np.asarray(L.predict(state, probe))
    close(scores[:, :seen], g[f'{variant}/logits'][t, :, :seen])
    assert np.array_equal(scores.argmax(1), g[f'{variant}/pred'][t])


@pytest.mark.parametrize('variant', ['one', 'chunks', 'symmetric'])
def test_slca(variant, monkeypatch):
  g = Golden('slca')
  numbers = {k: float(g[k]) for k in ('momentum', 'jitter')}
  chunks = int(g[f'{variant}/chunks'])
  method = slca(4, 8, float(g['lr_align']), logit_norm=float(g['tau']), chunks=chunks, **numbers)
  if variant == 'symmetric':
    root = slca_module.roots

    def symmetric(m, jitter):
      values, vectors = jnp.linalg.eigh(root(m, jitter) @ root(m, jitter).mT)
      return (vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None]) @ vectors.mT

    monkeypatch.setattr(slca_module, 'roots', symmetric)
  full = g.params('init')
  frozen = {k: full[k] for k in ('l0', 'l1')}
  L = build(g, method, 6, frozen=frozen)
  xs, ys = g['xs'], g['ys']
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0]))
  step, end = quick(L.step), quick(L.boundary)
  coming = list(g['normals'][0])  # every epoch asks for its own noise

  def given(key, mean, root, n):
    return mean[:, None] + from_host(coming) @ root.mT

  monkeypatch.setattr(slca_module, 'sample', given)
  for t in range(3):
    for i in range(xs.shape[1]):
      state, value = step(state, batch_of(xs[t, i], ys[t, i]))
      close(value, g[f'{variant}/loss'][t, i])
      close(state.params['head']['w'], g[f'{variant}/params/l2/w'][t, i])
    coming[:] = g['normals'][t]
    state = jax.block_until_ready(end(state, stacked(xs[t], ys[t])))
    assert not coming
    seen, m = 2 * t + 2, state.method
    close(m.mean[:seen], g['means'][:seen])
    close(m.scatter[:seen] / (m.count[:seen, None, None] - 1), g['covariances'][:seen])
    for leaf in 'wb':
      close(state.params['head'][leaf], g[f'{variant}/aligned/l2/{leaf}'][t, -1])
    probe = batch_of(g['probe'], np.zeros(len(g['probe'])))
    close(L.predict(state, probe), g[f'{variant}/probe_logits'][t])


@pytest.mark.parametrize('head', ['cosine', 'euclidean', 'merged', 'ranpac'])
@pytest.mark.parametrize('variant', ['lora', 'full'])
def test_first_session(variant, head):
  """Two epochs of adaptation in the first task, and statistics that count every example once.

  'merged' is the cosine in the features of the network before and after: APER.
  """
  g = Golden('first_session')
  full = g.params('init')
  lam = float(g['lambda'])
  merge, metric = head == 'merged', 'cosine' if head == 'merged' else head
  closed = ranpac(6, 10, lam, 'boundary') if head == 'ranpac' else ncm(6, metric, 'boundary')
  if head == 'ranpac':
    own = closed.init
    projection = jnp.asarray(g['W'])
    closed = closed._replace(
      init=lambda *a: ({}, own(*a)[1]._replace(projection=projection, lam=jnp.asarray(lam)))
    )
  parts, frozen, tx = {'only': first_session(merge), 'closed': closed}, None, None
  if variant == 'lora':
    adapters = lora(int(g['r']), float(g['alpha']), 'l[01]/w')
    start = {
      layer: {'w': {k.lower(): jnp.asarray(g[f'init/{layer}/{k}']) for k in 'AB'}}
      for layer in ('l0', 'l1')
    }
    parts = {'lora': adapters._replace(init=lambda *a: ({'lora': start}, ())), **parts}
    frozen = {k: full[k] for k in ('l0', 'l1')}
  else:
    decay = optax.add_decayed_weights(float(g['decay']))
    tx = optax.chain(decay, optax.sgd(float(g['lr']), momentum=float(g['momentum'])))
  L = build(g, chain(**parts), 6, tx=tx, frozen=frozen)
  xs, ys = g['xs'], g['ys']
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0]))
  step, end = quick(L.step), quick(L.boundary)
  for t in range(3):
    for i in range(2 * xs.shape[1]):
      k = i % xs.shape[1]
      state, value = step(state, batch_of(xs[t, k], ys[t, k]))
      close(value, g[f'{variant}/loss'][t, i])
      close(state.params['head']['w'], g[f'{variant}/params/l2/w'][t, i])
      if variant == 'full':
        close_trees(state.params, g.params('full/params', t, i))
      else:
        for layer in ('l0', 'l1'):
          for leaf in 'AB':
            ours = state.params['lora'][layer]['w'][leaf.lower()]
            close(ours, g[f'lora/params/{layer}/{leaf}'][t, i])
    state = end(state, stacked(xs[t], ys[t]))
    seen, s = 2 * t + 2, state.method['closed']
    scores = np.asarray(L.predict(state, batch_of(g['probe'], np.zeros(len(g['probe'])))))
    if head == 'ranpac':
      close(s.gram, g[f'{variant}/ranpac/G'][t])
      close(s.moment, g[f'{variant}/ranpac/C'][t])
      close(s.head, g[f'{variant}/ranpac/head'][t], rtol=1e-7)
      close(scores[:, :seen], g[f'{variant}/ranpac/logits'][t, :, :seen], rtol=1e-7)
      assert np.array_equal(scores.argmax(1), g[f'{variant}/ranpac/pred'][t])
      continue
    of = f'{variant}/{"merged" if merge else "ncm"}'
    close(s.count, g[f'{of}/counts'][t])
    close((s.total / s.count[:, None])[:seen], g[f'{of}/means'][t, :seen])
    cosine, distance = g[f'{of}/cosine'][t], g[f'{of}/sq_distance'][t]
    close(scores[:, :seen], (cosine if metric == 'cosine' else -0.5 * distance)[:, :seen])
    assert np.array_equal(scores.argmax(1), g[f'{of}/pred_{metric}'][t])
