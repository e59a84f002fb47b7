"""Low-rank methods and adapters against independent float64 computations (see tests/parity/reference)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax.learner import learner
from cl_jax.masks import nest
from cl_jax.methods.lowrank.adapter import adapter
from cl_jax.methods.lowrank.ease import ease
from cl_jax.methods.lowrank.inflora import inflora
from cl_jax.methods.lowrank.olora import olora
from cl_jax.methods.lowrank.sdlora import sdlora
from cl_jax.models.vit import Config, vit
from tests.compiling import quick
from tests.parity.shared import Golden, batch_of, build, close, fixed, stacked

pytestmark = pytest.mark.usefixtures('quickly')

LAYERS = ('l0', 'l1')


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def start(g, method, own):
  """A learner on the frozen weights of both hidden layers; their biases and the head are trained."""
  full = g.params('init')
  frozen = {k: {'w': full[k]['w']} for k in LAYERS}
  inner = method.init
  method = method._replace(init=lambda *a: (own or inner(*a)[0], inner(*a)[1]))
  L = build(g, method, classes=6, frozen=frozen)
  return L, L.init(jax.random.key(0), batch_of(g['xs'][0, 0], g['ys'][0, 0]))


def follow(g, v, name, method, own, factors):
  """Yields (t, state) after every boundary, having compared every step; `factors` are {ours: theirs}."""
  L, state = start(g, method, own)
  step, boundary = quick(L.step), quick(L.boundary)
  xs, ys = g['xs'], g['ys']
  for t in range(len(xs)):
    for i in range(xs.shape[1]):
      state, loss = step(state, batch_of(xs[t, i], ys[t, i]))
      close(loss, g[f'{v}/loss'][t, i])
      close(state.params['head']['w'], g[f'{v}/params/l2/w'][t, i])
      for layer in LAYERS:
        close(state.params[layer]['b'], g[f'{v}/params/{layer}/b'][t, i])
        for ours, theirs in factors.items():
          leaf = state.params[name][layer]['w'][ours]
          close(leaf, g[f'{v}/params/{layer}/{theirs}'][t, i])
    close(L.predict(state, batch_of(g['probe'], np.zeros(8))), g[f'{v}/probe_logits'][t])
    state = boundary(state, stacked(xs[t], ys[t]))
    yield t, state


def given(g, name, leaves):
  return {name: nest({f'{layer}/w/{k}': jnp.asarray(g[f'{p}/{layer}/{q}']) for layer in LAYERS
                      for k, (p, q) in leaves.items()})}  # fmt: skip


@pytest.mark.parametrize('v', ['plain', 'both'])
def test_olora(v):
  g = Golden('olora')
  coef, l2 = float(g[f'{v}/lam1']), float(g[f'{v}/lam2'])
  method = olora(3, int(g['r']), float(g['alpha']), coef, l2, 'l[01]/w')
  own = given(g, 'olora', {'a': ('init', 'A'), 'b': ('init', 'B')})
  assert len(list(follow(g, v, 'olora', method, own, {'a': 'A', 'b': 'B'}))) == 3


@pytest.mark.parametrize('v', ['each', 'wide'])
def test_sdlora(v):
  g = Golden('sdlora')
  b = 'wide_init' if v == 'wide' else 'init'
  own = given(g, 'sdlora', {'a': ('init', 'A'), 'b': (b, 'B'), 'm': ('init', 'm')})
  method = sdlora(3, int(g['r']), targets='l[01]/w')
  assert len(list(follow(g, v, 'sdlora', method, own, {'a': 'A', 'b': 'B', 'm': 'm'}))) == 3


@pytest.mark.parametrize(('v', 'squared'), [('code', True), ('singular', False)])
def test_inflora(v, squared):
  g = Golden('inflora')
  method = inflora(3, int(g['warm']), rank=int(g['r']), squared=squared, targets='l[01]/w')
  for t, state in follow(g, v, 'inflora', method, None, {}):
    for layer in LAYERS:
      own = state.params['inflora'][layer]['w']
      close(own['a'][t] @ own['b'][t], g[f'{v}/product/{layer}'][t])
      close(state.method.old[f'{layer}/w'], g[f'{v}/P/{layer}'][t])


def transformer(g, method, classes):
  names = ('image', 'patch', 'd', 'depth', 'heads', 'ffn')
  of = {n: int(g[n]) for n in names}
  config = Config(**of, channels=1, eps=float(g['eps']))
  params = nest({k[5:]: jnp.asarray(g[k]) for k in g.data.files
                 if k.startswith(('init/backbone/', 'init/head/'))})  # fmt: skip
  model = fixed(vit(config, classes), params)
  L = learner(model, optax.sgd(float(g['lr'])), method, {'backbone': params['backbone']})
  return L, L.init(jax.random.key(0), batch_of(g['xs'][0, 0], g['ys'][0, 0]))


# The network normalises and takes softmax in float32 whatever its inputs are, hence 5e-6; with these in
# float64 as well the differences are below 1e-14.
WEIGHTS = [f'{a}/{b}' for a in ('down', 'up') for b in 'wb']


@pytest.mark.parametrize('v', ['both', 'attention', 'feedforward', 'parallel'])
def test_adapter(v):
  g = Golden('adapter')
  parallel = v == 'parallel'
  where = ('attention', 'feedforward') if v == 'both' else ('feedforward',) if parallel else (v,)
  method = adapter(3, where, parallel, float(g['scale']))
  own = nest({f'{p}/{w}': jnp.asarray(g[f'init/adapter/{p}/{w}']) for p in where for w in WEIGHTS})
  L, state = transformer(g, method._replace(init=lambda *a: ({'adapter': own}, ())), 4)
  step = quick(L.step)
  for t in range(2):
    for i in range(g['xs'].shape[1]):
      state, loss = step(state, batch_of(g['xs'][t, i], g['ys'][t, i]))
      close(loss, g[f'{v}/loss'][t, i], rtol=5e-6)
      close(state.params['head']['w'], g[f'{v}/params/head/w'][t, i], rtol=5e-6)
      for place in where:
        for w in WEIGHTS:
          a, b = w.split('/')
          close(
            state.params['adapter'][place][a][b],
            g[f'{v}/params/adapter/{place}/{w}'][t, i],
            rtol=5e-6,
          )
    close(L.predict(state, batch_of(g['probe'], np.zeros(6))), g[f'{v}/probe_logits'][t], rtol=5e-6)


def test_ease():
  g = Golden('ease')
  method = ease(6, 3, 3, float(g['scale']), float(g['alpha']))
  inner = method.init
  own = {'ease': nest({w: jnp.asarray(g[f'init/adapter/{w}']) for w in WEIGHTS})}
  L, state = transformer(g, method._replace(init=lambda *a: (own, inner(*a)[1])), 6)
  step, boundary = quick(L.step), quick(L.boundary)
  for t in range(3):
    for i in range(g['xs'].shape[1]):
      state, loss = step(state, batch_of(g['xs'][t, i], g['ys'][t, i]))
      close(loss, g['loss'][t, i], rtol=5e-6)
      close(state.params['head']['w'], g['params/head/w'][t, i], rtol=5e-6)
      for w in WEIGHTS:
        a, b = w.split('/')
        close(state.params['ease'][a][b], g[f'params/adapter/{w}'][t, i], rtol=5e-6)
    state = boundary(state, stacked(g['xs'][t], g['ys'][t]))
    close(state.method.mean, g['own/prototypes'][t], rtol=5e-6)
    seen = 2 * (t + 1)
    logits = L.predict(state, batch_of(g['probe'], np.zeros(6)))
    close(logits[:, :seen], g['own/logits'][t][:, :seen], rtol=5e-6)
    assert np.array_equal(logits.argmax(1), g['own/pred'][t])
