"""The causal transformer as a language model inside the loop, and as a classifier."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax.compose import chain
from cl_jax.errors import UserError
from cl_jax.learner import learner
from cl_jax.loop import run
from cl_jax.lowrank import merged
from cl_jax.masks import paths
from cl_jax.methods.closed_form.ncm import NCMState, ncm
from cl_jax.methods.lowrank.lora import lora
from cl_jax.methods.prompts.coda import coda
from cl_jax.methods.prompts.dualprompt import dualprompt
from cl_jax.methods.prompts.l2p import l2p
from cl_jax.methods.prompts.prefix_tuning import prefix_tuning
from cl_jax.methods.prompts.prompt_tuning import prompt_tuning
from cl_jax.methods.regularisation.ewc import ewc
from cl_jax.methods.regularisation.lwf import lwf
from cl_jax.methods.replay.agem import agem
from cl_jax.methods.replay.der import der
from cl_jax.methods.replay.derpp import derpp
from cl_jax.methods.replay.er import er
from cl_jax.methods.replay.er_ace import er_ace
from cl_jax.models import causal, language, quantised
from cl_jax.models.decoder import Config, decoder
from cl_jax.streams import Plan, split
from cl_jax.streams.arrays import arrays
from cl_jax.types import Batch, Out, no_tap
from tests.compiling import quick

pytestmark = pytest.mark.usefixtures('quickly')

TINY = Config(11, 16, 2, 4, 2, 24, 32, theta=100.0)


def text(rows: int, seed: int = 0, length: int = 8):
  """Two languages: words count up in the one, down in the other."""
  rng = np.random.default_rng(seed)
  domain = np.arange(rows) % 2
  step = np.where(domain == 0, 1, -1)[:, None]
  tokens = (rng.integers(0, 11, (rows, 1)) + step * np.arange(length)) % 11
  mask = np.ones((rows, length), bool)
  x = {'tokens': tokens.astype(np.int32), 'mask': mask, 'learn': mask & (np.arange(length) > 1)}
  return arrays(x, np.zeros(rows, np.int32), domain.astype(np.int32), ('text',), ('up', 'down'))


def batch(x) -> Batch:
  n = len(x['tokens'])
  return Batch(jax.tree.map(jnp.asarray, x), jnp.zeros(n, jnp.int32), jnp.ones(n), jnp.full(n, -1))


def stream(epochs: int = 6):
  return split(text(96), text(24, 1), 'domain', by='domain', plan=Plan(batch=8, epochs=epochs))


def test_loss_likelihood_and_exactness_by_hand():
  """Only tokens to learn count, and only after the first position."""
  x = {
    'tokens': jnp.array([[1, 2, 0], [2, 2, 1]]),
    'mask': jnp.ones((2, 3), bool),
    'learn': jnp.array([[True, True, False], [False, True, True]]),
  }
  logits = jnp.array([[[0.0, 1, 2]] * 3, [[3.0, 0, 4], [1, 2, 0], [0, 0, 0]]])
  out = Out(language.shifted(logits, x['learn']), jnp.zeros((2, 1)), {})
  p = np.asarray(jax.nn.log_softmax(logits))
  want = [-p[0, 0, 2], -(p[1, 0, 2] + p[1, 1, 1]) / 2]
  b = batch(x)
  np.testing.assert_allclose(language.loss(out, b), want, rtol=1e-6)
  sums = language.likelihood(out, b._replace(w=jnp.array([1.0, 0])))
  np.testing.assert_allclose(sums, [[p[0, 0, 2], 1], [0, 0]], rtol=1e-6)
  np.testing.assert_array_equal(language.exact(out, b), [[1, 1], [1, 1]])
  worse = out._replace(logits=out.logits.at[1, 2, 0].add(9))
  np.testing.assert_array_equal(language.exact(worse, b), [[1, 1], [0, 1]])
  # What nobody learns is constant: a distilling method sees no difference there.
  other = language.shifted(logits.at[:, 2].add(5.0).at[0, 1].add(1.0), x['learn'])
  np.testing.assert_array_equal(other, out.logits)


def test_a_language_model_learns_a_stream_and_forgets():
  """R is the log-likelihood of a token: about 0 for a rule that was learnt, -log 11 at chance."""
  model = decoder(TINY, 1, output='tokens', init=0.3)
  naive = lambda hp, w: learner(model, optax.adam(5e-3))  # noqa: E731
  rehearsed = lambda hp, w: learner(model, optax.adam(5e-3), chain(er=er(40, 8)))  # noqa: E731
  s = stream()
  found = {}
  for name, build in (('naive', naive), ('er', rehearsed)):
    _, record = quick(partial(run, build))({}, jax.random.key(0), s)
    found[name] = np.asarray(record.R)
  assert (found['naive'].diagonal() > -0.5).all()
  assert found['naive'][1, 0] < -2 and found['er'][1, 0] > -1, found


METHODS = {
  'ewc': lambda: ewc(10.0, labels='empirical'),
  'lwf': lambda: lwf(1.0, 1.0),
  'agem': lambda: agem(20, 8),
  'lora': lambda: lora(2, 4.0, '.*/(q|v)/w'),
}


@pytest.mark.parametrize('name', METHODS)
def test_methods_above_a_language_model(name):
  model = decoder(TINY, 1, output='tokens', init=0.3)
  build = lambda hp, w: learner(model, optax.adam(5e-3), chain(**{name: METHODS[name]()}))  # noqa: E731
  state, record = quick(partial(run, build))({}, jax.random.key(0), stream(2))
  assert np.isfinite(record.R).all() and np.isfinite(record.loss).all()
  assert (np.asarray(record.R).diagonal() > -2).all(), record.R


def test_distillation_and_fisher_see_the_tokens_to_learn_only():
  """Padding and prompts change neither: the same rows with other tokens behind the mask."""
  model = decoder(TINY, 1, output='tokens', init=0.3)
  method = chain(lwf=lwf(1.0, 1.0), ewc=ewc(10.0, labels='empirical'))
  L = learner(model, optax.sgd(0.1), method)
  x = {k: np.array(v[:8]) for k, v in text(8).x.items()}
  x['mask'][:, 6:], x['learn'][:, 6:] = False, False
  other = {**x, 'tokens': np.where(x['mask'], x['tokens'], 3).astype(np.int32)}
  states = []
  for rows in (x, other):
    b = batch(rows)
    state = L.init(jax.random.key(0), b)
    state, _ = quick(L.step)(state, b)
    state = quick(L.boundary)(state, jax.tree.map(lambda a: a[None], b))
    state, _ = quick(L.step)(state, b)
    states.append(state)
  for a, b in zip(*(jax.tree.leaves((s.params, s.method)) for s in states), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_labels_have_no_fisher_of_their_own_in_a_language_model():
  model = decoder(TINY, 1, output='tokens')
  L = learner(model, optax.sgd(0.1), chain(ewc=ewc(1.0, labels='exact')))
  b = batch(text(8).x)
  state = L.init(jax.random.key(0), b)
  with pytest.raises(UserError, match="labels='empirical'"):
    L.boundary(state, jax.tree.map(lambda a: a[None], b))


def test_generation_with_kept_keys_equals_recomputing():
  w, _ = decoder(TINY, 1, output='tokens', init=0.5).init(jax.random.key(1), batch(text(2).x))
  w = w['backbone']
  tokens = jnp.asarray(text(4).x['tokens'])
  mask = jnp.arange(8) >= jnp.array([0, 3, 7, 1])[:, None]
  greedy = quick(lambda w: causal.generate(TINY, w, tokens, mask, 6))
  got = greedy(w)
  last = quick(lambda w, x: causal.unembed(TINY, w, causal.encode(TINY, w, x)[0][:, -1]))
  own, seen = tokens, mask
  for _ in range(6):
    new = last(w, {'tokens': own, 'mask': seen}).argmax(-1)[:, None]
    own = jnp.concatenate([own, new], 1)
    seen = jnp.concatenate([seen, jnp.ones_like(new, bool)], 1)
  np.testing.assert_array_equal(got, own[:, 8:])
  random = quick(lambda w, key: causal.generate(TINY, w, tokens, mask, 6, key, 5.0))
  drawn = [random(w, jax.random.key(k)) for k in (0, 0, 1)]
  np.testing.assert_array_equal(drawn[0], drawn[1])
  assert (drawn[0] != drawn[2]).any() and (drawn[0] != got).any()
  with pytest.raises(UserError, match='33 tokens exceed the 32 positions'):
    causal.generate(TINY, w, tokens, mask, 25)


def test_later_tokens_do_not_show_and_padding_neither():
  w, _ = decoder(TINY, 1, output='tokens', init=0.5).init(jax.random.key(1), batch(text(2).x))
  x = {k: jnp.asarray(v[:2]) for k, v in text(4).x.items()}
  h, _ = causal.encode(TINY, w['backbone'], x)
  later = {**x, 'tokens': x['tokens'].at[:, 5:].set(0)}
  h2, _ = causal.encode(TINY, w['backbone'], later)
  np.testing.assert_array_equal(h[:, :5], h2[:, :5])
  assert jnp.abs(h[:, 5:] - h2[:, 5:]).max() > 0.01
  # The same tokens after three positions of padding on the left.
  padded = {
    'tokens': jnp.pad(x['tokens'], ((0, 0), (3, 0)), constant_values=7),
    'mask': jnp.pad(x['mask'], ((0, 0), (3, 0))),
  }
  h3, _ = causal.encode(TINY, w['backbone'], padded)
  np.testing.assert_allclose(h3[:, 3:], h, atol=1e-5)


def test_what_a_tap_puts_before_is_attended_to():
  """Prompts at 'embed' and prefixes at 'k' and 'v' change every token, and no output is added."""
  model = decoder(TINY, 1, output='tokens', init=0.5)
  b = batch(text(3).x)
  variables, _ = model.init(jax.random.key(1), b)
  plain = model.apply(variables, b).logits

  def put(names):
    def tap(name, h, layer=0):
      if name not in names:
        return h
      return jnp.concatenate([jnp.full((h.shape[0], 2, h.shape[-1]), 0.7), h], 1)

    return model.apply(variables, b, tap).logits

  for names in (('embed',), ('k', 'v')):
    changed = put(names)
    assert changed.shape == plain.shape
    assert jnp.abs(changed - plain)[:, 2:].max(-1).min() > 1e-4


@pytest.mark.long
def test_frozen_weights_in_few_bits():
  """Close to the weights, a half, a quarter and an eighth of their bytes, and LoRA trains above them."""
  config = TINY._replace(d=64, ffn=128)
  model = decoder(config, 1, output='tokens', init=0.1)
  b = batch(text(8).x)
  w = model.init(jax.random.key(1), b)[0]['backbone']
  plain = model.apply({'backbone': w}, b).logits
  size = lambda tree: sum(a.nbytes for a in jax.tree.leaves(tree))  # noqa: E731
  for bits, error, share in ((16, 0.02, 0.51), (8, 0.02, 0.27), (4, 0.4, 0.19)):
    few = quantised.quantise_tree({'backbone': w}, bits)
    stored = few['backbone']['layers']['q']['w']
    assert size(stored) < share * w['layers']['q']['w'].nbytes
    back = quantised.dequantise(stored)
    step = np.abs(np.asarray(w['layers']['q']['w'])).max() / (7 if bits == 4 else 127)
    assert np.abs(back - w['layers']['q']['w']).max() <= 0.51 * step
    off = jnp.abs(model.apply(few, b).logits - plain).max() / jnp.abs(plain).max()
    assert off < error, (bits, off)
    made = decoder(config, 1, few['backbone'], output='tokens')
    method = lora(2, 4.0, '.*/(q|v)/w')
    L = learner(made, optax.sgd(0.5), chain(lora=method), few)
    state, step = L.init(jax.random.key(0), b), quick(L.step)
    assert set(state.params) == {'lora'}
    new, before = step(state, b)
    for _ in range(20):
      new, after = step(new, b)
    assert after < before
    out = made.apply(merged(method, (), {**few, **new.params}), b).logits
    want = L.predict(new, b)
    np.testing.assert_allclose(out, want, atol=1e-5)
    whole = merged(method, (), {**few, **new.params})['backbone']
    assert set(paths(whole)) == set(paths(w)), 'plain weights everywhere'
  with pytest.raises(UserError, match='does more than put low-rank terms'):
    merged(
      chain(lora=method, ncm=ncm(4)),
      {'lora': (), 'ncm': NCMState(jnp.zeros((4, 64)), jnp.zeros(4))},
      {**few, **new.params},
    )
  with pytest.raises(UserError, match='multiple of 64 rows'):
    quantised.quantise(jnp.ones((24, 8)), 4)


def test_remat_unroll_and_bfloat16():
  """The first two change nothing, the third little, and logits and features stay f32."""
  b = batch(text(4).x)
  params = decoder(TINY, 1, output='tokens', init=0.3).init(jax.random.key(1), b)[0]

  def found(**options):
    model = decoder(TINY, 1, output='tokens', **options)
    loss = lambda p: model.loss(model.apply(p, b), b).sum()  # noqa: E731
    return quick(lambda p: (model.apply(p, b), jax.grad(loss)(p)))(params)

  want, grads = found()
  for options in ({'remat': True}, {'unroll': True}):
    out, own = found(**options)
    np.testing.assert_allclose(out.logits, want.logits, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), own, grads)
  out, own = found(dtype=jnp.bfloat16)
  assert out.logits.dtype == out.features.dtype == jnp.float32
  assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(own))
  off = jnp.abs(out.logits - want.logits).max() / jnp.abs(want.logits).max()
  assert 1e-5 < off < 0.05


def test_scores_of_bfloat16_are_not_rounded():
  q, k = (jax.random.normal(jax.random.key(i), (1, 3, 16)).astype(jnp.bfloat16) for i in (0, 1))
  kept = []

  def tap(name, h, i):
    kept.append(h)
    return h

  causal.attention(
    TINY._replace(d=16, heads=1, kv_heads=1), q, k, k, jnp.ones((1, 3, 3), bool), tap
  )
  exact = jnp.einsum('bqd,bkd->bqk', *(a.astype(jnp.float32) for a in (q, k))) / 4
  np.testing.assert_allclose(kept[0][:, 0], exact, rtol=1e-5, atol=1e-5)


def test_methods_of_classifiers_are_refused_above_a_language_model():
  """As many rows as positions: weights of rows would be taken for those of positions."""
  b = batch(text(8).x)
  assert len(b.w) == b.x['tokens'].shape[1]
  for method in (der(20, 8), derpp(20, 8), er_ace(20, 8)):
    learn = learner(decoder(TINY, 1, output='tokens'), optax.sgd(0.1), method)
    with pytest.raises(ValueError, match='one a row|one label a row'):
      jax.eval_shape(learn.step, jax.eval_shape(learn.init, jax.random.key(0), b), b)


def test_what_reads_the_answer_or_goes_by_classes_is_refused_above_a_language_model():
  """A prompt that is chosen by the whole row has read what is to be predicted; classes are no tokens."""
  b, model = batch(text(8).x), decoder(TINY, 1, output='tokens', init=0.3)
  refused = [
    (l2p(4, 2, 2, 2), 'whole row'),
    (coda(2, 4, 2, layers=(0, 1)), 'whole row'),
    (dualprompt(2, 2, 2, general_layers=(0,), expert_layers=(1,)), 'whole row'),
    (lwf(outputs='seen'), "take 'all'"),
    (lwf(outputs='heads', task_classes=((0,), (1,))), "take 'all'"),
  ]
  for method, said in refused:
    with pytest.raises(UserError, match=said):
      learn = learner(model, optax.sgd(0.1), method)
      jax.eval_shape(learn.step, jax.eval_shape(learn.init, jax.random.key(0), b), b)

  def changed(method):
    """By how much another last token moves what is predicted before it."""
    learn = learner(model, optax.sgd(0.1), method)
    state = quick(learn.init)(jax.random.key(0), b)
    other = b._replace(x=b.x | {'tokens': b.x['tokens'].at[:, -1].add(1) % 11})
    one, two = (quick(learn.predict)(state, rows) for rows in (b, other))
    return float(jnp.abs(one - two)[:, :-1].max())

  assert changed(prompt_tuning(2)) == changed(prefix_tuning(2)) == changed(lwf(outputs='all')) == 0


def test_as_a_classifier():
  x = {k: v for k, v in text(6).x.items() if k != 'learn'}
  x['mask'][:, 5:] = False
  b = batch(x)
  for pool in ('last', 'mean'):
    model = decoder(TINY, 3, init=0.5, pool=pool)
    params, _ = model.init(jax.random.key(0), b)
    h, _ = causal.encode(TINY, params['backbone'], b.x)
    out = model.apply(params, b, no_tap)
    want = h[:, 4] if pool == 'last' else h[:, :5].mean(1)
    np.testing.assert_allclose(out.features, want, atol=1e-6)
    assert out.logits.shape == (6, 3)
  with pytest.raises(UserError, match="pool='first' is not known"):
    decoder(TINY, 3, pool='first')
  with pytest.raises(UserError, match='marked'):
    decoder(TINY, 3, output='tokens').apply(params, b, no_tap)
  with pytest.raises(UserError, match='3 key heads do not divide 4'):
    decoder(TINY._replace(kv_heads=3), 3)
  long = {k: jnp.repeat(v, 5, 1) for k, v in x.items()}
  with pytest.raises(UserError, match='40 tokens exceed the 32 positions'):
    model.apply(params, batch(long), no_tap)
