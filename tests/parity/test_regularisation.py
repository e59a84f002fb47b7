"""Methods with a penalty, and merging, against values computed independently (see reference/README.md)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax.compose import chain
from cl_jax.masks import paths
from cl_jax.methods.regularisation.ewcpp import ewcpp
from cl_jax.methods.regularisation.imm import imm
from cl_jax.methods.regularisation.l2 import l2
from cl_jax.methods.regularisation.mas import mas
from cl_jax.methods.regularisation.rwalk import rwalk
from cl_jax.methods.regularisation.si import si
from tests.compiling import quick
from tests.parity.shared import Golden, batch_of, build, close, close_trees, stacked


@pytest.fixture(autouse=True)
def double():
  with jax.enable_x64(True):
    yield


def states(golden, method, variant, tx=None):
  """Compares parameters, losses and predictions throughout; yields (task, step or 'end', state)."""
  L = build(golden, method, tx=tx)
  step, end = quick(L.step), quick(L.boundary)
  xs, ys = golden['xs'], golden['ys']
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0]))
  for t in range(len(xs)):
    for i in range(len(xs[t])):
      state, value = step(state, batch_of(xs[t, i], ys[t, i]))
      close(value, golden[f'{variant}/loss'][t, i])
      close_trees(state.params, golden.params(f'{variant}/params', t, i))
      yield t, i, state
    state = end(state, stacked(xs[t], ys[t]))
    probe = batch_of(golden['probe'], np.zeros(len(golden['probe'])))
    close(L.predict(state, probe), golden[f'{variant}/probe_logits'][t])
    yield t, 'end', state


@pytest.mark.parametrize('variant', ['task', 'total', 'unclipped', 'momentum'])
def test_si_runs(variant):
  g = Golden('si')
  path = 'total' if variant == 'total' else 'task'
  method = si(float(g['c']), float(g['xi']), path, variant != 'unclipped')
  tx = optax.sgd(float(g['lr']), momentum=float(g['momentum'])) if variant == 'momentum' else None
  for t, i, state in states(g, method, variant, tx):
    if i == 'end':
      close_trees(state.method.importance, g.params(f'{variant}/importance', t))
    else:
      close_trees(state.method.path, g.params(f'{variant}/omega', t, i))


@pytest.mark.parametrize('form', ['dense', 'rows'])
def test_mas_runs(form, monkeypatch):
  monkeypatch.setattr('cl_jax.fisher.is_dense', lambda *a: form == 'dense')
  g = Golden('mas')
  for t, i, state in states(g, mas(float(g['lam'])), 'sum'):
    if i == 'end':
      close_trees(state.method.importance, g.params('sum/importance', t))


def test_l2_runs():
  g = Golden('l2')
  assert sum(1 for _ in states(g, l2(float(g['coef'])), 'l2')) == 18


@pytest.mark.parametrize('variant', ['paper', 'code'])
def test_rwalk_runs(variant):
  g = Golden('rwalk')
  names = ('lam', 'alpha', 'every', 'xi')
  lam, alpha, every, xi = (g[n].item() for n in names)
  for t, i, state in states(g, rwalk(lam, alpha, every, xi, variant == 'code'), variant):
    if i == 'end':
      both = jax.tree.map(
        jnp.add, g.params(f'{variant}/fisher', t), g.params(f'{variant}/score', t)
      )
      close_trees(state.method.importance, both)
      close_trees(state.method.fisher, g.params(f'{variant}/running_fisher', t))


def test_ewcpp_runs():
  g = Golden('rwalk')
  lam, alpha, every = (g[n].item() for n in ('lam', 'alpha', 'every'))
  for t, i, state in states(g, ewcpp(lam, alpha, every), 'ewcpp'):
    if i == 'end':
      close_trees(state.method.importance, g.params('ewcpp/fisher', t))
      close_trees(state.method.fisher, g.params('ewcpp/running_fisher', t))


@pytest.mark.parametrize('mode', ['mean', 'mode'])
def test_imm_runs(mode):
  g = Golden('imm')
  own = imm(mode, 'empirical', float(g['eps']))
  method = chain(l2=l2(float(g['coef'])), imm=own)
  for t, i, state in states(g, method, mode):
    if i == 'end':
      s = state.method['imm']
      total = s.total if mode == 'mode' else dict.fromkeys(s.weighted, s.tasks)
      merged = {p: a / total[p] for p, a in s.weighted.items()}
      theirs = paths(g.params(f'{mode}/merged', t))
      assert set(theirs) - set(merged) == {'head/w', 'head/b'}
      for path, ours in merged.items():
        close(ours, theirs[path])
