"""Prompts and prefixes: where they enter, what is chosen, what stays as it is."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax import prompts
from cl_jax.budget import passes
from cl_jax.compose import chain
from cl_jax.errors import UserError
from cl_jax.learner import learner
from cl_jax.loop import check_needs
from cl_jax.masks import paths
from cl_jax.methods.prompts.coda import coda, orthogonal
from cl_jax.methods.prompts.dualprompt import dualprompt
from cl_jax.methods.prompts.l2p import l2p
from cl_jax.methods.prompts.prefix_tuning import prefix_tuning
from cl_jax.methods.prompts.prompt_tuning import prompt_tuning
from cl_jax.methods.prompts.sprompts import kmeans, sprompts
from cl_jax.models import bert, causal, clip, layers, vit
from cl_jax.models.decoder import decoder
from cl_jax.models.mlp import mlp
from cl_jax.types import Batch, Method, no_tap
from tests.compiling import compiled, quick

pytestmark = pytest.mark.usefixtures('quickly')

B, C, D, HEADS = 6, 4, 8, 2
IMAGES = Batch(
  jnp.asarray(np.random.default_rng(5).standard_normal((B, 4, 4, 1), np.float32)),
  jnp.asarray(np.arange(B) % C),
  jnp.ones(B),
  jnp.zeros(B, jnp.int32),
)
MASK = jnp.asarray(np.arange(5) < np.array([[5], [3], [4], [1], [2], [5]]))
TEXT = IMAGES._replace(
  x={
    'tokens': jnp.asarray(np.random.default_rng(8).integers(0, 30, (B, 5), np.int32)),
    'mask': MASK,
  }
)
VIT = vit.vit(vit.Config(4, 2, 1, D, 3, HEADS, 12), C, init=0.5)
BERT = bert.bert(bert.Config(30, D, 3, HEADS, 12, 10, 2), C, init=0.5)
NETWORKS = {'vit': (VIT, IMAGES), 'bert': (BERT, TEXT)}
LLAMA = decoder(
  causal.Config(30, D, 3, HEADS, 1, 12, 12), C, init=0.5
)  # heads share keys and values
CLIP_CONFIG = clip.Config(4, 2, 1, D, 3, HEADS, 12, projection=6)
CLIP = clip.clip(CLIP_CONFIG, C, init=0.5, mean=0.0, std=1.0)
OTHERS = {'decoder': (LLAMA, TEXT), 'clip': (CLIP, IMAGES)}
PER_TASK = {
  'dualprompt': lambda: dualprompt(3, 2, 3, 0.5, (0,), (1, 2)),
  'coda': lambda: coda(3, 6, 4, 0.1, (0, 2)),
  'sprompts': lambda: sprompts(3, 2, 2, 4),
}
METHODS = {
  'prompt_tuning': lambda: prompt_tuning(3),
  'prefix_tuning': lambda: prefix_tuning(3),
  'l2p': lambda: l2p(5, 2, 2),
  **PER_TASK,
}


def start(model, batch, method, tx=None):
  """The compiled learner of a frozen backbone, its first state, and the backbone."""
  params, _ = first(model.init, jax.random.key(0), batch)
  tx = optax.sgd(0.1) if tx is None else tx
  learn = compiled(learner(model, tx, method, {'backbone': params['backbone']}))
  return learn, learn.init(jax.random.key(1), batch), {'backbone': params['backbone']}


first = quick(lambda init, key, batch: init(key, batch), static_argnums=0)


# --- where they enter -------------------------------------------------------------------------------


@partial(quick, static_argnums=0)
def by_hand(name, p, batch, prompt=None, prefixes=None):
  """Features with a prompt [n, D] or [B, n, D], and prefixes {layer: (keys, values)}, layer by layer."""
  norm = lambda q, h: layers.layer_norm(q, h, 1e-12)  # noqa: E731
  if name == 'vit':
    h = layers.dense(p['patch'], vit.patches(vit.Config(4, 2, 1, D, 3, HEADS, 12), batch.x))
    h = jnp.concatenate([jnp.broadcast_to(p['cls'], (B, 1, D)), h], 1) + p['positions']
    mask = jnp.ones(h.shape[:2], bool)
  else:
    e, tokens, mask = p['embed'], batch.x['tokens'], batch.x['mask']
    h = norm(e['norm'], e['tokens'][tokens] + e['positions'][: tokens.shape[1]] + e['types'][0])
  own, before = (
    h.shape[1],
    lambda a, h: jnp.concatenate([jnp.broadcast_to(a, (B, *a.shape[-2:])), h], 1),
  )
  if prompt is not None:
    h = before(prompt, h)
  for i in range(3):
    q = jax.tree.map(lambda a, i=i: a[i], p['layers'])
    n = norm(q['norm1'], h) if name == 'vit' else h
    k, v = layers.dense(q['k'], n), layers.dense(q['v'], n)
    if prefixes and i in prefixes:
      k, v = before(prefixes[i][0], k), before(prefixes[i][1], v)
    seen = jnp.pad(mask, ((0, 0), (k.shape[1] - own, 0)), constant_values=True)
    heads = []
    for at in range(0, D, D // HEADS):
      of = slice(at, at + D // HEADS)
      scores = layers.dense(q['q'], n)[..., of] @ k[..., of].swapaxes(1, 2) / (D // HEADS) ** 0.5
      scores = jnp.where(seen[:, None], scores, -jnp.inf)
      heads.append(jax.nn.softmax(scores, -1) @ v[..., of])
    a = layers.dense(q['o'], jnp.concatenate(heads, -1))
    if name == 'vit':
      h = h + a
      m = norm(q['norm2'], h)
      h = h + layers.dense(q['down'], jax.nn.gelu(layers.dense(q['up'], m), approximate=False))
    else:
      h = norm(q['norm1'], h + a)
      m = layers.dense(q['down'], jax.nn.gelu(layers.dense(q['up'], h), approximate=False))
      h = norm(q['norm2'], h + m)
  h = h[:, -own:]
  if name == 'vit':
    return norm(p['norm'], h)[:, 0]
  return (h * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)


close = partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize('name', NETWORKS)
def test_prompts_and_prefixes_enter_where_they_should(name):
  """Against a forward pass written out: in some layers only, one for all rows or one per row, together."""
  model, batch = NETWORKS[name]
  p, _ = first(model.init, jax.random.key(0), batch)
  draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)  # noqa: E731
  prompt, each = draw(1, 3, D), draw(2, B, 3, D)
  shared, rows = draw(3, 2, 2, 2, D), draw(4, 2, 2, B, 3, D)

  @partial(quick, static_argnums=0)
  def features(change):
    return model.apply(p, batch, change(no_tap), False).features

  hand = partial(by_hand, name, p['backbone'], batch)
  close(features(lambda t: t), hand())
  close(features(lambda t: prompts.before_sequence(t, prompt)), hand(prompt))
  close(features(lambda t: prompts.before_sequence(t, each)), hand(each))

  def both(tap):  # of different lengths, in layers that overlap, and a prompt besides
    tap = prompts.before_keys(tap, shared[:, 0], shared[:, 1], (2, 0))
    tap = prompts.before_keys(tap, rows[:, 0], rows[:, 1], (0, 1))
    return prompts.before_sequence(tap, prompt)

  join = lambda i: jnp.concatenate([rows[0, i], jnp.broadcast_to(shared[1, i], (B, 2, D))], 1)  # noqa: E731
  prefixes = {0: (join(0), join(1)), 1: (rows[1, 0], rows[1, 1]), 2: (shared[0, 0], shared[0, 1])}
  close(features(both), hand(prompt, prefixes))


@pytest.mark.parametrize('network', OTHERS)
def test_decoders_and_clip_take_them_too(network):
  """All of them trace; one step of a prompt and of prefixes in some layers reaches every array of theirs."""
  model, batch = OTHERS[network]
  for make in METHODS.values():
    learn = learner(model, optax.sgd(0.1), make())
    state = jax.eval_shape(learn.init, jax.random.key(0), batch)
    state, _ = jax.eval_shape(learn.step, state, batch)
    assert jax.eval_shape(learn.predict, state, batch).shape == (B, C)
  both = {n: METHODS[n]() for n in ('prompt_tuning', 'dualprompt')}
  learn, state, _ = start(model, batch, chain(**both))
  moved = learn.step(state, batch)[0].params
  for n in both:
    assert all(not np.array_equal(a, moved[n][leaf]) for leaf, a in state.params[n].items()), n


def test_a_prompt_of_tokens_is_these_tokens_before_the_text():
  """In a Llama, whose embedded sequence holds rows of the table and whose positions go on."""
  learn, state, frozen = start(LLAMA, TEXT, prompt_tuning(3, 'labels', (4, 2)))
  ahead = jnp.broadcast_to(jnp.array([4, 2, 4]), (B, 3))
  x = {
    'tokens': jnp.concatenate([ahead, TEXT.x['tokens']], 1),
    'mask': jnp.concatenate([ahead > 0, MASK], 1),
  }
  plain = learner(LLAMA, optax.sgd(0.1), frozen=frozen)
  bare = state._replace(params={'head': state.params['head']}, method=())
  close(learn.predict(state, TEXT), quick(plain.predict)(bare, TEXT._replace(x=x)))


def test_the_tap_of_another_method_goes_on_working():
  """Outside or inside: it sees every activation, and what it changes counts."""
  seen = {}

  def other(s, apply):
    def run(variables, batch, tap, train):
      def look(name, h, layer=0):
        seen[name] = h.shape
        return tap(name, h * 0.5 if name == 'block' else h, layer)

      return apply(variables, batch, look, train)

    return run

  probe = Method(wrap=other)
  for name, make in METHODS.items():
    out = []
    for order in ({name: make()}, {name: make(), 'probe': probe}, {'probe': probe, name: make()}):
      learn, state, _ = start(VIT, IMAGES, chain(**order))
      seen.clear()
      out.append(learn.predict(state, IMAGES))
      assert ('block' in seen) == ('probe' in order)
    assert not np.allclose(out[0], out[1]) and not np.allclose(out[0], out[2]), name


@pytest.mark.parametrize('name', METHODS)
def test_networks_without_the_taps_are_refused(name):
  learn = learner(mlp((5,), C), optax.sgd(0.1), METHODS[name]())
  with pytest.raises(UserError, match=rf'{name} .*this network has l0: take a vit') as caught:
    learn.init(jax.random.key(0), IMAGES)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('method', 'message'),
  [
    (lambda: dualprompt(2, general_layers=(0, 3), expert_layers=(1,)), 'the layers 0 to 2'),
    (lambda: dualprompt(2, general_layers=(0,), expert_layers=(1, 1)), 'at most once'),
    (lambda: coda(2, 4, 4, layers=()), 'one at least'),
    (lambda: coda(2, 4, 3, layers=(0,)), 'make it even'),
    (lambda: coda(2, 9, 2, layers=(0,)), 'make the pool smaller'),
    (lambda: coda(5, 4, 2), 'no component for each of 5 tasks'),
    (lambda: l2p(2, 3), 'make the pool larger'),
    (lambda: prompt_tuning(2, 'vocabulary'), 'has none'),
    (lambda: prompt_tuning(2, 'labels'), 'give tokens'),
    (lambda: prompt_tuning(2, 'label'), 'use one of random, vocabulary, labels'),
  ],
)
def test_mistakes(method, message):
  with pytest.raises(UserError, match=message) as caught:
    start(VIT, IMAGES, method())
  assert '\n' not in str(caught.value)


def test_prompts_start_from_tokens_as_bert_embeds_them():
  """In the space that they enter: with position, segment and norm."""
  params, _ = first(BERT.init, jax.random.key(0), TEXT)
  e = params['backbone']['embed']
  e['norm'] = {'scale': jnp.linspace(0.5, 2, D), 'bias': jnp.linspace(-1, 1, D)}
  network = BERT._replace(init=lambda key, batch: (params, {}))

  def by_token(ids):  # [5, tokens, D]
    h = e['tokens'][ids] + e['positions'][:5, None] + e['types'][0]
    return layers.layer_norm(e['norm'], h, 1e-12)

  _, state, _ = start(network, TEXT, prompt_tuning(5, 'labels', (4, 2)))
  rows = state.params['prompt_tuning']['prompt']
  close(rows, by_token(np.array([4, 2, 4, 2, 4])[:, None])[:, 0])
  _, state, _ = start(network, TEXT, prompt_tuning(5, 'vocabulary'))
  rows = state.params['prompt_tuning']['prompt'][:, None]
  far = jnp.abs(by_token(np.arange(30)[None]) - rows).max(-1).min(-1)
  assert (far < 1e-4).all()
  with pytest.raises(UserError, match='vocabulary of 30'):
    start(BERT, TEXT, prompt_tuning(2, 'labels', (30,)))


# --- queries ----------------------------------------------------------------------------------------


def cosine(q, k):
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  return (
    q @ k.T / np.linalg.norm(q, axis=-1, keepdims=True) / np.linalg.norm(k, axis=-1)[..., None, :]
  )


def spread(state, name, seed=3):
  """The state with parameters of the method that differ clearly."""
  new = {
    n: jax.random.normal(jax.random.key(seed + i), a.shape)
    for i, (n, a) in enumerate(state.params[name].items())
  }
  return state._replace(params={**state.params, name: new})


@pytest.mark.parametrize('vote', [False, True])
@pytest.mark.parametrize('network', NETWORKS)
def test_l2p_takes_the_prompts_with_the_nearest_keys(network, vote):
  model, batch = NETWORKS[network]
  batch = batch._replace(w=jnp.array([1.0, 1, 1, 1, 0, 0]))
  learn, state, frozen = start(model, batch, l2p(5, 2, 2, 0.5, vote))
  q = by_hand(network, frozen['backbone'], batch)
  own = spread(state, 'l2p').params['l2p'] | {
    'keys': q[:5] - q.mean(0)
  }  # rows differ in their choice
  state = state._replace(params={**state.params, 'l2p': own})
  p = {**frozen, **state.params}
  near = cosine(q, own['keys'])
  index = np.argsort(-near, axis=1, kind='stable')[:, :2]
  if vote:
    votes = np.bincount(index[:4].reshape(-1), minlength=5)
    index = np.broadcast_to(np.argsort(-votes, kind='stable')[:2], (B, 2))
  else:
    assert len(np.unique(index, axis=0)) > 1
  prompt = own['prompts'][index].reshape(B, 4, D)
  logits = layers.dense(p['head'], by_hand(network, p['backbone'], batch, prompt))
  close(learn.predict(state, batch), logits, rtol=1e-3, atol=1e-4)
  chosen = np.take_along_axis(near, index, 1).sum(1)
  ce = -jax.nn.log_softmax(logits)[jnp.arange(B), batch.y]
  _, loss = learn.step(state, batch)
  close(loss, (ce - 0.5 * chosen)[:4].mean(), rtol=1e-3)


def test_a_vote_is_written_down_and_passes_every_scenario(toy_stream):
  method = chain(l2p=l2p(5, 2, 2, vote=True))
  assert method.needs == ('batch_test',) and l2p(5, 2, 2).needs == ()
  check_needs(method.needs, toy_stream)
  with pytest.raises(UserError, match='needs task_test'):
    check_needs(('batch_test', 'task_test'), dataclasses.replace(toy_stream, told=()))


def test_queries_have_no_gradient():
  """The pull of the keys reaches the keys alone, even where the backbone is trained."""
  learn = learner(VIT, optax.sgd(0.1), l2p(5, 2, 2, 1.0))
  state = first(learn.init, jax.random.key(1), IMAGES)
  method = l2p(5, 2, 2, 1.0)
  apply = method.wrap((), VIT.apply)

  def pull(params):
    return method.loss((), params, IMAGES, apply(params, IMAGES, no_tap, True), None)

  moved = {p for p, a in paths(quick(jax.grad(pull))(state.params)).items() if np.any(a)}
  assert moved == {'l2p/keys'}


def test_the_second_pass_is_counted():
  """A query is a whole forward pass more; S-Prompts has it at test only."""
  cost = {}
  for name in ('prefix_tuning', 'l2p', 'sprompts'):
    _, state, frozen = start(VIT, IMAGES, METHODS[name]())
    make = lambda m, name=name, frozen=frozen: learner(m, optax.sgd(0.1), METHODS[name](), frozen)  # noqa: E731
    cost[name] = passes(make, VIT, state, IMAGES)
  assert 1 < cost['prefix_tuning']['train_forward'] < 1.5
  assert 2 < cost['l2p']['train_forward'] < 3 and 2 < cost['l2p']['predict_forward'] < 3
  assert 1 < cost['sprompts']['train_forward'] < 1.9 and 2 < cost['sprompts']['predict_forward'] < 3


# --- slots for tasks --------------------------------------------------------------------------------


def ends(batch=IMAGES):
  return jax.tree.map(lambda a: a[None], batch)


def slots(name, params, task):
  """The part of a method's parameters that belongs to a task."""
  own = params[name]
  if name == 'coda':
    return {n: a[:, 2 * task : 2 * task + 2] for n, a in own.items()}
  return {n: a[task] for n, a in own.items() if n != 'general'}


def same(a, b):
  return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.parametrize('name', PER_TASK)
def test_what_belongs_to_other_tasks_keeps_its_value(name):
  """Bit for bit under Adam with momentum and decay, before and after its task."""
  tx = optax.adamw(0.05, weight_decay=0.1)
  learn, state, _ = start(VIT, IMAGES, PER_TASK[name](), tx)
  for now in range(3):
    begun = state
    for _ in range(3):
      state, _ = learn.step(state, IMAGES)
    for task in range(3):
      kept = same(slots(name, begun.params, task), slots(name, state.params, task))
      assert kept == (task != now), (name, now, task)
      if task == now:
        moved = jax.tree.map(
          lambda a, b: bool(np.any(a != b)),
          slots(name, begun.params, task),
          slots(name, state.params, task),
        )
        assert all(jax.tree.leaves(moved))
    trained = state
    state = learn.boundary(state, ends())
    for task in range(now + 1):
      assert same(slots(name, trained.params, task), slots(name, state.params, task))
  # A fourth task, of which nobody knew, goes on with the last slot.
  before = state
  state, _ = learn.step(state, IMAGES)
  assert same(slots(name, before.params, 1), slots(name, state.params, 1))
  assert not same(slots(name, before.params, 2), slots(name, state.params, 2))


@pytest.mark.parametrize('name', PER_TASK)
def test_what_was_never_trained_takes_no_part(name):
  """Neither before a task, nor between the boundary and its first step."""
  learn, state, _ = start(VIT, IMAGES, PER_TASK[name]())
  state, _ = learn.step(state, IMAGES)
  state = learn.boundary(state, ends())

  def with_other(task):
    def change(n, a):
      if name == 'coda':
        return a.at[:, 2 * task : 2 * task + 2].set(jnp.flip(a[:, :2], -1))
      return a if n == 'general' else a.at[task].set(jnp.flip(a[0], -1) * 3 + 1)

    own = {n: change(n, a) for n, a in state.params[name].items()}
    return state._replace(params={**state.params, name: own})

  plain = learn.predict(state, IMAGES)
  for task in (1, 2):
    np.testing.assert_array_equal(learn.predict(with_other(task), IMAGES), plain)
  _, loss = learn.step(state, IMAGES)
  assert (
    learn.step(with_other(2), IMAGES)[1] == loss and learn.step(with_other(1), IMAGES)[1] != loss
  )


def test_dualprompt_at_test_goes_by_the_nearest_key_of_the_tasks_begun():
  learn, state, frozen = start(VIT, IMAGES, PER_TASK['dualprompt']())
  state = spread(state, 'dualprompt')
  own, p = state.params['dualprompt'], {**frozen, **state.params}
  near = cosine(by_hand('vit', p['backbone'], IMAGES), own['keys'])

  def by_task(task):
    each = own['expert'][task]  # [B, layers, 2, length, D]
    prefixes = {0: (own['general'][0, 0], own['general'][0, 1])}
    prefixes |= {1 + i: (each[:, i, 0], each[:, i, 1]) for i in range(2)}
    return layers.dense(p['head'], by_hand('vit', p['backbone'], IMAGES, None, prefixes))

  for begun in (1, 2, 3):
    s = prompts.Tasks(jnp.int32(begun - 1), jnp.int32(begun))
    task = np.argmax(near[:, :begun], 1)
    got = learn.predict(state._replace(method=s), IMAGES)
    close(got, by_task(task), rtol=1e-3, atol=1e-4)
    _, loss = learn.step(state._replace(method=s), IMAGES)
    logits = by_task(np.full(B, begun - 1))  # in training the task at hand, whatever is nearest
    ce = -jax.nn.log_softmax(logits)[jnp.arange(B), IMAGES.y]
    close(loss, (ce + 0.5 * (1 - near[:, begun - 1])).mean(), rtol=1e-3)
  assert len(np.unique(np.argmax(near, 1))) > 1


def test_coda_is_a_sum_of_components():
  learn, state, frozen = start(VIT, IMAGES, PER_TASK['coda']())
  state = spread(state, 'coda')
  own, p = state.params['coda'], {**frozen, **state.params}
  q = np.asarray(by_hand('vit', p['backbone'], IMAGES))
  for begun in (1, 2, 3):
    prefixes, m, penalty = {}, 2 * begun, 0.0
    for i, layer in enumerate((0, 2)):
      rows = np.zeros((B, 4, D))
      for c in range(m):
        weight = np.array(
          [cosine((q[b] * own['attention'][i, c])[None], own['keys'][i, c][None]) for b in range(B)]
        )
        rows = rows + weight.reshape(B, 1, 1) * np.asarray(own['prompts'][i, c])
      prefixes[layer] = (jnp.asarray(rows[:, :2]), jnp.asarray(rows[:, 2:]))
      for x in own.values():
        x = np.asarray(x[i, :m]).reshape(m, -1)
        penalty += np.square(x @ x.T - np.eye(m)).mean()
    logits = layers.dense(p['head'], by_hand('vit', p['backbone'], IMAGES, None, prefixes))
    s = state._replace(method=prompts.Tasks(jnp.int32(begun - 1), jnp.int32(begun)))
    close(learn.predict(s, IMAGES), logits, rtol=1e-3, atol=1e-4)
    ce = -jax.nn.log_softmax(logits)[jnp.arange(B), IMAGES.y]
    close(learn.step(s, IMAGES)[1], ce.mean() + 0.1 * penalty, rtol=1e-3)


def test_coda_makes_new_components_orthogonal():
  learn, state, _ = start(VIT, IMAGES, PER_TASK['coda']())
  for task in range(3):
    for a in state.params['coda'].values():
      for x in np.asarray(a).reshape(2, 6, -1):
        old, new = x[: 2 * task], x[2 * task : 2 * task + 2]
        np.testing.assert_allclose(new @ new.T, np.eye(2), atol=1e-5)
        np.testing.assert_allclose(old @ new.T, 0, atol=1e-5)
    for _ in range(3):
      state, _ = learn.step(state, IMAGES)
    state = learn.boundary(state, ends())


def test_orthogonal_to_the_span_of_rows_that_depend_on_each_other():
  x = jax.random.normal(jax.random.key(0), (5, 6))
  x = x.at[1].set(2 * x[0]).at[2].set(x[0] + 0.01 * x[2])
  out = np.asarray(orthogonal(x, 3, 2))
  np.testing.assert_array_equal(out[:3], x[:3])
  np.testing.assert_allclose(out[3:] @ out.T[:, 3:], np.eye(2), atol=1e-5)
  np.testing.assert_allclose(out[3:] @ np.asarray(x[:3]).T, 0, atol=1e-4)


# --- S-Prompts --------------------------------------------------------------------------------------


def test_kmeans_finds_groups_and_ignores_padding():
  rng = np.random.default_rng(0)
  centres = 10 * rng.normal(size=(3, 4))
  x = np.concatenate([c + 0.1 * rng.normal(size=(20, 4)) for c in centres]).astype(np.float32)
  x = x[rng.permutation(60)]
  valid = np.ones(70, bool)
  valid[60:] = False
  wild = np.concatenate([x, np.full((10, 4), np.nan, np.float32)])
  points = np.asarray(kmeans(jnp.asarray(wild), jnp.asarray(valid), 3, 5))
  own = np.square(x[:, None] - points[None]).sum(-1).argmin(1)
  for i in range(3):
    np.testing.assert_allclose(points[i], x[own == i].mean(0), rtol=1e-4)
    assert np.square(centres - points[i]).sum(1).min() < 0.1
  few = np.asarray(kmeans(jnp.asarray(wild), jnp.arange(70) < 2, 4, 5))  # more points than rows
  assert {tuple(r) for r in few} == {tuple(r) for r in x[:2]}


@pytest.mark.parametrize('unit', [True, False])
def test_sprompts_goes_to_the_nearest_finished_task(unit):
  learn, state, frozen = start(VIT, IMAGES, sprompts(3, 2, 2, 4, unit))
  state = spread(state, 'sprompts')
  own, p = state.params['sprompts'], {**frozen, **state.params}

  def by_task(task):
    f = by_hand('vit', p['backbone'], IMAGES, own['prompts'][task])
    return jnp.einsum('bd,bdc->bc', f, own['w'][task]) + own['b'][task]

  near = partial(close, rtol=1e-3, atol=1e-4)
  near(learn.predict(state, IMAGES), by_task(np.zeros(B, int)))  # nothing is finished yet
  half = lambda w: ends(IMAGES._replace(w=jnp.array(w, jnp.float32)))  # noqa: E731
  for w in ([1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]):
    state = learn.boundary(state, half(w))
  q = np.asarray(by_hand('vit', p['backbone'], IMAGES))
  q = q / np.linalg.norm(q, axis=-1, keepdims=True) if unit else q
  points = np.asarray(state.method.centroids)
  assert (np.linalg.norm(points[:2], axis=-1).max() <= 1 + 1e-6) == unit
  task = np.square(q[:, None, None] - points[None, :2]).sum(-1).min(-1).argmin(-1)
  assert set(task) == {0, 1}
  near(learn.predict(state, IMAGES), by_task(task))  # task 2 is not among them
  logits = by_task(np.full(B, 2))
  ce = -jax.nn.log_softmax(logits)[jnp.arange(B), IMAGES.y]
  near(learn.step(state, IMAGES)[1], ce.mean())
