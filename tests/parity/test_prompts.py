"""Prompts and prefixes on a tiny ViT against the float64 references (see tests/parity/reference)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax.learner import learner
from cl_jax.masks import nest
from cl_jax.methods.prompts import coda as coda_module
from cl_jax.methods.prompts.coda import coda
from cl_jax.methods.prompts.dualprompt import dualprompt
from cl_jax.methods.prompts.l2p import l2p
from cl_jax.methods.prompts.prefix_tuning import prefix_tuning
from cl_jax.methods.prompts.prompt_tuning import prompt_tuning
from cl_jax.methods.prompts.sprompts import sprompts
from cl_jax.models import causal
from cl_jax.models.decoder import decoder
from cl_jax.models.vit import Config, vit
from tests.compiling import quick
from tests.parity.shared import Golden, batch_of, close, fixed

CONFIG = Config(image=4, patch=2, channels=1, d=8, depth=3, heads=2, ffn=12, eps=1e-12)
CLASSES = 6

# The network normalises and takes softmax in float32 whatever its inputs are, and so queries are rounded too:
# hence 5e-6, and 2e-5 for DualPrompt, where rounding adds up to 1.7e-5 in two logits. With these in float64
# as well all of it agrees to 1e-12.


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def start(g, method, own):
  """A learner whose backbone is frozen; its head is trained, and the parameters `own` of the method."""
  params = nest({k[5:]: jnp.asarray(g[k]) for k in g.data.files
                 if k.startswith(('init/backbone/', 'init/head/'))})  # fmt: skip
  inner = method.init
  added = {name: {k: jnp.asarray(a) for k, a in leaves.items()} for name, leaves in own.items()}
  method = method._replace(init=lambda *a: (added, inner(*a)[1]))  # the method's own state
  frozen = {'backbone': params['backbone']}
  L = learner(fixed(vit(CONFIG, CLASSES), params), optax.sgd(float(g['lr'])), method, frozen)
  return L, L.init(jax.random.key(0), weighted(g, 0, 0))


def weighted(g, *at):
  """The rows of a step, or the steps of a task, with their weights."""
  x, y, w = (jnp.asarray(g[k][at]) for k in ('xs', 'ys', 'ws'))
  return batch_of(x, y)._replace(w=w)


def follow(g, v, method, own, leaves, rtol):
  """Yields (t, place, state, predict) at the end of every task and behind its boundary, every step compared.

  Args:
    g, v: the golden file, and the start of its keys.
    own: the method's initial parameters.
    leaves: {name in the golden file: (name of ours below the method's)}; the head's are added.
    rtol: of losses and parameters.
  """
  (name,) = own
  L, state = start(g, method, own)
  step, boundary = quick(L.step), quick(L.boundary)
  probe = batch_of(g['probe'], np.zeros(len(g['probe'])))
  predict = quick(lambda state: L.predict(state, probe))
  headed = f'{v}params/head/w' in g.data.files
  every = not headed or g[f'{v}params/head/w'].ndim == 4  # after every step, else after every task

  def compare(*at):
    for theirs, ours in leaves.items():
      close(state.params[name][ours], g[f'{v}params/{theirs}'][at], rtol=rtol)
    for leaf in 'wb' if headed else '':
      close(state.params['head'][leaf], g[f'{v}params/head/{leaf}'][at], rtol=rtol)

  for t in range(len(g['xs'])):
    for i in range(g['xs'].shape[1]):
      state, loss = step(state, weighted(g, t, i))
      close(loss, g[f'{v}loss'][t, i], rtol=rtol)
      if every:
        compare(t, i)
    if not every:
      compare(t)
    yield t, 'end', state, predict
    state = boundary(state, weighted(g, t))
    yield t, 'behind', state, predict


def test_prompt_tuning():
  g = Golden('prompt_tuning')
  own = {'prompt_tuning': {'prompt': g['init/P']}}
  places = follow(g, '', prompt_tuning(3), own, {'P': 'prompt'}, rtol=5e-6)
  for t, _, state, predict in places:
    close(predict(state), g['probe_logits'][t], rtol=5e-6)


@pytest.mark.parametrize(('ids', 'rows'), [('tokens', 'P'), ('many', 'P_many')])
def test_prompt_tuning_starts_from_labels(ids, rows):
  """In a network that embeds a token by its row of the table alone."""
  g = Golden('prompt_tuning')
  method = prompt_tuning(5, 'labels', tuple(int(i) for i in g[f'labels/{ids}']))
  model = decoder(causal.Config(7, 8, 1, 2, 2, 12, 10), 2)
  text = batch_of(np.zeros((2, 3), np.int32), np.zeros(2))
  text = text._replace(x={'tokens': text.x, 'mask': np.ones((2, 3), bool)})
  params, _ = model.init(jax.random.key(0), text)
  backbone = {**params['backbone'], 'embed': {'tokens': jnp.asarray(g['labels/table'])}}
  state = learner(model, optax.sgd(0.1), method, {'backbone': backbone}).init(
    jax.random.key(0), text
  )
  close(state.params['prompt_tuning']['prompt'], g[f'labels/{rows}'])


def test_prefix_tuning():
  g = Golden('prefix_tuning')
  own = {'prefix_tuning': {'keys': g['init/K'], 'values': g['init/V']}}
  places = follow(g, '', prefix_tuning(2), own, {'K': 'keys', 'V': 'values'}, rtol=5e-6)
  for t, _, state, predict in places:
    close(predict(state), g['probe_logits'][t], rtol=5e-6)


@pytest.mark.parametrize('v', ['row', 'vote'])
def test_l2p(v):
  g = Golden('l2p')
  method = l2p(6, int(g['top']), 2, float(g['coef']), vote=v == 'vote')
  leaves = {'P': 'prompts', 'K': 'keys'}
  own = {'l2p': {'prompts': g['init/P'], 'keys': g['init/K']}}
  for t, _, state, predict in follow(g, f'{v}/', method, own, leaves, rtol=5e-6):
    close(predict(state), g[f'{v}/probe_logits'][t], rtol=5e-6)


@pytest.mark.parametrize('v', ['apart', 'overlap'])
def test_dualprompt(v):
  """Behind a boundary the finished tasks alone compete, until the next one takes its first step."""
  g = Golden('dualprompt')
  layers = [tuple(int(i) for i in g[f'{v}/{kind}_layers']) for kind in ('general', 'expert')]
  method = dualprompt(3, 2, 3, float(g['coef']), *layers)
  leaves = {'G': 'general', 'E': 'expert', 'K': 'keys'}
  starts = {'general': g[f'{v}/init/G'], 'expert': g[f'{v}/init/E'], 'keys': g['init/K']}
  places = follow(g, f'{v}/', method, {'dualprompt': starts}, leaves, rtol=2e-5)
  for t, place, state, predict in places:
    close(predict(state), g[f'{v}/probe_logits'][t], rtol=2e-5)
    if place == 'behind':
      begun = state._replace(method=state.method._replace(begun=state.method.now + 1))
      close(predict(begun), g[f'{v}/probe_after'][t], rtol=2e-5)


def subtracted_one_by_one(x, begin, count):
  """The official code's Gram-Schmidt, which takes earlier rows for orthogonal."""

  def row(i, x):
    earlier = (jnp.arange(len(x)) < i)[:, None] * x
    share = earlier @ x[i] / jnp.maximum(jnp.square(earlier).sum(1), 1e-30)
    rest = x[i] - share @ earlier
    return jnp.where(i >= begin, x.at[i].set(rest / jnp.sqrt(jnp.square(rest).sum())), x)

  return jax.lax.fori_loop(0, begin + count, row, x)


@pytest.mark.parametrize('v', ['plain', 'ortho', 'published'])
def test_coda(v, monkeypatch):
  """As above behind a boundary; with the official Gram-Schmidt in place of ours the official values."""
  g = Golden('coda')
  if v == 'published':
    monkeypatch.setattr(coda_module, 'orthogonal', subtracted_one_by_one)
  coef = float(g['ortho/coef']) if v == 'ortho' else 0.0
  method = coda(3, 6, 4, coef, tuple(int(i) for i in g['layers']))
  leaves = {'P': 'prompts', 'K': 'keys', 'A': 'attention'}

  def first(a):  # as `init` leaves what it draws
    flat = jnp.asarray(a).reshape(*a.shape[:2], -1)
    return jax.vmap(lambda x: coda_module.orthogonal(x, 0, 2))(flat).reshape(a.shape)

  own = {'coda': {ours: first(g[f'init/{theirs}']) for theirs, ours in leaves.items()}}
  for theirs, ours in leaves.items():
    close(own['coda'][ours], g[f'{v}/start/{theirs}'][0])
  for t, place, state, predict in follow(g, f'{v}/', method, own, leaves, rtol=5e-6):
    close(predict(state), g[f'{v}/probe_logits'][t], rtol=5e-6)
    if place == 'behind':
      for theirs, ours in leaves.items() if t < 2 else ():
        close(state.params['coda'][ours], g[f'{v}/start/{theirs}'][t + 1], rtol=5e-6)
      begun = state._replace(method=state.method._replace(begun=state.method.now + 1))
      close(predict(begun), g[f'{v}/probe_after'][t], rtol=5e-6)


def test_sprompts():
  """Of the tasks whose boundary was told the nearest centroid decides; before the first one, the current."""
  g = Golden('sprompts')
  method = sprompts(3, 2, int(g['k']), int(g['iters']), unit=False)
  own = {'sprompts': {'prompts': g['init/P'], 'w': g['init/w'], 'b': g['init/b']}}
  leaves = {'P': 'prompts', 'w': 'w', 'b': 'b'}
  for t, place, state, predict in follow(g, '', method, own, leaves, rtol=5e-6):
    close(predict(state), g['probe_after' if place == 'behind' else 'probe_logits'][t], rtol=5e-6)
    if place == 'behind':
      close(state.method.centroids[: t + 1], g['centroids'][: t + 1], rtol=5e-6)
