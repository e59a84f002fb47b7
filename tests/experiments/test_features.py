"""Cached features: the same numbers as the network's, computed once, and refused where they would move."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from cl_jax.errors import UserError
from cl_jax.models import pretrained
from cl_jax.streams import text
from experiments import budget, build, config, features, results, run
from tests.experiments.conftest import final_state, language_model, lines

pytestmark = pytest.mark.usefixtures('quickly')

DATA = Path(text.__file__).parents[1] / 'data'
FROZEN = {
  'data': {'examples_per_class': 20, 'test_per_task': 15, 'test_batch': 10},
  'batch': 10,
  'ends_batch': 40,
  'model': {'name': 'mlp', 'sizes': (16, 12)},
  'freeze': ('l.*',),
  'cache_features': True,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('CL_JAX_CACHE', str(tmp_path / 'cache'))


def setup(**raw) -> tuple[build.Setup, list[str]]:
  said: list[str] = []
  (one,) = build.prepare(config.resolve({**FROZEN, **raw}), None, said.append)
  return one, said


def test_features_are_those_of_the_network_and_are_computed_once():
  one, said = setup(methods=('slda',), seeds=(0, 1))
  plain, _ = setup(methods=('slda',), cache_features=False)
  model = plain.model(plain.weights)
  params, _ = model.init(jax.random.key(0), build.example(plain.streams[0]))
  inside = {**params, **plain.weights['frozen']}
  wanted = model.apply(inside, features.batch_of(plain.streams[0].x)).features
  np.testing.assert_allclose(one.streams[0].x, wanted, atol=1e-5)
  test = plain.streams[0].test
  flat = test.x.reshape(-1, *test.x.shape[3:])
  wanted = model.apply(inside, features.batch_of(flat)).features.reshape(*test.y.shape, -1)
  real = test.w > 0
  np.testing.assert_allclose(one.streams[0].test.x[real], np.asarray(wanted)[real], atol=1e-5)
  assert not one.streams[0].test.x[~real].any() and (~real).any()
  assert one.streams[0].x is one.streams[1].x and one.streams[0].test.x is one.streams[1].test.x
  assert sum('training data' in line for line in said) >= 1
  again, said = setup(methods=('slda',))
  assert said == [] and np.array_equal(again.streams[0].x, one.streams[0].x)
  other, said = setup(methods=('slda',), model={'name': 'mlp', 'sizes': (16, 11)})
  assert said and other.streams[0].x.shape[1] == 11


@pytest.mark.parametrize(('epochs', 'share'), [(1, 1.0), (4, 0.25)])
def test_what_the_cache_stands_for_is_counted(epochs, share):
  """By hand: two layers below the features, 10 rows a step; in training each row once in all its visits."""
  one, _ = setup(methods=('ncm',), epochs=epochs)
  row = 2 * (784 * 16 + 16 * 12)
  assert one.below == row and results.costs(one)['backbone'] == {
    'train_forward': share,
    'predict_forward': 1.0,
    'flops_per_step': 10 * row * share,
    'flops_per_prediction': 10 * row,
  }
  plain, _ = setup(cache_features=False)
  assert plain.below == 0 and 'backbone' not in results.costs(plain)
  joint, _ = setup(scenario='joint', epochs=epochs)
  assert results.costs(joint)['backbone']['train_forward'] == share


def test_the_plan_of_a_budget_tells_it():
  about = budget.figures(config.resolve({**FROZEN, 'epochs': 2}), ['cortex-m7'])
  text = budget.table(about)
  assert (
    'forward passes behind cached features  ' in text and f'{10 * (784 * 16 + 16 * 12):,}' in text
  )
  assert about['backbone']['train_forward'] == 0.5


@pytest.mark.parametrize('method', ['slda', 'ncm'])
def test_a_closed_form_method_gives_the_same_with_and_without(call, tmp_path, method):
  for name, cache in (('with', True), ('without', False)):
    c = config.resolve({**FROZEN, 'methods': (method,), 'cache_features': cache, 'seeds': (0,)})
    path = tmp_path / f'{name}.json'
    path.write_text(json.dumps(c))
    assert call(run.main, f'--config={path}', f'--workdir={tmp_path / name}').code == 0
  (one,), (other,) = lines(tmp_path / 'with'), lines(tmp_path / 'without')
  np.testing.assert_allclose(one['R'], other['R'], atol=0.07)  # one of 15 may fall the other way
  assert one['state_bytes']['frozen'] == other['state_bytes']['frozen'] > 50_000
  assert one['acc'] > 0.3 and one['model'] == 'mlp'
  assert one['backbone']['predict_forward'] == 1 and 'backbone' not in other


def test_a_linear_head_learns_the_same_with_and_without(call, tmp_path):
  """The same accuracies after every task and the same final weights, up to how sums are rounded."""
  words = ' '.join(text.read(DATA / 'clinc150_test.jsonl.gz').texts).split()
  model = language_model(tmp_path / 'lm', words)
  for name, cache in (('with', True), ('without', False)):
    raw = {
      **FROZEN,
      'dataset': 'clinc150',
      'by': 'domain',
      'tasks': None,
      'data': {'length': 12, 'examples_per_class': 2, 'test_per_task': 15, 'test_batch': 15},
      'model': {'name': 'decoder', 'pretrained': str(model), 'pool': 'mean', 'init': 'zeros'},
      'freeze': ('backbone/.*',),
      'optimizer': {'lr': 1.0},
      'cache_features': cache,
    }
    path = tmp_path / f'{name}.json'
    path.write_text(json.dumps(config.resolve(raw)))
    assert call(run.main, f'--config={path}', f'--workdir={tmp_path / name}').code == 0
  (one,), (other,) = lines(tmp_path / 'with'), lines(tmp_path / 'without')
  assert one['R'] == other['R'] and max(map(max, one['R'])) > 0.1
  states = [final_state(tmp_path / name) for name in ('with', 'without')]
  assert states[0].keys() == states[1].keys() and 'state/params/head/w' in states[0]
  for name, a in states[0].items():
    if a.dtype.kind == 'f':
      np.testing.assert_allclose(a, states[1][name], atol=1e-5, err_msg=name)
    else:
      np.testing.assert_array_equal(a, states[1][name], name)


def test_without_a_closed_form_method_a_linear_head_learns():
  one, _ = setup(methods=('er',), er={'capacity': 20, 'draw': 5})
  learner = one.build(build.hyper(one.config, one.streams[0]), one.weights)
  state = jax.eval_shape(learner.init, jax.random.key(0), build.example(one.streams[0]))
  assert jax.tree.map(lambda a: a.shape, state.params) == {'head': {'w': (12, 10), 'b': (10,)}}
  assert state.method['er'].rows.x.shape == (21, 12)


def test_a_method_that_trains_a_head_gets_one():
  one, _ = setup(methods=('slca',), slca={'samples': 8})
  learner = one.build(build.hyper(one.config, one.streams[0]), one.weights)
  state = jax.eval_shape(learner.init, jax.random.key(0), build.example(one.streams[0]))
  assert jax.tree.map(lambda a: a.shape, state.params) == {'head': {'w': (12, 10), 'b': (10,)}}
  assert state.method['slca'].scatter.shape == (10, 12, 12)


@pytest.mark.parametrize(
  ('raw', 'message'),
  [
    ({'freeze': ('l0/.*',)}, r'l1/b is not frozen'),
    ({'methods': ('lora',), 'lora': {'targets': 'l./w'}}, 'changes the network below its head'),
    ({'methods': ('hat',), 'scenario': 'task'}, 'hat needs hidden units to gate'),
    ({'transform': {'name': 'permuted'}}, 'features of their own per task'),
    (
      {'freeze': ('s.*',), 'model': {'name': 'resnet', 'width': 2, 'blocks': (1,)}},
      'mean',
    ),
  ],
)
def test_what_would_move_the_features_is_refused(raw, message):
  with pytest.raises(UserError, match=message):
    setup(**raw)


def test_features_that_are_not_finite_are_refused():
  x = np.zeros((5, 3), np.float32)
  x[3] = np.inf
  with pytest.raises(UserError, match='NaN or infinity in row 3'):
    features.extract(lambda v, x: x, None, x, 'the data', lambda line: None)


def test_seeds_that_share_masks_have_features_of_their_own(tmp_path):
  """Every sentence fills the length: the masks are the same array, and the words are not."""
  rng = np.random.default_rng(0)
  model = language_model(tmp_path / 'lm', 'abcdefgh')
  for split in ('train', 'test'):
    rows = [
      {'text': ' '.join(rng.choice([*'abcdefgh'], 9)), 'label': f'l{i % 2}'} for i in range(80)
    ]
    (tmp_path / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))

  def prepared(*seeds):
    data = {'length': 6, 'examples_per_class': 5, 'test_per_task': 4, 'test_batch': 4, 'seed': None}
    raw = {'dataset': f'jsonl:{tmp_path}', 'data': data, 'seeds': seeds, 'tasks': 2, 'batch': 5}
    raw |= {
      'ends_batch': 5,
      'freeze': ('backbone/.*',),
      'cache_features': True,
      'methods': ('ncm',),
    }
    raw |= {'model': {'name': 'decoder', 'pretrained': str(model)}}
    return build.prepare(config.resolve(raw))[0].streams

  both, (alone,) = prepared(0, 1), prepared(1)
  assert not np.array_equal(both[0].x, both[1].x)
  np.testing.assert_allclose(both[1].x, alone.x, atol=1e-6)
  np.testing.assert_allclose(both[1].test.x, alone.test.x, atol=1e-6)


def test_sentences_are_cut_to_what_they_need():
  shapes = []

  def compute(variables, x):
    shapes.append(x['tokens'].shape)
    return (x['tokens'] * x['mask']).sum(-1, keepdims=True)

  lengths = np.arange(300) % 30 + 1
  mask = np.arange(32) < lengths[:, None]
  tokens = np.random.default_rng(0).integers(1, 9, (300, 32)).astype(np.int32)
  found = features.extract(compute, None, {'tokens': tokens, 'mask': mask}, '', lambda line: None)
  np.testing.assert_array_equal(found[:, 0], (tokens * mask).sum(-1))
  assert {s[0] for s in shapes} == {features.BATCH} and min(s[1] for s in shapes) < 32


@pytest.mark.long
def test_minilm_features_of_clinc150_are_learnt_by_slda(call, tmp_path):
  """The pretrained path, end to end on a few sentences: weights, tokenizer, features, results."""
  try:
    pretrained.find('all-MiniLM-L6-v2')
  except UserError as error:
    pytest.skip(str(error))
  done = call(
    run.main,
    '--config=configs/clinc150.py:slda',
    f'--workdir={tmp_path / "w"}',
    '--config.seeds=0,1',
    '--config.data.examples_per_class=3',
    '--config.data.test_per_task=15',
    '--config.data.length=16',
  )
  assert done.code == 0, done.err
  found = lines(tmp_path / 'w')
  assert len(found) == 2 and found[0]['tasks'] == 10 and found[0]['R'] != found[1]['R']
  assert all(line['acc'] > 0.5 for line in found)
  assert found[0]['state_bytes']['frozen'] > 80e6
