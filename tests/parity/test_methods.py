"""Every method against values computed independently in float64 (see reference/README.md).

The references store their random draws, so that nothing here depends on a generator. Tolerance: 1e-9 relative
in float64, unless a test says otherwise and why.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax import fisher, memory, metrics
from cl_jax.compose import chain
from cl_jax.learner import learner
from cl_jax.lowrank import merged
from cl_jax.methods.closed_form import ranpac as ranpac_module
from cl_jax.methods.closed_form.ncm import ncm
from cl_jax.methods.closed_form.ranpac import ranpac
from cl_jax.methods.closed_form.slda import slda
from cl_jax.methods.heads.seen_head import seen_head
from cl_jax.methods.heads.task_head import task_head
from cl_jax.methods.isolation.hat import hat
from cl_jax.methods.isolation.packnet import packnet
from cl_jax.methods.lowrank.lora import lora
from cl_jax.methods.regularisation.ewc import ewc
from cl_jax.methods.regularisation.lwf import lwf
from cl_jax.methods.replay.agem import agem
from cl_jax.methods.replay.er import er
from cl_jax.models.identity import identity
from cl_jax.models.layers import in_line
from cl_jax.models.mlp import mlp
from cl_jax.types import Forward, Method, overlay
from tests.compiling import quick
from tests.parity.shared import OURS, Golden, batch_of, build, close, close_trees, stacked

pytestmark = pytest.mark.usefixtures('quickly')


@pytest.fixture(autouse=True)
def double():
  with jax.enable_x64(True):
    yield


def follow(golden, method, variant, xs, ys, classes=4, prefix='init', loss='loss', told=True):
  """Trains on the reference's batches and compares parameters, losses and predictions throughout."""
  L = build(golden, method, classes, prefix)
  step, end = quick(L.step), quick(L.boundary)
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0], 0 if told else -1))
  probe = golden['probe']
  for t in range(len(golden[f'{variant}/loss'])):
    task = t if told else -1
    for i in range(len(xs[t])):
      state, value = step(state, batch_of(xs[t, i], ys[t, i], task))
      close(value, golden[f'{variant}/{loss}'][t, i])
      close_trees(state.params, golden.params(f'{variant}/params', t, i))
    state = end(state, stacked(xs[t], ys[t], task))
    raw = L.predict(state, batch_of(probe, np.zeros(len(probe)), -1))
    keep = np.asarray(raw[0]) > -1e29
    close(raw[:, keep], golden[f'{variant}/probe_logits'][t][:, keep])
  return state


@pytest.mark.parametrize(
  'variant',
  [
    'exact_separate',
    'exact_online',
    'empirical_separate',
    'empirical_online',
    'predicted_separate',
  ],
)
def test_ewc_runs(variant):
  g, (labels, form) = Golden('ewc'), variant.split('_')
  decay = float(g['gamma']) if form == 'online' else 1.0
  method = ewc(float(g['lam']), labels, form == 'online', decay)
  state = follow(g, method, variant, g['xs'], g['ys'])
  if form == 'online':
    close_trees(state.method.importance, g.params(f'{variant}/fisher', -1))


@pytest.mark.parametrize('form', ['dense', 'rows'])
@pytest.mark.parametrize('labels', ['exact', 'empirical', 'sampled'])
def test_fisher(labels, form, monkeypatch):
  """The closed form of dense layers and the gradient per example, against the same reference."""
  g = Golden('ewc')
  variant = f'{labels}_separate'
  monkeypatch.setattr(fisher, 'is_dense', lambda *a: form == 'dense')
  if labels == 'sampled':  # the reference stores the labels that it drew
    drawn = jnp.asarray(g[f'{variant}/sampled_labels'], jnp.int32)
  fwd = Forward(mlp((8, 7), 4).apply, {}, {})
  for t in range(3):
    x, y = g['xs'][t].reshape(-1, 6), g['ys'][t].reshape(-1)
    if labels == 'sampled':
      monkeypatch.setattr(jax.random, 'categorical', lambda key, logits, t=t: drawn[t])
    batches = jax.tree.map(lambda a: a[None], batch_of(x, y))
    params = g.params(f'{variant}/params', t, -1)
    ours = fisher.diagonal(fwd, params, batches, jax.random.key(0), labels)
    close_trees(ours, g.params(f'{variant}/fisher_new', t))


def test_sampled_labels_follow_the_prediction():
  """The labels that `sampled` draws have the frequencies of the softmax (two-sided, 4 sigma)."""
  fwd = Forward(lambda v, b, tap, train: mlp((), 3).apply(v, b, tap, train), {}, {})
  params = {'head': {'w': jnp.zeros((1, 3)), 'b': jnp.log(jnp.array([0.6, 0.3, 0.1]))}}
  n = 20_000
  batch = batch_of(np.ones((1, n, 1)), np.zeros((1, n)))
  f = fisher.diagonal(fwd, params, batch, jax.random.key(1), 'sampled')['head']['b']
  # d log p(y) / d b_c = [y = c] - p_c, whose mean square under y ~ p is p_c (1 - p_c).
  p = np.array([0.6, 0.3, 0.1])
  spread = np.sqrt(p * (1 - p) * (1 - 2 * p) ** 2 / n)
  assert np.all(np.abs(np.asarray(f) - p * (1 - p)) < 4 * spread + 1e-9)


def test_lwf_single():
  g = Golden('lwf')
  method = lwf(float(g['lam']), float(g['T']))
  follow(g, method, 'single', g['xs_single'], g['ys_single'])


@pytest.mark.parametrize(('variant', 'tasks'), [('multihead', 2), ('multihead3', 3)])
def test_lwf_heads(variant, tasks):
  g = Golden('lwf')
  classes = tuple((2 * t, 2 * t + 1) for t in range(tasks))
  method = chain(
    lwf=lwf(float(g['lam']), float(g['T']), 'heads', classes), head=task_head(classes, 2 * tasks)
  )
  prefix = 'init' if tasks == 2 else 'init6'
  follow(g, method, variant, g['xs_split'], g['ys_split'], 2 * tasks, prefix)


def test_lwf_heads_mean():
  """The loss of the published task-incremental rows: 1/t and 1 - 1/t, means over outputs and heads."""
  g = Golden('lwf')
  classes = ((0, 1), (2, 3), (4, 5))
  method = lwf(1.0, float(g['T']), 'heads', classes, average=True, mean=True)
  follow(
    g, chain(lwf=method, head=task_head(classes, 6)), 'heads3_mean', g['xs_split'], g['ys_split'], 6,
    'init6',
  )  # fmt: skip


@pytest.mark.parametrize(('variant', 'tasks'), [('ci', 2), ('ci3', 3), ('ci3_mean', 3)])
def test_lwf_class_incremental(variant, tasks):
  g = Golden('lwf')
  C = 2 * tasks
  mean = variant == 'ci3_mean'
  method = chain(lwf=lwf(1.0, float(g['T']), 'seen', average=True, mean=mean), head=seen_head(C))
  xs, ys = classes_first(g['xs_split'], g['ys_split'])
  follow(g, method, variant, xs, ys, C, 'init' if tasks == 2 else 'init6', told=False)


def classes_first(xs, ys):
  """The reference lets both classes of a task compete from its first batch, `seen_head` from the first
  example of each: the same where every first batch holds both."""
  assert all(len(np.unique(ys[t, 0])) == 2 for t in range(len(ys)))
  return xs, ys


def test_agem_projection():
  g = Golden('agem')
  method = agem(40, 6, 4)
  params = g.params('init')
  hits = set()
  for case in range(8):
    where = (case,)
    ref = g.params('single/g_ref', *where)
    s = method.init(
      jax.random.key(0), params, batch_of(g['single/x'][case], g['single/y'][case]), None
    )[1]
    draw = batch_of(g['single/x_ref'][case], g['single/y_ref'][case])
    s = s._replace(memory=s.memory._replace(draw=draw))
    ours, _ = method.grads(
      s, g.params('single/g', *where), params, None, lambda p, b, ref=ref: ((0.0, None), ref)
    )
    close_trees(ours, g.params('single/projected', *where))
    hits.add(int(g['single/violated'][case]))
  assert hits == {0, 1}


@pytest.mark.parametrize(('variant', 'tasks'), [('by_class', 1), ('by_task', 3)])
def test_agem_runs(variant, tasks):
  """Whole runs; before each step the draw is replaced by the reference's rows."""
  g = Golden('agem')
  m, D = int(g['m']), g[f'{variant}/draw_slots'].shape[-1]
  xs, ys = g[f'{variant}/xs'], g[f'{variant}/ys']
  capacity = m * 4 * (3 if tasks > 1 else 1)
  L = build(g, agem(capacity, D, 4, tasks))
  step, end = quick(L.step), quick(L.boundary)
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0], 0))
  stream = xs.reshape(-1, 6)
  for t in range(len(xs)):
    for i in range(xs.shape[1]):
      slots = g[f'{variant}/draw_slots'][t, i]
      s = state.method
      # What the reference fetched must be what our memory holds in those slots.
      rows = jax.tree.map(lambda a, slots=slots: a[np.maximum(slots, 0)], s.memory.rows)
      if t > 0:
        close(rows.x, g[f'{variant}/x_ref'][t, i])
        assert set(np.asarray(s.memory.draw.y)) <= set(ys[:t].ravel())  # only finished tasks
      draw = rows._replace(w=jnp.asarray(slots >= 0, jnp.float64))
      state = state._replace(method=s._replace(memory=s.memory._replace(draw=draw)))
      state, value = step(state, batch_of(xs[t, i], ys[t, i], t))
      close(value, g[f'{variant}/loss'][t, i])
      close_trees(state.params, g.params(f'{variant}/params', t, i))
      kept = g[f'{variant}/memory_stream'][t, i]
      held = np.asarray(state.method.memory.rows.x)[:capacity]
      close(held[kept >= 0], stream[kept[kept >= 0]])
    state = end(state, jax.vmap(lambda x, y, t=t: batch_of(x, y, t))(xs[t], ys[t]))


@pytest.mark.parametrize('variant', ['reservoir', 'ring'])
def test_er(variant, monkeypatch):
  g = Golden('er')
  D, M = g[f'{variant}/draw_slots'].shape[-1], int(g['capacity'])
  capacity = M if variant == 'reservoir' else 4 * int(g['m'])
  L = build(g, er(capacity, D, variant, classes=4))
  xs, ys = g['xs'], g['ys']
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0]))
  real, drawn = jax.random.randint, []
  monkeypatch.setattr(
    jax.random, 'randint', lambda *a, **k: drawn.pop() if drawn else real(*a, **k)
  )

  @quick
  def step(state, batch, j):
    drawn[:] = [] if j is None else [j]
    out = L.step(state, batch)
    assert not drawn
    return out

  for t in range(len(xs)):
    for i in range(xs.shape[1]):
      slots = g[f'{variant}/draw_slots'][t, i]
      rows = jax.tree.map(lambda a, slots=slots: a[np.maximum(slots, 0)], state.method.rows)
      draw = rows._replace(w=jnp.asarray(slots >= 0, jnp.float64))
      state = state._replace(method=state.method._replace(draw=draw))
      j = jnp.asarray(g['reservoir/j'][t, i], jnp.int32) if variant == 'reservoir' else None
      state, value = step(state, batch_of(xs[t, i], ys[t, i]), j)
      close(value, g[f'{variant}/loss'][t, i])
      close_trees(state.params, g.params(f'{variant}/params', t, i))
      kept = g[f'{variant}/memory_stream'][t, i]
      full = kept >= 0
      close(np.asarray(state.method.rows.x)[:capacity][full], g[f'{variant}/memory_x'][t, i][full])
      assert (np.asarray(state.method.rows.w)[:capacity] > 0).sum() == full.sum()


HEADS = ((0, 1), (2, 3))


def test_hat_run():
  """Parameters, embeddings, losses, cumulative gates and predictions of both tasks.

  To 1e-7: an embedding at -6 has the gate gradient g (1 - g), which cancels, times a compensation of up
  to cosh(30), in the reference as here.
  """
  g = Golden('hat')
  smax = float(g['smax'])
  method = chain(
    hat=hat(2, 3, float(g['c']), smax, wires=in_line(('l0', 'l1'))), head=task_head(HEADS, 4)
  )
  tied = method._replace(
    init=lambda key, params, batch, fwd: (
      {'hat': {'l0': jnp.asarray(g['init/e0']), 'l1': jnp.asarray(g['init/e1'])}},
      method.init(key, params, batch, fwd)[1],
    )
  )
  L = build(g, tied)
  step, end = quick(L.step), quick(L.boundary)
  xs, ys = g['xs'], g['ys']
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0], 0))
  probe = g['probe']
  for t in range(2):
    for i in range(6):
      state, value = step(state, batch_of(xs[t, i], ys[t, i], t))
      close(value, g['paper/loss'][t, i], rtol=1e-7)
      close_trees(state.params, g.params('paper/params', t, i), rtol=1e-7)
      close(state.params['hat']['l0'], g['paper/params/e0'][t, i], rtol=1e-7)
      close(state.params['hat']['l1'], g['paper/params/e1'][t, i], rtol=1e-7)
    state = end(state, jax.vmap(lambda x, y, t=t: batch_of(x, y, t))(xs[t], ys[t]))
    close(state.method['hat'].used['l0'], g['paper/cumulative/g0'][t], rtol=1e-7)
    close(state.method['hat'].used['l1'], g['paper/cumulative/g1'][t], rtol=1e-7)
    for task in range(t + 1):
      out = L.predict(state, batch_of(probe, np.zeros(len(probe)), task))
      close(out[:, list(HEADS[task])], g['paper/probe_logits'][t, task], rtol=1e-7)


def test_hat_compensation():
  """Eq. 4 alone, at the published smax, clip included."""
  g = Golden('hat')
  e, s, smax = g['compensation/e'], g['compensation/s'], float(g['compensation/smax'])
  for i in range(len(e)):
    # Place the annealing where its steepness is s: position (s - 1/smax) / (smax - 1/smax).
    steps = 10**9 + 1
    position = (s[i] - 1 / smax) / (smax - 1 / smax)
    method = hat(1, steps, 0.0, smax)
    state = ranged(method, position * (steps - 1))
    params = {'hat': {'l0': jnp.full((1, 1), e[i])}}
    grads = {'hat': {'l0': jnp.full((1, 1), g['compensation/grad_in'][i])}}
    out, _ = method.grads(state, grads, params, None, None)
    # The position is rounded to one part in 1e9 of the schedule and goes through cosh(s e).
    close(out['hat']['l0'][0, 0], g['compensation/grad_out'][i], rtol=1e-4)


def ranged(method, step):
  from cl_jax.methods.isolation.hat import HATState

  del method
  none = jnp.zeros(1, bool)
  return HATState({'l0': jnp.zeros(1)}, none, none, jnp.zeros(1), jnp.asarray(step), jnp.int32(0))


def packnet_tx(g, variant):
  if 'momentum' not in variant:
    return optax.sgd(float(g['lr']))
  return optax.sgd(float(g['lr']), momentum=float(g['momentum']))


@pytest.mark.parametrize('variant', ['simple_sgd', 'simple_floor', 'heads_sgd'])
def test_packnet(variant):
  """Training, pruning and retraining of two tasks with plain SGD.

  The reference retrains with lr_retrain: our factor is the ratio. Its momentum runs start every phase with
  a fresh velocity, which an optimiser that runs through does not: those are in `test_packnet_momentum`.
  """
  g = Golden('packnet')
  heads = variant.startswith('heads')
  fraction = float(g['fraction_rounding'] if variant == 'simple_floor' else g['fraction'])
  method = packnet(
    fraction,
    fraction,
    int(g['train_steps']),
    float(g['lr_retrain'] / g['lr']),
    head='head/.*' if heads else 'none',
  )
  named = chain(pack=method, head=task_head(HEADS, 4)) if heads else chain(pack=method)
  L = build(g, named, tx=packnet_tx(g, variant))
  step, end = quick(L.step), quick(L.boundary)
  kind = 'heads' if heads else 'simple'
  xs, ys = g[f'xs_{kind}'], g[f'ys_{kind}']
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0], 0))
  probe, train = g['probe'], int(g['train_steps'])
  for t in range(2):
    for i in range(xs.shape[1]):
      state, value = step(state, batch_of(xs[t, i], ys[t, i], t))
      close(value, g[f'{variant}/loss'][t, i])
      want = (
        g.params(f'{variant}/pruned', t) if i == train - 1 else g.params(f'{variant}/params', t, i)
      )
      close_trees(state.params, want)
    for name, owner in state.method['pack'].owner.items():
      theirs = {v: k for k, v in OURS.items()}[name[:-2]]
      assert np.array_equal(owner, g[f'{variant}/owner/{theirs}/w'][t])
    state = end(state, jax.vmap(lambda x, y, t=t: batch_of(x, y, t))(xs[t], ys[t]))
    for task in range(t + 1):
      out = L.predict(state, batch_of(probe, np.zeros(len(probe)), task))
      out = out[:, list(HEADS[task])] if heads else out
      close(out, g[f'{variant}/probe_logits'][t, task])
  mixed = batch_of(np.concatenate([probe, probe]), np.zeros(24), 0)
  mixed = mixed._replace(task=jnp.arange(24) // 12)  # rows of both tasks in one batch
  out = L.predict(state, mixed)
  for task in range(2):
    rows = out[12 * task : 12 * task + 12]
    rows = rows[:, list(HEADS[task])] if heads else rows
    close(rows, g[f'{variant}/probe_logits'][1, task])


def test_packnet_momentum():
  """The reference's fresh velocity per phase, by resetting the optimiser where a phase begins."""
  g = Golden('packnet')
  train, variant = int(g['train_steps']), 'simple_momentum'
  fraction = float(g['fraction'])
  L = {
    scale: build(
      g,
      chain(pack=packnet(fraction, fraction, train, scale, head='none')),
      tx=packnet_tx(g, variant),
    )
    for scale in [float(g['lr_retrain'] / g['lr'])]
  }
  (L,) = L.values()
  step, end = quick(L.step), quick(L.boundary)
  xs, ys = g['xs_simple'], g['ys_simple']
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0], 0))
  fresh = state.opt
  for t in range(2):
    for i in range(xs.shape[1]):
      if i in (0, train):
        state = state._replace(opt=fresh)
      state, _ = step(state, batch_of(xs[t, i], ys[t, i], t))
      want = (
        g.params(f'{variant}/pruned', t) if i == train - 1 else g.params(f'{variant}/params', t, i)
      )
      close_trees(state.params, want)
    state = end(state, jax.vmap(lambda x, y, t=t: batch_of(x, y, t))(xs[t], ys[t]))


def closed_form(g, method, t):
  """The learner after tasks 0..t of the reference, one row at a time."""
  L = learner(identity(6), optax.sgd(0.0), method)
  ends = g['task_start']
  state = L.init(jax.random.key(0), batch_of(g['x'][:1], g['y'][:1]))
  step, end = quick(L.step), quick(L.boundary)
  for k in range(t + 1):
    rows = slice(ends[k], ends[k + 1])
    for i in range(ends[k], ends[k + 1]):
      state, _ = step(state, batch_of(g['x'][i : i + 1], g['y'][i : i + 1]))
    state = end(state, jax.tree.map(lambda a: a[None], batch_of(g['x'][rows], g['y'][rows])))
  probe = g['probe']
  scores = L.predict(state, batch_of(probe, np.zeros(len(probe))))
  return state.method, np.asarray(scores)


@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
@pytest.mark.parametrize('t', [0, 2])
def test_ncm(metric, t):
  g = Golden('closed_form')
  s, scores = closed_form(g, ncm(6, metric), t)
  seen = g['ncm/counts'][t] > 0
  close((s.total / np.maximum(s.count, 1)[:, None])[seen], g['ncm/means'][t][seen])
  want = g['ncm/cosine'][t] if metric == 'cosine' else -0.5 * g['ncm/sq_distance'][t]
  close(scores[:, seen], want[:, seen])
  assert np.array_equal(scores.argmax(1), g[f'ncm/pred_{metric}'][t])


def test_slda():
  g = Golden('closed_form')
  last = g['task_start'][1:] - 1
  for t in (0, 2):
    s, scores = closed_form(g, slda(6, float(g['eps']), centre_first=False), t)
    close(s.cov, g['slda/sigma'][last[t]])
    seen = np.asarray(s.count) > 0
    close(s.mean[seen], g['slda/means'][t][seen])
    close(scores[:, seen], g['slda/scores'][t][:, seen], rtol=1e-7)  # a solve against an inverse
    assert np.array_equal(scores.argmax(1), g['slda/pred'][t])


def test_slda_batch_equals_rows():
  """A batch at a time gives the recursion of single rows, and leaving out first rows changes it."""
  g = Golden('closed_form')
  rows = slice(0, 60)
  L = learner(identity(6), optax.sgd(0.0), slda(6, centre_first=False))
  state = L.init(jax.random.key(0), batch_of(g['x'][:1], g['y'][:1]))
  state, _ = quick(L.step)(state, batch_of(g['x'][rows], g['y'][rows]))
  close(state.method.cov, g['slda/sigma'][59])
  L = learner(identity(6), optax.sgd(0.0), slda(6))
  state = L.init(jax.random.key(0), batch_of(g['x'][:1], g['y'][:1]))
  state, _ = quick(L.step)(state, batch_of(g['x'][rows], g['y'][rows]))
  assert np.abs(np.asarray(state.method.cov) - g['slda/sigma'][59]).max() > 1e-3


@pytest.mark.parametrize('lam', ['fixed', 'selected'])
def test_ranpac(lam, monkeypatch):
  g = Golden('closed_form')
  assert np.allclose(ranpac_module.LAMBDAS, g['ranpac/lambdas'])
  method = ranpac(6, 12, float(g['fixed_lambda']) if lam == 'fixed' else None)
  given = method._replace(
    init=lambda *a: ({}, method.init(*a)[1]._replace(projection=jnp.asarray(g['W'])))
  )
  for t in (0, 2):
    s, scores = closed_form(g, given, t)
    close(s.gram, g['ranpac/G'][t])
    close(s.moment, g['ranpac/C'][t])
    if lam == 'selected':
      assert float(s.lam) == pytest.approx(g['ranpac/selected'][t], rel=1e-6)
    close(s.head, g[f'ranpac/head_{lam}'][t], rtol=1e-7)
    seen = np.abs(g['ranpac/C'][t]).sum(0) > 0
    close(scores[:, seen], g[f'ranpac/logits_{lam}'][t][:, seen], rtol=1e-7)
    assert np.array_equal(scores.argmax(1), g[f'ranpac/pred_{lam}'][t])


def test_lora():
  g = Golden('lora')
  full = g.params('init')
  frozen = {k: full[k] for k in ('l0', 'l1')}
  rank, alpha = int(g['r']), float(g['alpha'])
  method = lora(rank, alpha, 'l[01]/w')
  start = {
    layer: {
      'w': {'a': jnp.asarray(g[f'init/{layer}/A'].T), 'b': jnp.asarray(g[f'init/{layer}/B'].T)}
    }
    for layer in ('l0', 'l1')
  }
  given = method._replace(init=lambda *a: ({'lora': start}, ()))
  assert jax.tree.structure(
    method.init(jax.random.key(0), full, None, Forward(None, {}, {}))[0]
  ) == (jax.tree.structure({'lora': start}))
  L = build(g, given, frozen=frozen)
  step = quick(L.step)
  xs, ys = g['xs'], g['ys']
  state = L.init(jax.random.key(0), batch_of(xs[0, 0], ys[0, 0]))
  assert set(state.params) == {'head', 'lora'}
  for t in range(2):
    for i in range(xs.shape[1]):
      state, value = step(state, batch_of(xs[t, i], ys[t, i]))
      close(value, g['train_a/loss'][t, i])
      for layer in ('l0', 'l1'):
        ours = state.params['lora'][layer]['w']
        close(ours['a'].T, g[f'train_a/params/{layer}/A'][t, i])
        close(ours['b'].T, g[f'train_a/params/{layer}/B'][t, i])
      close(state.params['head']['w'], g['train_a/params/l2/w'][t, i])
    plain = merged(method, (), overlay(frozen, state.params))
    for layer in ('l0', 'l1'):
      close(plain[layer]['w'], g[f'train_a/merged/{layer}/w'][t])
    probe = batch_of(g['probe'], np.zeros(12))
    close(L.predict(state, probe), g['train_a/probe_logits'][t])
    close(
      mlp((8, 7), 4).apply(plain, probe, Method().wrap and (lambda n, h, layer: h), False).logits,
      g['train_a/probe_logits'][t],
    )


@pytest.mark.parametrize('case', ['random5', 'typical5', 'early5', 'gain3', 'two', 'one'])
def test_metrics(case):
  g = Golden('metrics')
  ours = metrics.summary(g[f'{case}/R'], g[f'{case}/b'])
  names = {
    'acc': 'acc',
    'bwt': 'bwt',
    'fwt': 'fwt',
    'forgetting': 'forgetting',
    'learning_acc': 'learning_accuracy',
    'aaa': 'average_incremental',
  }
  for name, theirs in names.items():
    if ours[name] is None:
      assert case == 'one' and name in ('bwt', 'fwt', 'forgetting')
    else:
      close(ours[name], g[f'{case}/{theirs}'])


def test_distinct_is_uniform_without_repetition():
  """Floyd's algorithm: every subset of 3 out of 6 equally often (two-sided, chi-squared at 1e-6)."""
  keys = jax.random.split(jax.random.key(3), 8000)
  draws, w = jax.vmap(lambda k: memory.distinct(k, 3, jnp.int32(6)))(keys)
  draws = np.sort(np.asarray(draws), axis=1)
  assert (w == 1).all() and (np.diff(draws, axis=1) > 0).all()
  _, counts = np.unique(draws, axis=0, return_counts=True)
  assert len(counts) == 20
  chi2 = ((counts - 400) ** 2 / 400).sum()
  assert 3.0 < chi2 < 65.0  # 19 degrees of freedom: 1e-5 below, 1e-6 above
