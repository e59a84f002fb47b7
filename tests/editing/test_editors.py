"""What every editor has to keep to, on a tiny Llama and GPT-2; and the rules of each that are closed."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cl_jax.editing
from cl_jax.editing import (
  alphaedit,
  evaluate,
  finetune,
  grace,
  inside,
  lora,
  memit,
  pmet,
  rome,
  rows,
  target,
  wise,
  write,
)
from cl_jax.editing.rows import Requests, Rows
from cl_jax.editing.target import Recipe
from cl_jax.editing.write import Editor
from cl_jax.errors import UserError
from cl_jax.models import causal
from cl_jax.models.causal import Config
from cl_jax.types import Array, Tree, no_tap
from tests.compiling import quick

CONFIGS = {
  'llama': Config(40, 16, 4, 4, 2, 24, 32),
  'gpt2': Config(40, 16, 4, 4, 4, 24, 32, norm='layer', rope=False, gated=False),
}
N, CONTEXTS = 3, 2
MOMENTS = {layer: 0.01 * np.eye(24) for layer in range(4)}
# Half of the directions are in AlphaEdit's null space.
HALF = {layer: np.diag(np.where(np.arange(24) % 2, 0.01, 0.03)) for layer in MOMENTS}
RECIPE = Recipe(steps=30, clamp=4.0, decay=0.0)
NORM = 2e-2
ROUTER = wise.Training(steps=60, rate=1.0, margins=(1.0, 3.0, 1.0))


@cache
def draw(seed: int) -> Requests:
  """3 requests of different lengths, in 2 contexts; the shapes are the same for every seed."""
  r = np.random.default_rng(seed)
  token = lambda n: r.integers(0, 40, n).tolist()  # noqa: E731
  found = []
  for n in range(N):
    prompt, target = token(4 + n), token(1 + n)
    # The subject ends the prompt: a random model moves little of it to later tokens.
    at = 3 + n
    found += [([*prefix, *prompt], at + len(prefix), target) for prefix in ([], token(2))]
  flat = rows.layout(found)
  rewrite = Rows(*(a.reshape(N, CONTEXTS, -1) for a in flat))
  return Requests(rewrite, rows.layout([(token(4), 1, []) for _ in range(N)]))


UNRELATED = rows.layout([(np.random.default_rng(9).integers(0, 40, 6).tolist(), 2, [])] * 2)


class Cut:
  """`Rounds` that stop after `end` of them, and in the next call go on with what numpy has of the carry."""

  def __init__(self) -> None:
    self.end, self.kept = -1, (0, [])

  def __call__(self, name, n, carry, step):
    begin, leaves = self.kept
    if leaves:
      carry = jax.tree.unflatten(jax.tree.structure(carry), list(map(jnp.asarray, leaves)))
    for i in range(begin, n):
      carry = step(i, carry)
      if i + 1 == self.end < n:
        self.kept = i + 1, [np.asarray(a) for a in jax.tree.leaves(carry)]
        raise InterruptedError(name)
    self.kept = 0, []
    return carry


CUT = Cut()
# Every editor by the name of its factory. Rates are those of a model with 16 channels.
CASES = {
  'rome': lambda c: rome.rome(c, MOMENTS, 1, RECIPE, CUT),
  'memit': lambda c: memit.memit(c, MOMENTS, (0, 1, 2), 1.0, RECIPE, 2, CUT),
  'pmet': lambda c: pmet.pmet(c, MOMENTS, (0, 1, 2), 1.0, RECIPE, 2, rounds=CUT),
  'alphaedit': lambda c: alphaedit.alphaedit(
    c, HALF, (0, 1, 2), coef=1.0, recipe=RECIPE, width=2, rounds=CUT
  ),
  'finetune': lambda c: finetune.finetune(c, (1, 2), rate=5e-3, norm=NORM, rounds=CUT),
  'lora_edit': lambda c: lora.lora_edit(c, rank=2, alpha=4.0, steps=20, rate=2e-2, rounds=CUT),
  'grace': lambda c: grace.grace(
    c, 2, capacity=8, eps=0.1, steps=30, rate=0.1, width=2, rounds=CUT
  ),
  'wise': lambda c: wise.wise(c, 2, UNRELATED, training=ROUTER, rounds=CUT),
}
BATCHED = ('memit', 'pmet', 'alphaedit', 'finetune')
STATEFUL = ('alphaedit', 'grace', 'wise')
# Every editor on one family, MEMIT on both: programs take long to compile, and parity has both for the rest.
padded = [(name, ('gpt2', 'llama')[name in ('pmet', 'lora_edit', 'grace')]) for name in CASES]
ALL = [*padded, ('memit', 'llama')]
every = pytest.mark.parametrize('case', ALL, ids=['-'.join(c) for c in ALL], indirect=True)
batched = [c for c in padded if c[0] in BATCHED]


class Case(NamedTuple):
  """Two batches written one after the other, and all that came out."""

  name: str
  config: Config
  editor: Editor
  backbone: Tree
  before: dict
  states: list
  writes: list
  reports: list


@pytest.fixture(scope='module', autouse=True)
def quick_targets(quickly):
  """The largest program takes a sixth."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(target, '_group', quick(target._group, static_argnums=(0, 2, 3, 4)))
    yield


@pytest.fixture(scope='module')
def cases() -> dict[tuple[str, str], Case]:
  return {}


@pytest.fixture
def case(request, cases) -> Case:
  """Each case is run once, for all tests."""
  if request.param not in cases:
    name, family = request.param
    config = CONFIGS[family]
    editor = CASES[name](config)
    backbone = causal.draw(jax.random.key(0), config, 0.3)
    before = {p: np.array(a) for p, a in write.paths(backbone).items()}
    states, writes, reports = [editor.init(backbone)], [], []
    now = backbone
    for i in range(2):
      new, state, report = editor.edit(now, states[-1], draw(i), jax.random.key(i))
      now = write.apply(now, new)
      states, writes, reports = [*states, state], [*writes, new], [*reports, report]
    cases[request.param] = Case(name, config, editor, backbone, before, states, writes, reports)
  return cases[request.param]


@partial(jax.jit, static_argnums=(0, 1))
def log_p(config: Config, tap: Any, p: Tree, state: Tree, some: Rows) -> Array:
  """log p of all that follows, through the editor's tap if it has one."""
  columns = some.head.shape[-1] + some.before[:, 0]
  return inside.forward(config, p, some, tap(state, columns) if tap else no_tap)


mean = jax.jit(inside.mean_log_p)


def said(case: Case, p: Tree, state: Tree, some: Rows) -> np.ndarray:
  """[n] mean log p of the targets of rows [n, ...]."""
  return np.asarray(mean(log_p(case.config, case.editor.tap, p, state, some), some.target))


def leaves(tree: Tree) -> list[np.ndarray]:
  return [np.asarray(a) for a in jax.tree.leaves(tree)]


def widen(some: Rows) -> Rows:
  """The same rows with columns of padding around them."""
  left = lambda a, n: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(n, 0)], constant_values=-1)  # noqa: E731
  right = lambda a, n: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, n)], constant_values=-1)  # noqa: E731
  return Rows(left(some.head, 3), right(some.tail, 2), right(some.before, 1), right(some.target, 1))


def test_alphaedit_refuses_a_threshold_that_projects_nothing():
  for threshold, said in ((1e-3, 'nothing is below it'), (1.0, 'everything is below it')):
    with pytest.raises(UserError, match=f'{said}.*layer 0.*\\[0.01, 0.03\\]'):
      alphaedit.alphaedit(CONFIGS['llama'], HALF, (0, 1), threshold)


def test_every_editor_of_the_package_is_here():
  found = set()
  for module in pkgutil.iter_modules(cl_jax.editing.__path__):
    for name, f in vars(importlib.import_module(f'cl_jax.editing.{module.name}')).items():
      if inspect.isfunction(f) and f.__annotations__.get('return') in ('Editor', Editor):
        found.add(name)
  assert found == set(CASES)


@every
def test_targets_become_more_probable(case):
  p = case.backbone
  for i in range(2):
    some = rows.plain(draw(i).rewrite)
    new = write.apply(p, case.writes[i])
    before = said(case, p, case.states[i], some)
    after = said(case, new, case.states[i + 1], some)
    assert after.mean() > before.mean() + 0.2
    p = new


@every
def test_reports_have_a_number_for_each_request(case):
  for report in case.reports:
    assert {'loss', 'log_p'} <= set(report)
    for value in report.values():
      assert np.shape(value) == (N,)
    assert np.isfinite(report['loss']).all() and (np.asarray(report['log_p']) <= 0).all()


@every
def test_same_inputs_same_bytes_and_the_model_stays_as_it_was(case):
  again = case.editor.edit(case.backbone, case.states[0], draw(0), jax.random.key(0))
  for a, b in zip(
    leaves(again), leaves((case.writes[0], case.states[1], case.reports[0])), strict=True
  ):
    assert a.tobytes() == b.tobytes()
  for path, a in write.paths(case.backbone).items():
    assert np.asarray(a).tobytes() == case.before[path].tobytes()


@every
def test_a_cut_edit_goes_on_with_the_same_bits(case, monkeypatch):
  monkeypatch.setattr(CUT, 'end', 1)
  with pytest.raises(InterruptedError):
    case.editor.edit(case.backbone, case.states[0], draw(0), jax.random.key(0))
  assert CUT.kept[0] == 1
  again = case.editor.edit(case.backbone, case.states[0], draw(0), jax.random.key(0))
  for a, b in zip(
    leaves(again), leaves((case.writes[0], case.states[1], case.reports[0])), strict=True
  ):
    assert a.tobytes() == b.tobytes()


@every
def test_state_keeps_its_structure(case):
  shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), state) for state in case.states]
  assert shapes[0] == shapes[1] == shapes[2]
  assert bool(leaves(case.states[0])) == (case.name in STATEFUL)
  for old, new in zip(case.states, case.states[1:], strict=False):
    if case.name in STATEFUL:
      assert any(a.tobytes() != b.tobytes() for a, b in zip(leaves(old), leaves(new), strict=True))


@every
def test_an_editor_writes_weights_or_taps(case):
  assert (case.editor.tap is None) == bool(case.writes[0])


@every
def test_undoing_a_batch_gives_the_bits_of_before(case):
  terms = [*case.writes[0], *case.writes[1]]
  both = write.apply(case.backbone, terms)
  undone = write.apply(case.backbone, terms[: len(case.writes[0])])
  first = write.apply(case.backbone, case.writes[0])
  for a, b in zip(leaves(undone), leaves(first), strict=True):
    assert a.tobytes() == b.tobytes()
  if terms:
    assert any(a.tobytes() != b.tobytes() for a, b in zip(leaves(both), leaves(first), strict=True))


@every
def test_bytes_are_those_that_are_kept(case):
  held = 0
  for w in case.writes[0]:
    shape = case.backbone['layers'][w.path.split('/')[1]]['w'].shape[1:]
    assert w.term.shape == shape
    held += np.asarray(w.left).nbytes + (0 if w.right is None else np.asarray(w.right).nbytes)
  assert write.size(case.writes[0]) == held
  whole = sum(4 * 24 * 16 for w in case.writes[0] if w.right is None)
  assert whole == (2 * 4 * 24 * 16 if case.name == 'finetune' else 0)


@pytest.mark.parametrize('case', padded, ids=['-'.join(c) for c in padded], indirect=True)
def test_padding_does_not_matter(case):
  wide = Requests(*(widen(some) for some in draw(0)))
  writes, state, _ = case.editor.edit(case.backbone, case.states[0], wide, jax.random.key(0))
  for a, b in zip(writes, case.writes[0], strict=True):
    assert (a.path, a.layer) == (b.path, b.layer)
    np.testing.assert_allclose(a.term, b.term, atol=1e-5)
  for a, b in zip(leaves(state), leaves(case.states[1]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('case', batched, ids=['-'.join(c) for c in batched], indirect=True)
def test_the_order_of_a_batch_does_not_matter(case):
  turned = rows.take(draw(0), [2, 0, 1])
  writes, _, report = case.editor.edit(case.backbone, case.states[0], turned, jax.random.key(0))
  for a, b in zip(writes, case.writes[0], strict=True):
    np.testing.assert_allclose(a.term, b.term, atol=1e-4)
  np.testing.assert_allclose(
    report['loss'], np.asarray(case.reports[0]['loss'])[[2, 0, 1]], atol=1e-4
  )


@pytest.mark.parametrize('at', [0, 2, -1])
def test_rows_that_are_cut_elsewhere_say_the_same(at):
  config, some = CONFIGS['gpt2'], rows.flat(draw(0).rewrite)
  p = causal.draw(jax.random.key(0), config, 0.3)
  new = rows.cut(some, at)
  prompts = np.asarray((some.head >= 0).sum(-1) + some.before[:, 0] + 1)
  assert (new.head >= 0).sum(-1).tolist() == (
    [at] * len(prompts) if at >= 0 else (prompts + at).tolist()
  )
  assert new.head.shape[-1] + new.tail.shape[-1] <= some.head.shape[-1] + some.tail.shape[-1]
  before, after = (mean(log_p(config, None, p, (), r), r.target) for r in (some, new))
  np.testing.assert_allclose(before, after, atol=1e-5)


# FT and FT-L.


def finetuned(**changed):
  config = CONFIGS['llama']
  p = causal.draw(jax.random.key(0), config, 0.3)
  editor = finetune.finetune(config, **({'layers': (1, 2), 'rate': 5e-3, 'norm': NORM} | changed))
  return p, *editor.edit(p, (), draw(0), jax.random.key(0))


def test_ft_l_stays_within_its_bound_and_reaches_it():
  for w in finetuned()[1]:
    assert w.path == 'layers/down/w' and np.abs(w.left).max() == np.float32(NORM)
  assert min(np.abs(w.left).max() for w in finetuned(norm=None)[1]) > 2 * NORM


def test_the_first_step_of_ft_is_the_sign_of_the_gradient_of_the_whole_model():
  """The gradient by `causal.encode`, which knows nothing of rows, taps or terms."""
  p, writes, _, _ = finetuned(steps=1)
  some = rows.plain(draw(0).rewrite)
  lines = [
    [t for t in [*map(int, h), *map(int, a)] if t >= 0] for h, a in zip(*some[:2], strict=True)
  ]
  counts = np.asarray(some.target >= 0).sum(-1)
  longest = max(map(len, lines))
  tokens = jnp.asarray([line + [0] * (longest - len(line)) for line in lines])
  mask = jnp.asarray([[1] * len(line) + [0] * (longest - len(line)) for line in lines])

  @jax.jit
  @jax.grad
  def gradient(w):
    q = p | {'layers': p['layers'] | {'down': {'w': w}}}
    h, _ = causal.encode(CONFIGS['llama'], q, {'tokens': tokens, 'mask': mask})
    log_p = jax.nn.log_softmax(causal.unembed(CONFIGS['llama'], q, h), -1)
    one = lambda i, j: log_p[i, j - 1, lines[i][j]]  # noqa: E731
    ends = [range(len(a) - n, len(a)) for a, n in zip(lines, counts, strict=True)]
    return -sum(sum(one(i, j) for j in e) / len(e) for i, e in enumerate(ends)) / N

  g = np.asarray(gradient(p['layers']['down']['w']))
  for w in writes:
    clear = np.abs(g[w.layer]) > 1e-4
    assert clear.mean() > 0.9
    np.testing.assert_allclose(
      np.asarray(w.left)[clear], -5e-3 * np.sign(g[w.layer])[clear], rtol=1e-3
    )


def test_mini_batches_and_the_end_of_training():
  _, all_at_once, _, _ = finetuned(norm=None)
  _, two, _, report = finetuned(norm=None, batch=2, rate=2e-2, steps=60, stop=1.5)
  assert np.abs(all_at_once[0].left - two[0].left).max() > 1e-3
  assert np.asarray(report['loss']).mean() < 1.5
  # Once a pass stays below the threshold nothing moves any more.
  _, more, _, _ = finetuned(norm=None, batch=2, rate=2e-2, steps=120, stop=1.5)
  assert np.asarray(more[0].left).tobytes() == np.asarray(two[0].left).tobytes()


# GRACE.


def codebook(queries, labels, eps, capacity):
  """The rules of GRACE in lists: keys, radii, labels, and the entry of every request (-1 when refused)."""
  keys, radii, names, entries = [], [], [], []
  for q, label in zip(queries, labels, strict=True):
    d = [float(np.linalg.norm(q - k)) for k in keys]
    i = int(np.argmin(d)) if d else None
    near = i is not None and d[i] <= eps + radii[i]
    if near and names[i] == label:
      radii[i] = max(radii[i], d[i])
      entries.append(i)
    elif near and d[i] <= 1e-4 * eps:
      names[i] = label
      entries.append(i)
    elif len(keys) == capacity:
      entries.append(-1)
    else:
      first = eps
      if near:
        first, radii[i] = d[i] / 2, d[i] / 2 - 1e-5
      keys.append(q)
      radii.append(first)
      names.append(label)
      entries.append(len(keys) - 1)
  return np.array(keys), np.array(radii), names, entries


def test_the_rules_of_the_codebook():
  """On the line and in the plane, against lists; small integers as labels so that all cases occur."""
  capacity, eps = 12, 0.4
  insert = jax.jit(partial(grace.insert, eps=eps))
  config = CONFIGS['llama']._replace(d=2)
  blank = grace.grace(config, 2, capacity=capacity).init({'embed': {'tokens': jnp.zeros((1, 2))}})
  full = 0
  for seed in range(20):
    r = np.random.default_rng(seed)
    queries = r.uniform(-2, 2, (30, 2)).astype(np.float32)
    if seed % 2:
      queries[:, 1] = 0
    queries[20:23] = queries[:3]
    labels = r.integers(0, 2, 30)
    keys, radii, names, entries = codebook(queries, labels, eps, capacity)
    state, found = blank, []
    for q, label in zip(queries, labels, strict=True):
      state, entry, _ = insert(state, jnp.asarray(q), jnp.asarray(label, jnp.int32), jnp.asarray(q))
      found.append(int(entry))
    assert found == entries
    n = int(state['count'])
    assert n == len(keys)
    np.testing.assert_allclose(state['keys'][:n], keys)
    np.testing.assert_allclose(state['radii'][:n], radii, atol=1e-5)
    assert np.asarray(state['labels'][:n]).tolist() == [int(v) for v in names]
    full += -1 in entries
  assert full > 2


def test_keys_that_nearly_meet_keep_a_radius():
  """Half of a distance below what is taken off it is no radius; the first key is still found at itself."""
  config, eps = CONFIGS['llama']._replace(d=2), 0.05
  state = grace.grace(config, 2, capacity=3).init({'embed': {'tokens': jnp.zeros((1, 2))}})
  for label, x in enumerate((0.0, 1.5e-5)):
    q = jnp.array([x, 0.0])
    state, entry, _ = grace.insert(state, q, jnp.asarray(label, jnp.int32), q, eps)
    assert int(entry) == label
  distance, i = grace.nearest(state, jnp.zeros(2))
  assert int(i) == 0 and distance <= state['radii'][0] == 0


def test_layers_with_gaps_share_by_how_many_are_left():
  """As in compute_z and its loops: not by how far the last one is."""
  config, seen = CONFIGS['llama'], []
  p = causal.draw(jax.random.key(0), config, 0.3)
  goal = jnp.zeros((N, config.d))
  solve = lambda layer, keys: np.zeros_like(keys)  # noqa: E731
  share = lambda rest: seen.append(rest) or 1 / rest  # noqa: E731
  memit.spread(config, p, draw(0), goal, (0, 1, 3), solve, share)
  assert seen == [3, 2, 1]


GRACE = [c for c in ALL if c[0] == 'grace']
both = pytest.mark.parametrize('case', GRACE, ids=[f for _, f in GRACE], indirect=True)


@both
def test_grace_leaves_what_is_outside_every_radius(case):
  """Bit by bit, and the tap of a codebook without entries is no tap."""
  some, far = rows.plain(draw(0).rewrite), rows.plain(draw(7).rewrite)
  state, empty = case.states[1], case.states[0]
  assert int(state['count']) == N
  tap, p, c = case.editor.tap, case.backbone, case.config
  queries, _ = grace._states(c, 2, p, rows.cut(far, -1))
  for q in queries:
    distance, i = grace.nearest(state, q)
    assert distance > state['radii'][i] + 0.05
  kept = np.asarray(log_p(c, tap, p, state, far))
  assert kept.tobytes() == np.asarray(log_p(c, tap, p, empty, far)).tobytes()
  plain = np.asarray(log_p(c, None, p, (), far))
  np.testing.assert_allclose(kept, plain, atol=1e-6)
  assert np.abs(log_p(c, tap, p, state, some) - log_p(c, None, p, (), some)).max() > 0.1


@both
def test_grace_says_what_its_report_says(case):
  """The value is trained from the middle of the model, and looked up in a whole pass with a tap."""
  report = case.reports[0]
  assert (
    np.asarray(report['entry']).tolist() == [0, 1, 2] and not np.asarray(report['refused']).any()
  )
  found = said(case, case.backbone, case.states[1], rows.plain(draw(0).rewrite))
  np.testing.assert_allclose(found, report['log_p'], atol=1e-4)


def test_grace_refuses_what_does_not_fit_and_keeps_the_rest():
  config = CONFIGS['llama']
  p = causal.draw(jax.random.key(0), config, 0.3)
  small = grace.grace(config, 3, capacity=2, eps=0.1, steps=5, rate=0.1, warm=True)
  _, state, report = small.edit(p, small.init(p), draw(0), jax.random.key(0))
  assert np.asarray(report['refused']).tolist() == [False, False, True]
  assert int(state['count']) == 2
  some = rows.plain(draw(0).rewrite)
  base = mean(log_p(config, None, p, (), some), some.target)
  np.testing.assert_allclose(report['log_p'][2], base[2], atol=1e-5)
  _, again, _ = small.edit(p, state, rows.take(draw(0), [2, 2, 2]), jax.random.key(1))
  for a, b in zip(leaves(state), leaves(again), strict=True):
    assert a.tobytes() == b.tobytes()


def test_requests_that_share_an_entry_are_trained_in_turn():
  """All at once is what one after the other is: values that were trained before go on from there."""
  config = CONFIGS['llama']
  p = causal.draw(jax.random.key(0), config, 0.3)
  editor = grace.grace(config, 2, capacity=4, eps=0.1, steps=5, rate=0.1, warm=True, width=2)
  twice = [0, 1, 0, 2, 0]
  _, state, report = editor.edit(p, editor.init(p), rows.take(draw(0), twice), jax.random.key(0))
  assert np.asarray(report['entry']).tolist() == twice
  assert [turn.tolist() for turn in grace.turns(np.array([0, -1, 1, 0]))] == [[0, 2], [3]]
  now = editor.init(p)
  for n in twice:
    _, now, _ = editor.edit(p, now, rows.take(draw(0), [n]), jax.random.key(0))
  for a, b in zip(leaves(state), leaves(now), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  once = editor.edit(p, editor.init(p), rows.take(draw(0), [0, 1, 2]), jax.random.key(0))[1]
  assert np.abs(once['values'][0] - state['values'][0]).max() > 0.1


# WISE.


def merged(terms, weights, density):
  out = np.zeros_like(terms[0])
  trimmed = []
  for term in terms:
    order = np.argsort(-np.abs(term), axis=None)[: int(density * term.size)]
    kept = np.zeros(term.size)
    kept[order] = term.flat[order]
    trimmed.append(kept.reshape(term.shape))
  for at in np.ndindex(*out.shape):
    values = [t[at] for t in trimmed]
    up = sum(w * v for w, v in zip(weights, values, strict=True)) >= 0
    same = [(w, v) for w, v in zip(weights, values, strict=True) if (v > 0 if up else v < 0)]
    if same:
      out[at] = sum(w * v for w, v in same) / sum(w for w, _ in same)
  return out


def test_ties_against_loops():
  r = np.random.default_rng(0)
  for density, sparse in ((1.0, 0.0), (0.53, 0.0), (0.53, 0.8)):
    terms = r.normal(size=(3, 5, 7)).astype(np.float32) * (r.uniform(size=(3, 5, 7)) >= sparse)
    weights = np.array([0.2, 0.2, 0.6], np.float32)
    found = wise.ties(jnp.asarray(terms), jnp.asarray(weights), density)
    np.testing.assert_allclose(found, merged(terms, weights, density), atol=1e-6)


WISE = [c for c in ALL if c[0] == 'wise']
each = pytest.mark.parametrize('case', WISE, ids=[f for _, f in WISE], indirect=True)


def activations(config: Config, p: Tree, some: Rows) -> list[np.ndarray]:
  """What goes into 'down' of layer 2 at the tokens of each prompt, by `causal.encode` and without padding."""
  lines = [
    [int(t) for t in [*head[head >= 0], *tail[: before[0] + 1]]]
    for head, tail, before, _ in zip(*map(np.asarray, some), strict=True)
  ]
  longest = max(map(len, lines))
  full = lambda a: jnp.asarray([[*row, *[0] * (longest - len(row))] for row in a])  # noqa: E731

  kept = []

  def tap(name, h, layer=0):
    if name == 'mlp':
      kept.append(h)
    return h

  x = {'tokens': full(lines), 'mask': full([[1] * len(line) for line in lines])}
  with jax.disable_jit():  # one layer after the other, so that the tap sees numbers
    causal.encode(config, p, x, tap)
  found = np.asarray(kept[2])
  return [a[: len(line)] for a, line in zip(found, lines, strict=True)]


@each
def test_wise_routes_by_the_mean_distance_over_the_prompt(case):
  """A row changes if and only if its distance, from activations without padding, is above the threshold."""
  side, p, c = np.asarray(case.states[1]['side']), case.backbone, case.config
  some = rows.flat(draw(0).rewrite)
  found = [np.linalg.norm(a @ side, axis=-1).mean() for a in activations(c, p, some)]
  off = np.asarray(log_p(c, case.editor.tap, p, case.states[0], some))
  np.testing.assert_allclose(off, log_p(c, None, p, (), some), atol=1e-6)
  for threshold in np.sort(found)[:-1] + np.diff(np.sort(found)) / 2:
    state = case.states[1] | {'epsilon': jnp.float32(threshold / ROUTER.reach)}
    on = np.asarray(log_p(c, case.editor.tap, p, state, some))
    changed = np.array([a.tobytes() != b.tobytes() for a, b in zip(on, off, strict=True)])
    assert changed.tolist() == (np.array(found) > threshold).tolist()


@each
def test_wise_keeps_the_least_distance_and_its_bounds(case):
  least = [float(np.min(report['distance'])) for report in case.reports]
  assert float(case.states[1]['epsilon']) == least[0]
  assert float(case.states[2]['epsilon']) == min(least)
  assert [int(s['edits']) for s in case.states] == [0, N, 2 * N]
  share = (np.asarray(case.states[1]['side']) != 0).mean()
  assert 0.2 < share < 0.45  # two masks of a fifth each: 0.36


def test_wise_says_what_its_report_says():
  """One shard, trained from activations, against a whole pass through the tap, for the last request."""
  config = CONFIGS['llama']
  p = causal.draw(jax.random.key(0), config, 0.3)
  training = ROUTER._replace(density=1.0, ratio=1.0, bound=0.3)
  editor = wise.wise(config, 2, UNRELATED, 1, training)
  _, state, report = editor.edit(p, editor.init(p), draw(0), jax.random.key(0))
  side = np.asarray(state['side'])
  assert np.abs(side).max() <= np.float32(0.3)
  last = Rows(*(a[-1] for a in draw(0).rewrite))
  found = np.asarray(mean(log_p(config, editor.tap, p, state, last), last.target)).mean()
  np.testing.assert_allclose(found, report['log_p'][-1], atol=1e-4)
  far, near = (
    np.array([np.linalg.norm(a @ side, axis=-1).mean() for a in activations(config, p, some)])
    for some in (UNRELATED, last)
  )
  alpha, beta, gamma = training.margins
  broken = sum(np.maximum(0, v) for v in (far[0] - alpha, beta - near, gamma + far[0] - near))
  np.testing.assert_allclose(report['distance'][-1], near.min(), rtol=1e-4)
  np.testing.assert_allclose(report['loss'][-1], broken.mean() - found, rtol=1e-4)


@pytest.mark.parametrize('joint', [True, False])
def test_pmet_writes_the_part_of_the_mlp(joint):
  """One fact in one layer, written as it is: alone the MLP's delta then says what the report says, and with
  attention's, which is not written, less."""
  config = CONFIGS['llama']
  p = causal.draw(jax.random.key(0), config, 0.3)
  row = rows.layout([([5], 0, [7])])  # one token: nothing else has a key that is written to
  first = Requests(Rows(*(a[:, None] for a in row)), rows.layout([([5, 3], 0, [])]))
  editor = pmet.pmet(config, MOMENTS, (2,), 1e-6, RECIPE._replace(steps=6), joint=joint)
  writes, _, report = editor.edit(p, (), first, jax.random.key(0))
  found = np.asarray(mean(log_p(config, None, write.apply(p, writes), (), row), row.target))
  if joint:
    assert found < report['log_p'] - 0.1
  else:
    np.testing.assert_allclose(found, report['log_p'], rtol=1e-3)


@pytest.mark.parametrize('family', CONFIGS)
def test_writing_under_a_tap(family):
  """With a side memory that routes nothing it is `causal.generate`, token by token; with one that routes
  everything it is that of a model with the side memory in its weights."""
  config, steps, key = CONFIGS[family], 6, jax.random.key(3)
  p = causal.draw(jax.random.key(0), config, 0.3)
  side = jax.random.normal(jax.random.key(1), (config.ffn, config.d))
  prompts = [[5, 7, 11, 2], [9], [1, 3]]
  begun = rows.layout([(row, len(row) - 1, []) for row in prompts])
  padded = jnp.array([[0] * (4 - len(row)) + row for row in prompts])
  mask = jnp.array([[False] * (4 - len(row)) + [True] * len(row) for row in prompts])
  tap = lambda threshold, columns: wise.tap(1, side, threshold, columns)  # noqa: E731
  found = quick(evaluate.written, static_argnums=(0, 1, 2))
  plain = quick(causal.generate, static_argnums=(0, 4))
  edited = write.apply(p, [write.Write(inside.KEY, 1, side)])
  wanted = [np.asarray(plain(config, q, padded, mask, steps, key)) for q in (p, edited)]
  assert (wanted[0] != wanted[1]).any(1).all()
  for threshold, tokens in zip((jnp.inf, -1.0), wanted, strict=True):
    got = found(config, tap, steps, p, jnp.float32(threshold), begun, key)
    np.testing.assert_array_equal(got, tokens)
  with pytest.raises(UserError, match='36 tokens exceed the 32 positions'):
    evaluate.written(config, tap, 32, p, jnp.float32(0), begun, key)


@pytest.mark.parametrize(
  'make',
  [
    lambda c: finetune.finetune(c, ()),
    lambda c: finetune.finetune(c, (1, 1)),
    lambda c: finetune.finetune(c, (1,), batch=-1),
    lambda c: lora.lora_edit(c, (4,)),
    lambda c: lora.lora_edit(c, paths=('layers/o/w',)),
    lambda c: lora.lora_edit(c, rank=0),
    lambda c: grace.grace(c, 4),
    lambda c: grace.grace(c, 1, capacity=0),
    lambda c: wise.wise(c, -1, UNRELATED),
    lambda c: wise.wise(c, 1, UNRELATED, 0),
    lambda c: wise.wise(c, 1, UNRELATED, training=wise.Training(ratio=0.0)),
  ],
)
def test_mistakes_are_told_in_one_line(make):
  with pytest.raises(UserError) as error:
    make(CONFIGS['llama'])
  assert '\n' not in str(error.value)
