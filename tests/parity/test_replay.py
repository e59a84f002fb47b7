"""Replay methods and writers against values computed independently (see reference/README.md)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax import memory, writers
from cl_jax.compose import chain
from cl_jax.learner import learner
from cl_jax.linalg import nonnegative_quadratic
from cl_jax.methods.heads.seen_head import seen_head
from cl_jax.methods.heads.task_head import MINUS_INF, task_head
from cl_jax.methods.replay.der import der, with_logits
from cl_jax.methods.replay.derpp import derpp
from cl_jax.methods.replay.dgr import dgr
from cl_jax.methods.replay.er_ace import er_ace
from cl_jax.methods.replay.gdumb import gdumb
from cl_jax.methods.replay.gem import gem
from cl_jax.methods.replay.icarl import icarl
from cl_jax.methods.replay.mer import mer
from cl_jax.methods.replay.mir import mir
from cl_jax.models.mlp import mlp
from tests.compiling import quick
from tests.parity.shared import (
  LEAVES,
  OURS,
  Golden,
  batch_of,
  build,
  close,
  close_trees,
  drawn,
  fixed,
  from_host,
  stacked,
)

pytestmark = pytest.mark.usefixtures('quickly')


@pytest.fixture(autouse=True)
def double():
  with jax.enable_x64(True):
    yield


def follow(g, variant, method, monkeypatch, draws=('draw',), loss='loss', traced=None):
  """A run with a reservoir: before each step the draw is replaced by the reference's rows.

  Returns the last state, and for every step the values of what was put into the list `traced` inside it.
  """
  traced, found = [] if traced is None else traced, []
  key = lambda name: f'{variant}/{name}' if f'{variant}/{name}' in g.data else name  # noqa: E731
  xs, ys = g[key('xs')], g[key('ys')]
  L = build(g, method)
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0]))
  real, coming = jax.random.randint, []
  monkeypatch.setattr(
    jax.random, 'randint', lambda *a, **k: coming.pop() if coming else real(*a, **k)
  )

  @quick
  def step(state, batch, j):
    coming.append(j)
    traced.clear()
    out = L.step(state, batch)
    assert not coming
    return *out, tuple(traced)

  probe = batch_of(g['probe'], np.zeros(len(g['probe'])))
  for t in range(len(xs)):
    for i in range(xs.shape[1]):
      held = state.method
      slots = np.concatenate([g[f'{variant}/{d}_slots'][t, i] for d in draws])
      state = state._replace(method=held._replace(draw=drawn(held.rows, slots)))
      j = jnp.asarray(np.maximum(g[f'{variant}/j'][t, i], 0), jnp.int32)
      state, value, values = step(state, batch_of(xs[t, i], ys[t, i]), j)
      found.append(values)
      close(value, g[f'{variant}/{loss}'][t, i])
      close_trees(state.params, g.params(f'{variant}/params', t, i))
      kept = g[f'{variant}/memory_stream'][t, i]
      rows = jax.tree.map(lambda a, kept=kept: np.asarray(a)[: len(kept)], state.method.rows)
      assert ((rows.w > 0) == (kept >= 0)).all()
      x = rows.x['x'] if isinstance(rows.x, dict) else rows.x
      close(x[kept >= 0], xs.reshape(-1, 6)[kept[kept >= 0]])
    close(L.predict(state, probe), g[f'{variant}/probe_logits'][t])
  return state, found


def test_der_runs(monkeypatch):
  g = Golden('der')
  D = g['der/draw_slots'].shape[-1]
  method = der(int(g['capacity']), D, float(g['der/alpha']))
  state, _ = follow(g, 'der', method, monkeypatch)
  kept = g['der/memory_stream'][-1, -1] >= 0
  logits = np.asarray(state.method.rows.x['logits'])[: len(kept)]
  close(logits[kept], g['der/memory_z'][-1, -1][kept])


def test_derpp_runs(monkeypatch):
  g = Golden('der')
  D = g['derpp/draw_slots'].shape[-1]
  method = derpp(int(g['capacity']), D, float(g['derpp/alpha']), float(g['derpp/beta']))
  follow(g, 'derpp', method, monkeypatch, ('draw', 'draw2'))


@pytest.mark.parametrize('variant', ['tasks', 'one_class'])
def test_er_ace_runs(variant, monkeypatch):
  g = Golden('er_ace')
  method = er_ace(int(g['capacity']), g[f'{variant}/draw_slots'].shape[-1])
  follow(g, variant, method, monkeypatch)


@pytest.mark.parametrize(('head', 'among'), [('task', [0, 1]), ('seen', [0, 1, 2, 3])])
@pytest.mark.parametrize('name', ['der', 'er_ace'])
def test_memory_rows_compete_where_their_head_lets_them(name, head, among):
  """Rows of a first task beside a batch of the second: the mean is over, the softmax among these outputs."""
  rng, dark = np.random.default_rng(0), name == 'der'
  w, b, z = rng.normal(size=(5, 6)), rng.normal(size=6), rng.normal(size=(3, 6))
  x, y, x_old, y_old = rng.normal(size=(4, 5)), [2, 3, 3, 2], rng.normal(size=(3, 5)), [1, 0, 1]
  own = (der if dark else er_ace)(9, 3, 0.7)
  outer = task_head(((0, 1), (2, 3), (4, 5)), 6) if head == 'task' else seen_head(6)
  model = fixed(mlp((), 6), {'head': {'w': jnp.asarray(w), 'b': jnp.asarray(b)}})
  L = learner(model, optax.sgd(0.1), chain(own=own, head=outer))
  state, old = L.init(jax.random.key(0), batch_of(x, y, 1)), batch_of(x_old, y_old, 0)
  if dark:
    old = with_logits(old, jnp.where(jnp.isin(jnp.arange(6), jnp.asarray(among)), z, MINUS_INF))
  seen = () if head == 'task' else jnp.arange(6) < 4
  method = {'own': state.method['own']._replace(draw=old), 'head': seen}
  _, loss = quick(L.step)(state._replace(method=method), batch_of(x, y, 1))

  def ce(x, y, outputs):
    z = (x @ w + b)[:, outputs]
    return np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), np.searchsorted(outputs, y)])

  if dark:
    far = np.mean(((x_old @ w + b) - z)[:, among] ** 2)
    close(loss, ce(x, y, [2, 3] if head == 'task' else among) + 0.7 * far)
  else:
    close(loss, ce(x, y, [2, 3]) + 0.7 * ce(x_old, y_old, among))


@pytest.mark.parametrize('variant', ['mir', 'few'])
def test_mir_runs(variant, monkeypatch):
  g = Golden('mir')
  S, k = g[f'{variant}/draw_slots'].shape[-1], int(g[f'{variant}/k'])
  method = mir(int(g['capacity']), k, S, float(g['lr_v']))
  inside, real = [], jax.lax.top_k
  monkeypatch.setattr(jax.lax, 'top_k', lambda *a: inside.append(real(*a)) or inside[-1])
  _, picked = follow(g, variant, method, monkeypatch, loss='loss_batch', traced=inside)
  chosen = g[f'{variant}/chosen'].reshape(-1, k)
  scores = g[f'{variant}/scores'].reshape(-1, S)
  weights = g[f'{variant}/draw_weight'].reshape(-1, S)
  assert len(picked) == len(chosen)
  for ((values, where),), theirs, score, w in zip(picked, chosen, scores, weights, strict=True):
    real_ones = w[theirs] > 0
    assert np.array_equal(np.asarray(where)[real_ones], theirs[real_ones])
    close(np.asarray(values)[real_ones], score[theirs][real_ones])


@pytest.mark.parametrize('variant', ['margin0', 'margin'])
def test_gem_runs(variant):
  g = Golden('gem')
  xs, ys, m = g['xs'], g['ys'], int(g['m'])
  L = build(g, gem(4, 4 * m, float(g[f'{variant}/margin']), float(g['eps'])))
  step, end = quick(L.step), quick(L.boundary)
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0]))
  probe = batch_of(g['probe'], np.zeros(len(g['probe'])))
  for t in range(len(xs)):
    for i in range(xs.shape[1]):
      state, value = step(state, batch_of(xs[t, i], ys[t, i]))
      close(value, g[f'{variant}/loss'][t, i])
      close_trees(state.params, g.params(f'{variant}/params', t, i))
      kept = g[f'{variant}/memory_stream'][t, i]
      held = np.asarray(state.method.rows.x)[: len(kept)]
      close(held[kept >= 0], xs.reshape(-1, 6)[kept[kept >= 0]])
    state = end(state, stacked(xs[t], ys[t]))
    close(L.predict(state, probe), g[f'{variant}/probe_logits'][t])


def test_gem_quadratic_programs():
  """To 1e-7: rows of norms from 1e-3 to 1e2 make some of them ill-conditioned."""
  g = Golden('gem')
  for case in range(len(g['single/count'])):
    G, count = g['single/G'][case], int(g['single/count'][case])
    gram = G @ G.T + float(g['single/eps'][case]) * np.eye(len(G))
    on = jnp.arange(len(G)) < count
    margin = float(g['single/margin'][case])
    v = nonnegative_quadratic(jnp.asarray(gram), jnp.asarray(g['single/dot'][case]), margin, on)
    if g['single/violated'][case]:
      close(v, g['single/v'][case], rtol=1e-7)
      close(g['single/g'][case] + G.T @ np.asarray(v), g['single/projected'][case], rtol=1e-7)
  assert 0 < g['single/violated'].sum() < len(g['single/violated'])


def writing(writer, monkeypatch):
  """`write_then_draw`, compiled; `u` are the numbers that it draws."""

  @quick
  def write(held, batch, key, f, u):
    with monkeypatch.context() as patch:
      if u is not None:
        patch.setattr(jax.random, 'uniform', lambda *a: u)
      return memory.write_then_draw(writer, held, batch, key, features=f)

  return write


def shown(writer, write, features, labels, u=None):
  """Yields the stored positions after each row of a stream, written in batches of 4."""
  batch = lambda at: batch_of(np.arange(at, at + 4)[:, None], labels[at : at + 4])  # noqa: E731
  held = memory.create(writer, batch(0), 1, 0 if features is None else features.shape[1])
  for at in range(0, len(labels), 4):
    f, numbers = (None if a is None else jnp.asarray(a[at : at + 4]) for a in (features, u))
    held = write(held, batch(at), jax.random.key(at), f, numbers)
    stored = np.asarray(held.rows.w)[: writer.capacity] > 0
    yield at + 3, np.where(stored, np.asarray(held.rows.x)[: writer.capacity, 0], -1), held.aux


def test_gdumb_sampler(monkeypatch):
  g = Golden('gdumb')
  writer = writers.greedy_balanced(int(g['K']), int(g['classes']))
  write = writing(writer, monkeypatch)
  for labels, u, slots in zip(g['labels'], g['u'], g['slots'], strict=True):
    for row, stored, _ in shown(writer, write, None, labels, u):
      assert np.array_equal(stored, slots[row])


def test_gdumb_trains_as_torch_does(monkeypatch):
  """Three epochs on a full memory: momentum, decay, gradients cut at norm 10, a warm start and a cosine."""
  torch = pytest.importorskip('torch')
  g = Golden('er')
  xs, ys = g['xs'].reshape(-1, g['xs'].shape[-1]), g['ys'].reshape(-1)
  K, size, epochs, lr, end, decay = 15, 5, 3, 0.4, 0.01, 0.02
  orders = [np.random.default_rng(e).permutation(K) for e in range(epochs)]
  method = gdumb(4, K, epochs, size, lr, end, decay)
  L = build(g, method)
  state = L.init(jax.random.key(0), batch_of(xs[:1], ys[:1]))
  rows = state.method.memory.rows
  x = 10 * xs[:K]  # large enough for gradients beyond norm 10
  rows = batch_of(np.concatenate([x, x[:1]]), np.concatenate([ys[:K], ys[:1]]))
  state = state._replace(
    method=state.method._replace(memory=state.method.memory._replace(rows=rows))
  )
  coming = list(orders)  # one place in a loop over the epochs
  order = lambda key, n: from_host(coming).astype(jnp.int32)  # noqa: E731
  monkeypatch.setattr(jax.random, 'permutation', order)
  boundary = quick(L.boundary)
  state = jax.block_until_ready(boundary(state, stacked(xs[None, :5], ys[None, :5])))
  assert not coming

  p = {n: torch.tensor(np.asarray(g[f'init/{n}']), requires_grad=True) for n in LEAVES}
  tx = torch.optim.SGD(p.values(), lr=lr, momentum=0.9, weight_decay=decay)
  step, cut = 0, 0
  for order in orders:
    for at in order.reshape(-1, size):
      t = step / (K // size) - 1
      falling = end + (lr - end) * (1 + np.cos(np.pi * t / (epochs - 1))) / 2
      tx.param_groups[0]['lr'] = lr / 10 if t < 0 else falling
      h = torch.tensor(x[at])
      for layer in ('l0', 'l1'):
        h = torch.relu(h @ p[f'{layer}/w'] + p[f'{layer}/b'])
      loss = torch.nn.functional.cross_entropy(h @ p['l2/w'] + p['l2/b'], torch.tensor(ys[:K][at]))
      tx.zero_grad()
      loss.backward()
      norm = torch.sqrt(sum(a.grad.square().sum() for a in p.values()))
      for a in p.values():  # torch's own function divides by norm + 1e-6
        a.grad *= min(1.0, 10 / float(norm))
      cut += float(norm) > 10
      tx.step()
      step += 1
  assert 0 < cut < step
  ours = state.params
  for n in LEAVES:
    close(ours[OURS[n[:2]]][n[3:]], p[n].detach().numpy())


@pytest.mark.parametrize('name', ['mof', 'kmeans'])
def test_er_writers(name, monkeypatch):
  g = Golden('writers')
  classes, m = int(g['classes']), int(g['m'])
  writer = writers.writer(name, classes * m, classes)
  write = writing(writer, monkeypatch)
  for features, labels, slots, means in zip(
    g['features'], g['labels'], g[f'{name}/slots'],
    g['mof/mean' if name == 'mof' else 'kmeans/centroid'], strict=True,
  ):  # fmt: skip
    for row, stored, aux in shown(writer, write, features, labels):
      assert np.array_equal(stored, slots[row].reshape(-1))
      ours = aux.mean if name == 'mof' else aux.centroid
      close(ours, means[row].reshape(ours.shape))


@pytest.mark.parametrize('variant', ['plain', 'coef', 'soft'])
def test_icarl_runs(variant):
  """Losses, parameters, exemplars, their means and the scores; the draws are the reference's slots."""
  g = Golden('icarl')
  xs, ys, K = g['xs'], g['ys'], int(g['K'])
  temperature = 2.0 if variant == 'soft' else 1.0
  L = build(g, icarl(6, K, int(g['D']), float(g[f'{variant}/coef']), temperature), classes=6)
  step, end = quick(L.step), quick(L.boundary)
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0]))
  probe = batch_of(g['probe'], np.zeros(len(g['probe'])))
  for t in range(len(xs)):
    for i in range(xs.shape[1]):
      held, slots = state.method, g[f'{variant}/draw_slots'][t, i]
      drawn_by_us = np.asarray(held.draw.w) > 0
      assert drawn_by_us.sum() == (slots >= 0).sum()
      state = state._replace(method=held._replace(draw=drawn(held.rows, slots)))
      state, value = step(state, batch_of(xs[t, i], ys[t, i]))
      close(value, g[f'{variant}/loss'][t, i])
      close_trees(state.params, g.params(f'{variant}/params', t, i))
    state = end(state, stacked(xs[t], ys[t]))
    kept, rows = g[f'{variant}/slots'][t], state.method.rows
    assert np.array_equal(np.asarray(rows.w)[:K] > 0, kept >= 0)
    close(np.asarray(rows.x)[:K][kept >= 0], xs.reshape(-1, 6)[kept[kept >= 0]])
    assert np.array_equal(np.asarray(rows.y)[:K][kept >= 0], ys.reshape(-1)[kept[kept >= 0]])
    close(state.method.means, g[f'{variant}/means'][t])
    seen = np.unique(ys[: t + 1])
    close(np.asarray(L.predict(state, probe))[:, seen], g[f'{variant}/probe_scores'][t][:, seen])
    held = np.asarray(rows.x)[:K][np.asarray(rows.w)[:K] > 0]
    for x in np.asarray(state.method.draw.x)[np.asarray(state.method.draw.w) > 0]:
      assert (held == x).all(axis=1).any()  # only what is stored is drawn


@pytest.mark.parametrize('variant', ['mer', 'alg6'])
def test_mer_runs(variant, monkeypatch):
  """Drawn slots and reservoir positions are the reference's."""
  g = Golden('mer')
  xs, ys = g['xs'], g['ys']
  names = ('capacity', 'k', 's', 'lr', 'beta', 'gamma')
  capacity, k, s, lr, beta, gamma = (g[n].item() for n in names)
  if variant == 'alg6':
    s, beta = 1, 1.0
  L = build(g, mer(capacity, k - 1, s, lr, beta, gamma))
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0]))
  now = {}
  monkeypatch.setattr(jax.random, 'randint', lambda *a: now['j'])

  def chosen(write, seen, key, n, where):
    slots = now['slots'][where[0], where[1]]
    return jnp.maximum(slots, 0), (slots >= 0).astype(jnp.float64)

  monkeypatch.setattr('cl_jax.methods.replay.mer.chosen', chosen)

  @quick
  def step(state, batch, j, slots):
    now.update(j=j, slots=slots)
    return L.step(state, batch)

  for t in range(len(xs)):
    for i in range(xs.shape[1]):
      j = jnp.asarray(np.maximum(g[f'{variant}/j'][t, i], 0).reshape(-1), jnp.int32)
      slots = jnp.asarray(g[f'{variant}/draw_slots'][t, i], jnp.int32)
      state, value = step(state, batch_of(xs[t, i], ys[t, i]), j, slots)
      close(value, g[f'{variant}/loss'][t, i])
      close_trees(state.params, g.params(f'{variant}/params', t, i))
      kept = g[f'{variant}/memory_stream'][t, i, -1]
      held = np.asarray(state.method.rows.x)[: len(kept)]
      close(held[kept >= 0], xs.reshape(-1, 6)[kept[kept >= 0]])


@pytest.mark.parametrize(
  ('variant', 'outputs'), [('dgr', 'seen'), ('all', 'all'), ('heads', 'heads')]
)
def test_dgr_runs(variant, outputs, monkeypatch):
  """Network and generator, from the reference's noise; labels of dreams among these outputs."""
  g = Golden('dgr')
  data, own = ('heads/', 'heads') if outputs == 'heads' else ('', 'dgr')
  xs, ys = g[f'{data}xs'], g[f'{data}ys']
  layers = {n.split('/')[1] for n in g.data if n.startswith('gen/')}
  initial = {n: {p: jnp.asarray(g[f'gen/{n}/{p}']) for p in 'wb'} for n in layers}
  coming = []
  monkeypatch.setattr('cl_jax.methods.replay.dgr.vae', lambda *a: initial)
  monkeypatch.setattr('cl_jax.methods.replay.dgr.noise', lambda key, shape: coming.pop(0))
  z = g[f'{own}/z_rep']
  R, latent = z.shape[2:]
  z = z.reshape(-1, R, latent)
  heads = ((0, 1), (2, 3), (4, 5)) if outputs == 'heads' else ()
  parts = {'dgr': dgr(R, (5, 4), latent, float(g['lr_g']), outputs, heads)}
  if heads:
    L = build(g, chain(**parts, head=task_head(heads, 6)), 6, 'init6')
  else:
    L = build(g, chain(**parts))
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0], 0))
  probe = batch_of(g['probe'], np.zeros(len(g['probe'])))

  @quick
  def step(state, batch, *noise):
    coming[:] = noise
    out = L.step(state, batch)
    assert not coming
    return out

  for t in range(len(xs)):
    for i in range(xs.shape[1]):
      if t > 0:
        close(state.method['dgr'].replay, g[f'{own}/x_rep'][t, i])
      following = z[min(t * xs.shape[1] + i + 1, len(z) - 1)]
      noise = map(jnp.asarray, (g[f'{own}/eps'][t, i], g[f'{own}/eps_rep'][t, i], following))
      state, value = step(state, batch_of(xs[t, i], ys[t, i], t), *noise)
      close(value, g[f'{variant}/loss'][t, i])
      close_trees(state.params, g.params(f'{variant}/params', t, i))
      for name in layers if variant == 'dgr' else ():
        for part in 'wb':
          close(state.method['dgr'].generator[name][part], g[f'dgr/gen/{name}/{part}'][t, i])
    coming[:] = [jnp.asarray(z[min((t + 1) * xs.shape[1], len(z) - 1)])]
    state = L.boundary(state, stacked(xs[t], ys[t], t))
    close(L.predict(state, probe), g[f'{variant}/probe_logits'][t])
