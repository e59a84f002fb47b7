"""Knowledge editing against independent float64 computations (see tests/parity/reference/editing.py).

Attention scores, rotations and activations of the model are f32 whatever the weights are, hence 1e-5.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax.editing import memit, restore, rome, target, tracing, write
from cl_jax.editing.alphaedit import alphaedit, null_space
from cl_jax.editing.pmet import pmet
from cl_jax.editing.rows import take
from cl_jax.editing.target import Recipe, optimise
from tests.compiling import quick
from tests.parity.edited import close, log_softmax

pytestmark = pytest.mark.usefixtures('quickly', 'x64')

SITES = {'block': ('block',), 'feedforward': ('feedforward',), 'both': ('attention', 'feedforward')}


def test_reading(case):
  """Keys, MLP outputs and states at the subject's last token; what the network says."""
  close(case.answers(case.p), log_softmax(case.g['answers']))
  for layer in range(case.config.depth):
    found = memit.read_all(case.config, case.p, case.requests.rewrite, layer, 3)
    close(found.key, case.g['key'][layer])
    close(found.value, case.g['feedforward'][layer])
    close(found.state, case.g['block'][3])
    close(found.feedforward, case.g['feedforward'][3])


@pytest.mark.parametrize('site', SITES)
def test_optimise(case, site, monkeypatch):
  """The whole minimisation: clamps, the end of each request, no step in the last iteration."""
  monkeypatch.setattr(target, '_group', quick(target._group, static_argnums=(0, 2, 3, 4)))
  g, steps = case.g, int(case.g[f'optimise/{site}/losses'].shape[1])
  recipe = Recipe(steps)
  for stop, z, deltas in ((0.05, 'z', True), (float(g[f'optimise/{site}/stop']), 'stop_z', False)):
    found = optimise(case.config, case.p, case.requests, int(g['optimise/layer']), SITES[site],
                     recipe._replace(stop=stop), 2)  # fmt: skip
    for i, name in enumerate(SITES[site]):
      close(found.at(name), g[f'optimise/{site}/{z}'][:, i], atol=2e-4)
      if deltas:
        close(found.start[name], g[f'optimise/{site}/z0'][:, i])
        close(found.delta[name], g[f'optimise/{site}/deltas'][:, -1, i], atol=2e-4)
    if deltas:
      close(found.loss, g[f'optimise/{site}/losses'][:, -1], atol=2e-4)


@pytest.mark.parametrize('site', SITES)
def test_loss(case, site):
  """What is minimised, and its gradient, at given deltas in the middle of the network."""
  g, layer, names = case.g, 2, SITES[site]
  (at,) = np.flatnonzero(g['target/layers'] == layer)

  @quick
  def values(request, deltas):
    fixed = target._prepare(case.config, case.p, request, layer, names)

    def one(delta):
      return target.loss(case.config, case.p, layer, Recipe(), delta, fixed)[0]

    return jax.vmap(jax.value_and_grad(one))(deltas)

  for n in range(3):
    theirs = g[f'target/{site}/deltas'][n]
    deltas = {name: jnp.asarray(theirs[:, k]) for k, name in enumerate(names)}
    lost, gradient = values(jax.tree.map(lambda a, n=n: a[n], case.requests), deltas)
    close(lost, g[f'target/{site}/reverse/loss'][at, n])
    for k, name in enumerate(names):
      close(gradient[name], g[f'target/{site}/reverse/grad'][at, n][:, k], atol=1e-4)


def test_rome(case, monkeypatch):
  """The editor with given targets: key, value and factors, from the model as the request before left it."""
  e, layer = case.e, int(case.e['rome/layer'])
  seen = []

  def given(config, p, one, at, sites, *_):
    assert (at, sites) == (layer, ('feedforward',))
    n = len(seen)
    seen.append(p['layers']['down']['w'])
    goal = jnp.asarray(e['rome/targets'][n : n + 1])
    start = jnp.full_like(goal, 0.5)
    return target.Target({'feedforward': start}, {'feedforward': goal - start}, *jnp.zeros((2, 1)))

  monkeypatch.setattr('cl_jax.editing.rome.optimise', given)
  editor = rome.rome(case.config, case.moments(), layer)
  writes, _, _ = editor.edit(case.p, editor.init(case.p), case.requests, jax.random.key(0))
  p = case.p
  for n, one in enumerate(writes):
    np.testing.assert_allclose(seen[n], p['layers']['down']['w'], rtol=1e-12)
    close(one.left[:, 0], e['rome/u'][n], rtol=0, atol=2e-6)
    p = write.apply(p, [one])
    close(p['layers']['down']['w'][layer], e['rome/w'][n], rtol=0, atol=2e-6)
  close(case.answers(p), log_softmax(e['rome/answers']))


def spread(
  case, name, goal, moments, solve, share=lambda rest: 1 / rest, site='state', of=slice(None)
):
  layers = [int(i) for i in case.e[f'{name}/layers']]
  requests = jax.tree.map(lambda a: a[of], case.requests)
  writes = memit.spread(
    case.config, case.p, requests, jnp.asarray(goal), layers, solve, share, site
  )
  p = case.p
  for i, one in enumerate(writes):
    p = write.apply(p, [one])
    close(one.left, case.e[f'{name}/a'][i])
    close(one.right.T, case.e[f'{name}/residual'][i])
    close(p['layers']['down']['w'][layers[i]], case.e[f'{name}/w'][i])
  close(case.answers(p), log_softmax(case.e[f'{name}/answers']))
  return p


@pytest.mark.parametrize('name', ['given', 'optimised', 'single'])
def test_memit(case, name):
  lam, c = float(case.e['lam']), case.moments()

  def solve(layer, keys):
    return np.linalg.solve(lam * c[layer] + keys @ keys.T, keys)

  of = slice(0, 1) if name == 'single' else slice(None)
  p = spread(case, f'memit/{name}', case.e[f'memit/{name}/z'][of], c, solve, of=of)
  if name == 'single':
    close(p['layers']['down']['w'][2], case.e['memit/single/closed_w'])


@pytest.mark.parametrize('name', ['given', 'optimised'])
def test_pmet(case, name):
  lam, c = float(case.e['lam']), case.moments()

  def solve(layer, keys):
    return np.linalg.solve(lam * c[layer] + keys @ keys.T, keys)

  spread(
    case, f'pmet/{name}', case.e[f'pmet/{name}/z'], c, solve, lambda rest: rest**-0.5, 'feedforward'
  )


@pytest.mark.parametrize('whole', [memit.memit, pmet])
def test_memit_whole(case, whole):
  """The editor itself: its targets, then its writes."""
  e, name = case.e, whole.__name__
  steps = case.g['optimise/block/losses'].shape[1]
  editor = whole(case.config, case.moments(), (1, 2), float(e['lam']), Recipe(steps), 2)
  writes, _, report = editor.edit(case.p, editor.init(case.p), case.requests, jax.random.key(0))
  for i, one in enumerate(writes):
    close(one.term, e[f'{name}/optimised/a'][i] @ e[f'{name}/optimised/residual'][i].T, atol=1e-3)
  assert report['loss'].shape == (3,)


@pytest.mark.parametrize('name', ['published', 'light'])
def test_alphaedit(case, name, monkeypatch):
  e = case.e
  c = case.moments('alphaedit/c')
  layers = tuple(int(i) for i in e[f'alphaedit/{name}/layers'])
  for layer in layers:
    close(null_space(c[layer], float(e['alphaedit/threshold'])), e['alphaedit/p'][layer])
  goals = jnp.asarray(e[f'alphaedit/{name}/z'])
  editor = alphaedit(
    case.config, c, layers, float(e['alphaedit/threshold']), float(e[f'alphaedit/{name}/l2'])
  )
  p, state = case.p, editor.init(case.p)
  state = {k: v.astype(jnp.float64) for k, v in state.items()}
  for b, of in enumerate(([0, 1], [2])):
    given = target.Target(
      {'block': goals[jnp.asarray(of)]}, {'block': 0.0}, *jnp.zeros((2, len(of)))
    )
    monkeypatch.setattr('cl_jax.editing.alphaedit.optimise', lambda *a, given=given: given)
    writes, state, _ = editor.edit(p, state, take(case.requests, of), jax.random.key(0))
    p = write.apply(p, writes)
    for i, layer in enumerate(layers):
      close(writes[i].left, e[f'alphaedit/{name}/{b}/a'][i])
      close(p['layers']['down']['w'][layer], e[f'alphaedit/{name}/{b}/w'][i])
    close(state['past'], e[f'alphaedit/{name}/{b}/past'])
    close(case.answers(p), log_softmax(e[f'alphaedit/{name}/{b}/answers']))


def test_tracing(case, monkeypatch):
  """Every map, with the noise of the reference in the place of what is drawn, and more beside the subject."""
  e = case.e
  lo, hi = int(e['trace/begin']), int(e['trace/end'])
  noise = np.full((len(e['trace/noise']), len(e['trace/tokens']), case.config.d), 9.0)
  noise[:, lo:hi] = e['trace/noise'] / 3
  monkeypatch.setattr(jax.random, 'normal', lambda key, shape: jnp.asarray(noise).reshape(shape))
  # A program of its own, since what is drawn is in it; the window is one of its inputs.
  monkeypatch.setattr(tracing, 'maps', quick(restore.maps.__wrapped__, static_argnums=(0, 1, 3)))
  prompt = tracing.Prompt(e['trace/tokens'], lo, hi)
  for window in (1, 3):
    found = tracing.trace(case.config, case.p, prompt, jax.random.key(0), 3.0, len(noise), window)
    assert int(found.answer) == e['trace/answer']
    for name in ('clean', 'corrupted'):
      np.testing.assert_allclose(getattr(found, name), e[f'trace/{name}'], rtol=1e-6)
    for kind, ours in zip(restore.KINDS, found.maps, strict=True):
      theirs = e[f'trace/{kind}/{1 if kind == "block" else window}']
      np.testing.assert_allclose(ours, theirs, rtol=1e-6, err_msg=kind)
