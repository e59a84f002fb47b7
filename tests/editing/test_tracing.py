"""Causal tracing: against NumPy, its limits, the averages by role, and the figures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax.editing import restore, tracing
from cl_jax.editing.restore import Trace
from cl_jax.editing.tracing import Average, Prompt
from cl_jax.errors import UserError
from cl_jax.models import causal
from cl_jax.models.causal import Config
from experiments import edit_trace

pytestmark = pytest.mark.usefixtures('quickly')

LLAMA = Config(40, 16, 4, 4, 2, 24, 32)
GPT2 = Config(40, 16, 4, 4, 4, 24, 32, norm='layer', rope=False, gated=False)
PROMPT = Prompt(np.array([3, 17, 5, 29, 8, 11], np.int32), 1, 3)
KEY = jax.random.key(3)
SAMPLES, SIGMA = 3, 1.5
WINDOW = {LLAMA: 2, GPT2: 3}  # even and odd
OPTIONS = {'samples': SAMPLES, 'window': 2, 'width': 4}


@pytest.fixture(scope='module', params=[LLAMA, GPT2], ids=['llama', 'gpt2'])
def model(request):
  config = request.param
  p = causal.draw(jax.random.key(0), config, 0.4)
  options = OPTIONS | {'window': WINDOW[config]}
  return config, p, tracing.trace(config, p, PROMPT, KEY, SIGMA, **options)


class Numpy:
  """A forward pass in float64 that keeps what its layers add, and can have it replaced."""

  def __init__(self, config, p):
    self.config, self.p = config, jax.tree.map(lambda a: np.asarray(a, np.float64), p)

  def norm(self, p, x):
    if self.config.norm == 'rms':
      return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config.eps) * p['scale']
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config.eps)
    return x * p['scale'] + p['bias']

  def rotated(self, x):
    if not self.config.rope:
      return x
    half = self.config.size // 2
    angle = np.arange(len(x))[:, None] * self.config.theta ** -(np.arange(half) / half)
    one, two = x[:, :half], x[:, half:]
    c, s = np.cos(angle), np.sin(angle)
    return np.concatenate([one * c - two * s, two * c + one * s], -1)

  def __call__(self, tokens, added, put_back=()):
    """(p f[vocabulary], {(kind, layer): f[L, d]}); `put_back` has (kind, layer, token, value)."""
    c, p, n = self.config, self.p, len(tokens)
    h, kept = p['embed']['tokens'][tokens] + added, {}
    if not c.rope:
      h = h + p['embed']['positions'][:n]

    def note(kind, i, value):
      for k, layer, token, new in put_back:
        if (k, layer) == (kind, i):
          value = value.copy()
          value[token] = new
      kept[kind, i] = value
      return value

    for i in range(c.depth):
      w = jax.tree.map(lambda a, i=i: a[i], p['layers'])
      dense = lambda name, x, w=w: x @ w[name]['w'] + w[name].get('b', 0)  # noqa: E731
      x = self.norm(w['norm1'], h)
      q, k, v = (dense(name, x) for name in 'qkv')
      heads = []
      for j in range(c.heads):
        at = j * c.kv_heads // c.heads
        own, shared = (slice(a * c.size, (a + 1) * c.size) for a in (j, at))
        scores = self.rotated(q[:, own]) @ self.rotated(k[:, shared]).T / np.sqrt(c.size)
        scores = np.exp(np.where(np.tri(n) > 0, scores, -np.inf))
        heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, shared])
      h = h + note('attention', i, dense('o', np.concatenate(heads, -1)))
      x = self.norm(w['norm2'], h)
      up = dense('up', x)
      if c.gated:
        gate = dense('gate', x)
        up = gate / (1 + np.exp(-gate)) * up
      else:
        up = up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
      h = note('block', i, h + note('feedforward', i, dense('down', up)))
    logits = self.norm(p['norm'], h[-1]) @ p['embed']['tokens'].T
    logits = np.exp(logits - logits.max())
    return logits / logits.sum(), kept


def test_every_number_is_that_of_numpy(model):
  config, p, found = model
  run = Numpy(config, p)
  tokens, lo, hi, _ = PROMPT
  clean, kept = run(tokens, 0)
  answer = clean.argmax()
  assert int(found.answer) == answer
  np.testing.assert_allclose(found.clean, clean[answer], rtol=1e-4)
  noise = np.asarray(jax.random.normal(KEY, (SAMPLES, len(tokens), config.d)))
  noise = SIGMA * noise * ((np.arange(len(tokens)) >= lo) & (np.arange(len(tokens)) < hi))[:, None]
  mean = lambda back: np.mean([run(tokens, a, back)[0][answer] for a in noise])  # noqa: E731
  np.testing.assert_allclose(found.corrupted, mean(()), rtol=1e-4)
  assert abs(found.corrupted / found.clean - 1) > 0.01
  maps = np.zeros((3, config.depth, len(tokens)))
  for k, kind in enumerate(restore.KINDS):
    for layer in range(config.depth):
      w = 1 if kind == 'block' else WINDOW[config]
      around = range(max(0, layer - w // 2), min(config.depth, layer - (-w // 2)))
      for t in range(len(tokens)):
        maps[k, layer, t] = mean([(kind, i, t, kept[kind, i][t]) for i in around])
  np.testing.assert_allclose(found.maps, maps, rtol=1e-3, atol=1e-6)
  assert np.ptp(maps, (1, 2)).min() > 1e-3  # each kind does something


def test_states_that_the_noise_cannot_reach_bring_nothing_back_and_the_last_one_all(model):
  _, _, found = model
  np.testing.assert_allclose(found.maps[:, :, 0], found.corrupted, rtol=1e-4)
  np.testing.assert_allclose(found.maps[0, -1, -1], found.clean, rtol=1e-4)


def test_all_put_back_is_the_clean_run_and_nothing_the_corrupted(model):
  config, p, found = model
  tokens = jnp.asarray(PROMPT.tokens)
  added = SIGMA * jax.random.normal(KEY, (SAMPLES, len(tokens), config.d))
  runs = restore.runs(config, p, tokens, jnp.asarray([1, 3]), added)
  restored = jax.jit(lambda runs, where: restore.restored(config, p, runs, jnp.asarray(0), where))
  for kind in restore.KINDS:
    for put_back, wanted in ((True, found.clean), (False, found.corrupted)):
      # What layers add is put back at every token; the blurred embeddings themselves remain below it.
      if kind != 'block' and put_back:
        continue
      where = {kind: jnp.full((config.depth, len(tokens)), put_back)}
      h = restored(runs, where)
      p_answer = restore.probability(config, p, h, jnp.asarray(5))[:, found.answer]
      np.testing.assert_allclose(p_answer.mean(), wanted, rtol=1e-4)


def test_padding_and_chunks_do_not_matter_and_an_answer_can_be_given():
  p = causal.draw(jax.random.key(0), LLAMA, 0.4)
  longer = PROMPT._replace(tokens=np.concatenate([PROMPT.tokens, [-1, -1]]).astype(np.int32))
  tiny = 1e-30  # noise is drawn by shape; without it the rows must agree
  one = tracing.trace(LLAMA, p, PROMPT._replace(answer=7), KEY, tiny, **OPTIONS)
  two = tracing.trace(LLAMA, p, longer._replace(answer=7), KEY, tiny, **OPTIONS | {'width': 8})
  assert int(one.answer) == int(two.answer) == 7
  np.testing.assert_allclose(one.clean, one.corrupted, rtol=1e-5)
  np.testing.assert_allclose(one.maps, two.maps[..., :6], rtol=1e-5)
  free = tracing.trace(LLAMA, p, PROMPT, KEY, tiny, **OPTIONS)
  assert free.clean > one.clean


def test_wrong_prompts_are_refused():
  p = causal.draw(jax.random.key(0), LLAMA, 0.4)
  for wrong, match in (
    (PROMPT._replace(lo=3), 'subject'),
    (PROMPT._replace(hi=7), 'subject'),
    (PROMPT._replace(tokens=np.array([-1, 1, 2, 3])), 'right'),
    (PROMPT._replace(tokens=np.array([1, 2, 3, 40])), 'above the 40'),
    (PROMPT._replace(answer=40), 'above the 40'),
  ):
    with pytest.raises(UserError, match=match):
      tracing.trace(LLAMA, p, wrong, KEY, 1.0)
  with pytest.raises(UserError, match='positive'):
    tracing.trace(LLAMA, p, PROMPT, KEY, 1.0, samples=0)
  with pytest.raises(UserError, match='as many'):
    tracing.average([], [])


class Letters:
  """A tokenizer of single letters that joins a space to what follows, as byte-level BPE does."""

  def encode(self, text, add_special_tokens):
    offsets, at = [], 0
    while at < len(text):
      end = min(at + (2 if text[at] == ' ' else 1), len(text))
      offsets.append((at, end))
      at = end
    ids = [ord(text[b - 1]) for _, b in offsets]
    return SimpleNamespace(ids=ids, offsets=offsets, special_tokens_mask=[0] * len(ids))


def test_the_subject_is_found_in_the_text():
  found = tracing.prompt(Letters(), 'so ab c is', 'ab c', 'xy')
  assert found.tokens.tolist() == [ord(c) for c in 'soabcis'] and found[1:] == (2, 5, ord('x'))
  assert tracing.prompt(Letters(), 'ab', 'ab')[1:] == (0, 2, -1)
  for subject in ('', 'ba'):
    with pytest.raises(UserError, match='does not name'):
      tracing.prompt(Letters(), 'so ab c is', subject)


def test_noise_is_three_standard_deviations_over_the_subjects():
  p = causal.draw(jax.random.key(0), LLAMA, 0.4)
  table = np.asarray(p['embed']['tokens'])
  other = PROMPT._replace(lo=4, hi=6)
  wanted = 3 * table[[17, 5, 8, 11]].std()
  np.testing.assert_allclose(tracing.noise(p, [PROMPT, other]), wanted, rtol=1e-6)


def test_averages_are_by_role():
  def traced(prompt, n):
    maps = np.arange(3 * 2 * n, dtype=np.float32).reshape(3, 2, n)
    return prompt, Trace(np.int32(0), np.float32(0.9), np.float32(0.5), maps)

  long = traced(Prompt(np.arange(8), 1, 5), 8)  # . s s s s a b c
  short = traced(Prompt(np.array([0, 1, 2, -1, -1, -1, -1, -1]), 0, 1), 8)  # s a c
  ends = traced(Prompt(np.arange(3), 1, 3), 3)  # . s s
  found = tracing.average(*zip(long, short, ends, strict=True))
  assert found.tokens.tolist() == [3, 2, 3, 2, 1, 3]
  effect = lambda t, i: t[1].maps[..., i].astype(np.float64) - 0.5  # noqa: E731
  for role, parts in enumerate(
    (
      [effect(long, 1), effect(short, 0), effect(ends, 1)],
      [effect(long, 2), effect(long, 3)],
      [effect(long, 4), effect(short, 0), effect(ends, 2)],
      [effect(long, 5), effect(short, 1)],
      [effect(long, 6)],
      [effect(long, 7), effect(short, 2), effect(ends, 2)],
    )
  ):
    np.testing.assert_allclose(found.effect[..., role], np.mean(parts, 0))
  np.testing.assert_allclose([found.clean, found.corrupted], [0.9, 0.5], rtol=1e-6)
  none = tracing.average([short[0]], [short[1]])
  assert np.isnan(none.effect[..., 1]).all() and np.isnan(none.effect[..., 4]).all()


def test_layers_are_where_mlps_matter_most_at_the_last_subject_token():
  effect = np.random.default_rng(0).uniform(0.5, 1, (3, 8, 6))
  effect[1, :, 2] = [0, 0.1, 0.3, 0.3, 0.2, 0.0, 0.25, 0]
  found = Average(0.9, 0.1, effect, np.ones(6, int))
  assert tracing.layers_of(found, 3) == (2, 3, 4)
  assert tracing.layers_of(found, 1) == (2,)
  assert tracing.layers_of(found, 8) == tuple(range(8))
  with pytest.raises(UserError, match='9 layers'):
    tracing.layers_of(found, 9)
  # Without the lowest, of which no window is free of the first MLP.
  assert tracing.layers_of(found, 3, lowest=3) == (3, 4, 5)
  with pytest.raises(UserError, match='6 layers cannot be chosen among 5'):
    tracing.layers_of(found, 6, lowest=3)


def test_fewer_facts_than_were_traced_before_are_averaged_and_drawn_alone(
  tmp_path, monkeypatch, capsys
):
  """As where no others had been traced."""
  draw = np.random.default_rng(0).uniform(0.1, 0.9, (4, 3, 12, 6))
  keys = ('prompt', 'subject', 'attribute')
  facts = [({'known_id': i} | dict.fromkeys(keys, 'x'), PROMPT) for i in range(4)]
  subject: Any = SimpleNamespace(
    config=None, backbone={}, tokenizer=SimpleNamespace(decode=lambda ids: str(ids[0]))
  )
  shown = [*draw, *draw[:2], draw[0][:, :4]]
  left = [Trace(np.int32(5), np.float32(0.9), np.float32(0.1), maps) for maps in shown]
  monkeypatch.setattr(edit_trace, 'known', lambda subject, data, n, tell: (1.0, facts[:n], 9))
  monkeypatch.setattr(tracing, 'traces', lambda *args, **options: [left.pop(0)])
  said = []
  for name, n in (('long', 4), ('long', 2), ('short', 2), ('shallow', 1)):
    edit_trace.trace(subject, 'model', tmp_path, n, tmp_path / name, 'command', lambda line: None)
    text = capsys.readouterr().out.replace(name, '')
    said.append((text, (tmp_path / name / 'average.png').read_bytes()))
  assert said[0] != said[1] == said[2]
  assert 'effect of 4 at the last subject token: (0, 1, 2, 3)' in said[3][0], 'a network of four'
  assert len(edit_trace.read(tmp_path / 'long' / edit_trace.FILE)[0]) == 4, 'all are kept'
