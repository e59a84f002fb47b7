"""From a configuration to streams, hyperparameters and a learner: every field does something."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax import checkpoint, methods, writers
from cl_jax.errors import UserError
from cl_jax.masks import paths
from cl_jax.models import pretrained, vit
from cl_jax.report.lines import flat
from cl_jax.streams.take import take
from cl_jax.types import overlay
from experiments import build, config, optimizer
from experiments.chain import known
from experiments.streams import streams

pytestmark = pytest.mark.usefixtures('quickly')

RAW: dict[str, Any] = {
  'seeds': (0,),
  'data': {'examples_per_class': 24, 'test_per_task': 20, 'test_batch': 20},
  'batch': 10,
  'ends_batch': 40,
  'model': {'name': 'mlp', 'sizes': (8,)},
}


def resolved(**raw) -> dict[str, Any]:
  return config.resolve({**RAW, **raw})


def setup(**raw) -> build.Setup:
  (one,) = build.prepare(resolved(**raw))
  return one


class Effect(NamedTuple):
  """Digests of all that a configuration makes.

  Attributes:
    values: of arrays, hyperparameters, and what scenario and methods are told.
    program: (name of a part of the learner) -> of that part as it is traced, which takes long and is
      done once.
  """

  values: str
  program: Callable[[str], str]


PARTS = ('init', 'step', 'boundary', 'predict')


def effect(c: dict[str, Any]) -> Effect:
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(build, 'check', lambda setup: None)  # it traces what `programs` traces again
    setups = build.prepare(c)
  parts = []
  learners = [one.build(build.hyper(c, one.streams[0]), one.weights) for one in setups]
  for one, learner in zip(setups, learners, strict=True):
    stream, hp = one.streams[0], build.hyper(c, one.streams[0])
    told = (stream.told, stream.scenario, learner.needs)
    parts += [checkpoint.digest(one.streams), checkpoint.digest(hp), str(told)]
    parts += [checkpoint.digest(one.weights), str(stream.task_classes)]

  @functools.cache
  def init() -> list:
    return [
      jax.make_jaxpr(learner.init, return_shape=True)(
        jax.random.key(0), build.example(one.streams[0])
      )
      for one, learner in zip(setups, learners, strict=True)
    ]

  @functools.cache
  def program(part: str) -> str:
    traced = []
    for one, learner, (text, state) in zip(setups, learners, init(), strict=True):
      stream = one.streams[0]
      if part == 'init':
        traced.append(text)
      elif part == 'boundary':
        ends = jax.vmap(lambda rows, s=stream: take(s, rows, 0))(stream.ends[0])
        traced.append(jax.make_jaxpr(learner.boundary)(state, ends))
      else:
        traced.append(jax.make_jaxpr(getattr(learner, part))(state, build.example(stream)))
    return hashlib.sha256('|'.join(map(str, traced)).encode()).hexdigest()

  return Effect(hashlib.sha256('|'.join(parts).encode()).hexdigest(), program)


def differ(a: Effect, b: Effect) -> bool:
  return a.values != b.values or any(a.program(part) != b.program(part) for part in PARTS)


# What else a field has to be set with to mean something, and values that are not found by arithmetic.
BESIDE: dict[str, dict[str, Any]] = {
  'data.seed': {'data.examples_per_class': 3},
  'evaluate': {'validation': 0.25},
  'base': {'scenario': 'joint'},
  'task_sizes': {'tasks': 2},
  'blurry.segments': {'scenario': 'blurry'},
  'blurry.by': {'scenario': 'blurry', 'tasks': 2},
  'blurry.width': {'scenario': 'blurry'},
  'budget_bytes': {'methods': ('er',)},
  'compress.memory': {'methods': ('er',)},
  'update.channels': {'update.parts': (('l0/.*', 'in 0.5'), ('.*', 'all'))},
  'compress.state': {'methods': ('ewc',)},
  'compress.optimizer': {'optimizer.momentum': 0.9},
  'transform.first_plain': {'transform.name': 'permuted'},
  'transform.pad': {'transform.name': 'permuted'},
  'transform.degrees': {'transform.name': 'rotated', 'tasks': 2},
  'optimizer.nesterov': {'optimizer.momentum': 0.9},
  'cache_features': {'freeze': ('l0/.*',), 'methods': ('ncm',)},
}
OTHER: dict[str, Any] = {
  'seeds': (3,),
  'evaluate': 'valid',
  'scenario': 'domain',
  'base': 'domain',
  'told': (),
  'task_sizes': (4, 6),
  'order': '7',
  'transform.name': 'permuted',
  'transform.degrees': (10.0, 90.0),
  'blurry.by': 'class',
  'blurry.segments': 2,
  'iterations': 3,
  'model.name': 'cnn',
  'model.sizes': (7,),
  'model.init': 'torch',
  'model.activation': 'tanh',
  'model.mean': (0.3,),
  'model.std': (0.3,),
  'methods': ('lwf',),
  'budget_bytes': 100_000,
  'compress.memory': 'int4',
  'update.parts': (('l0/.*', 'none'), ('.*', 'all')),
  'update.channels': 'magnitude',
  'compress.state': (('.*importance/.*', 'udynamic8'),),
  'compress.optimizer': 'bfloat16',
  'head': 'seen',
  'optimizer.name': 'adam',
  'optimizer.momentum': 0.9,
  'optimizer.schedule': 'cosine',
  'optimizer.groups': (('l0/.*', 0.5), ('.*', 1.0)),
  'freeze': ('l0/.*',),
  'tasks': 2,
  'data.examples_per_task': 30,
  'data.test_per_task': 7,
}
# Of the loop, another command, another data set or pretrained weights; tested with those (test_run,
# test_framework, ...; the last two below). Limits refuse and change nothing (test_budget), nor does it
# change what is run where examples come from (test_feed).
ELSEWHERE = {'name', 'chunk', 'eval_every', 'dataset', 'by', 'sweep', 'frozen_bits'}
ELSEWHERE |= {
  f'data.{f}'
  for f in ('length', 'tokenizer', 'train', 'test', 'domain', 'hold_out', 'image', 'template')
}
FIELDS = [
  f
  for f in flat(config.resolve(RAW))
  if f not in ELSEWHERE and not f.startswith(('tuning.', 'budget.', 'feed.'))
]


@pytest.fixture(scope='module')
def effects():
  known: dict[str, Effect] = {}

  def of(raw: dict[str, Any]) -> Effect:
    c = config.resolve(raw)
    key = config.dumps(c)
    if key not in known:
      known[key] = effect(c)
    return known[key]

  return of


def vary(raw: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
  if dotted == 'model.name':
    return config.override(raw, 'model', {'name': 'cnn', 'channels': (4,), 'sizes': (8,)})
  return config.override(raw, dotted, value)


@pytest.mark.parametrize('dotted', FIELDS)
def test_every_field_changes_what_is_run(dotted, effects):
  raw = RAW
  for name, value in BESIDE.get(dotted, {}).items():
    raw = config.override(raw, name, value)
  old = flat(config.resolve(raw)).get(dotted)
  new = OTHER.get(dotted)
  if new is None:
    new = (
      (not old) if isinstance(old, bool) else (old or 0) + (1 if isinstance(old, int) else 0.125)
    )
  assert differ(effects(vary(raw, dotted, new)), effects(raw)), f'{dotted}: {old!r} -> {new!r}'


ARGUMENTS = {
  'ewc': {'labels': 'sampled'},
  'lwf': {'outputs': 'seen', 'task_classes': ((0, 1, 2), (3, 4), (5, 6), (7, 8), (9,))},
  'er': {'writer': 'class_balanced', 'tasks': 2, 'classes': 11},
  'agem': {'tasks': 2, 'classes': 11},
  'packnet': {'weights': '.*', 'head': 'head/w'},
  'ranpac': {'lam': 1.0, 'when': 'boundary', 'features': 'structured'},
  'ncm': {'metric': 'euclidean', 'when': 'boundary'},
  'slda': {'when': 'boundary'},
  'fecam': {},
  'slca': {'chunks': 4},
  'first_session': {},
  'si': {'path': 'total', 'skip': 'head/.*'},
  'mas': {},
  'l2': {},
  'ewcpp': {},
  'rwalk': {},
  'imm': {'mode': 'mode', 'labels': 'exact', 'head': 'none'},
  'der': {},
  'derpp': {},
  'er_ace': {},
  'mir': {},
  'mer': {},
  'dgr': {
    'hidden': (7,),
    'outputs': 'seen',
    'task_classes': ((0, 1, 2), (3, 4), (5, 6), (7, 8), (9,)),
  },
  'ebll': {
    'tasks': 6,
    'outputs': 'seen',
    'task_classes': ((0, 1, 2), (3, 4), (5, 6), (7, 8), (9,)),
  },
  'pnn': {'tasks': 4, 'task_classes': ((0, 2, 1), (3,), (5, 6), (7, 8), (4, 9))},
  'dreamnet': {
    'draw': 50,
    'rounds': 4,
    'hidden': (7,),
    'outputs': 'seen',
    'task_classes': ((0, 1, 2), (3, 4), (5, 6), (7, 8), (9,)),
  },
  'rehearsal': {'share': 'partial', 'tasks': 6},
  'latent': {'tap': 'l1'},
  'remind': {'tap': 'l1', 'codebooks': 2, 'most': 9, 'classes': 11},
  'hat': {'tasks': 6, 'steps_per_epoch': 7, 'embedding': 'uniform'},
  'cwr': {},
  'gem': {'tasks': 2, 'capacity': 400},
  'gdumb': {'classes': 11},
  'icarl': {},
  'olora': {'tasks': 6, 'targets': 'l0/w'},
  'sdlora': {'tasks': 6, 'targets': 'l0/w'},
  'inflora': {'tasks': 6, 'targets': 'l0/w', 'warm': 3, 'steps_per_epoch': 7},
  'adapter': {'where': ('feedforward',)},
  'partial': {'stack': 'backbone/layers/up/.*'},
  'ease': {'tasks': 6},
  'prompt_tuning': {},
  'prefix_tuning': {},
  'l2p': {},
  'dualprompt': {'tasks': 6, 'general_layers': (0, 1), 'expert_layers': (0, 1)},
  'coda': {'tasks': 3, 'length': 6, 'layers': (0,)},
  'sprompts': {'tasks': 6},
}
WITH = {
  ('imm', 'labels'): {'imm.mode': 'mode'},
  ('imm', 'damping'): {'imm.mode': 'mode'},
  ('ewc', 'decay'): {'ewc.online': True},
  ('ewc', 'normalise'): {'ewc.online': True},
  ('er', 'tasks'): {'er.writer': 'ring', 'er.capacity': 100},
  ('er', 'classes'): {'er.writer': 'ring'},
  ('lwf', 'task_classes'): {'lwf.outputs': 'heads'},
  ('dgr', 'task_classes'): {'dgr.outputs': 'heads'},
  ('ebll', 'task_classes'): {'ebll.outputs': 'heads'},
  ('dreamnet', 'task_classes'): {'dreamnet.outputs': 'heads'},
  ('adapter', 'scale'): {'adapter.parallel': True},
  ('rehearsal', 'tasks'): {'rehearsal.share': 'partial'},
}
REQUIRED = {
  'latent': {'tap': 'l0'},
  'remind': {'tap': 'l0', 'codebooks': 4, 'codes': 8},
  'olora': {'targets': 'l./w'},
  'sdlora': {'targets': 'l./w'},
  'inflora': {'targets': 'l./w', 'rank': 2},
  'dualprompt': {'general_layers': (0,), 'expert_layers': (1,)},
  'coda': {'pool': 6, 'length': 4, 'layers': (0, 1)},
}
UNGATED = ('latent', 'remind', 'pnn')  # see `compose.gated`
# They need one.
TRANSFORMER = (
  'prompt_tuning', 'prefix_tuning', 'l2p', 'dualprompt', 'coda', 'sprompts', 'adapter', 'ease', 'partial',
)  # fmt: skip
VIT = {
  'name': 'vit',
  'config': {'image': 28, 'patch': 14, 'channels': 1, 'd': 8, 'depth': 3, 'heads': 2, 'ffn': 12},
}
TASKS = ('packnet', 'hat', 'pnn', 'lwf', 'dgr', 'ebll', 'dreamnet')


@pytest.mark.parametrize('method', ARGUMENTS)
def test_every_argument_of_a_method_changes_what_is_run(method, effects):
  base = {**RAW, 'methods': (method,), 'scenario': 'task' if method in TASKS else 'class'}
  base |= {'head': 'task'} if method in TASKS and method not in ('lwf', 'ebll') else {}
  if method in REQUIRED:
    base |= {method: REQUIRED[method], 'model': {'name': 'mlp', 'sizes': (8, 8)}}
  base |= {'model': VIT} if method in TRANSFORMER else {}
  for name, old in config.resolve(base)[method].items():
    if name == 'classes' and method in ('ncm', 'slda', 'ranpac', 'fecam', 'icarl', 'ease'):
      continue  # they must be the stream's
    if name == 'gate' and method in UNGATED:
      continue
    if method == 'prompt_tuning' and name in ('start', 'tokens'):
      continue  # of a network with a vocabulary: tests/test_prompts.py
    raw = base
    for dotted, value in WITH.get((method, name), {}).items():
      raw = config.override(raw, dotted, value)
    new = ARGUMENTS[method].get(name)
    if new is None:
      if name == 'prune_after':
        new = 4
      elif isinstance(old, bool):
        new = not old
      elif isinstance(old, float) or name == 'gate':
        new = 0.625 * (old or 1.0)
      else:
        new = old + 1
    changed, base_effect = effects(config.override(raw, f'{method}.{name}', new)), effects(raw)
    # A float is an argument of the programs: with another value they are the same.
    other = changed.values != base_effect.values if isinstance(old, float) else False
    assert other or differ(changed, base_effect), f'{method}.{name}: {old!r} -> {new!r}'


@pytest.mark.parametrize('scenario', ['task', 'class', 'domain'])
@pytest.mark.parametrize('schedule', ['', 'joint', 'cumulative', 'online', 'blurry'])
def test_every_scenario_from_every_base(scenario, schedule):
  fields = {'scenario': schedule or scenario, 'base': scenario if schedule else ''}
  (stream,) = streams(resolved(**fields), None)
  assert stream.scenario == fields['scenario'] and stream.tasks == 5
  assert stream.classes == (2 if scenario == 'domain' else 10)
  assert len(stream.index) == {'joint': 1}.get(schedule, 5)
  expected = {'task': {'task_train', 'task_test', 'boundary'}}.get(
    scenario, {'task_train', 'boundary'}
  )
  assert set(stream.told) == (set() if schedule in ('online', 'blurry') else expected)


def test_class_orders_of_seeds_give_one_program():
  """Tasks have the same labels whatever their order, so the seeds are one mapped program."""
  one = setup(
    seeds=(0, 1, 2),
    order='seed',
    scenario='task',
    head='task',
    methods=('lwf',),
    lwf={'outputs': 'heads'},
  )
  assert one.seeds == (0, 1, 2) and len(one.streams) == 3
  assert {s.task_classes for s in one.streams} == {((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))}
  firsts = [np.asarray(s.y)[np.unique(s.ends[0][s.ends[0] >= 0])] for s in one.streams]
  assert all(set(y.tolist()) == {0, 1} for y in firsts)
  assert not np.array_equal(one.streams[0].y, one.streams[1].y)


def test_seeds_that_use_other_numbers_of_examples_are_programs_of_their_own():
  """The same 40 rows of every task are not the same rows of all of them."""
  config = resolved(
    seeds=(0, 1), scenario='domain', transform={'name': 'permuted'}, tasks=3,
    data={'examples_per_task': 40, 'examples_per_class': None, 'seed': None},
  )  # fmt: skip
  one, other = build.prepare(config)
  assert len(one.streams[0].y) != len(other.streams[0].y) and one.seeds == (0,)


def test_seeds_share_what_is_the_same():
  one = setup(seeds=(0, 1))
  a, b = one.streams
  assert a.x is b.x and a.y is b.y and a.test.x is b.test.x
  assert not np.array_equal(a.index, b.index)


def test_a_number_as_order_is_the_same_for_every_seed():
  a, b = setup(seeds=(0, 1), order='4').streams
  c, _ = setup(seeds=(4, 1), order='seed').streams
  assert a.y is b.y and np.array_equal(a.y, c.y)
  assert not np.array_equal(a.y, setup().streams[0].y)


def test_tasks_must_divide_the_classes_and_data_must_be_there():
  for raw, message in (
    ({'tasks': 3}, r'does not divide the 10 classes.*config\.task_sizes'),
    ({'tasks': 11}, 'has 10 classes only'),
    ({'task_sizes': (5, 4), 'tasks': 2}, 'sum to 10'),
    ({'dataset': 'fashion_mnist_smal'}, 'fashion_mnist_small'),
    ({'data': {'length': 4}}, r'config\.data\.length does not apply'),
    ({'data': {'train': 'train[:50%]'}}, r'config\.data\.train does not apply'),
    ({'dataset': 'clinc150'}, r'set config\.data\.tokenizer'),
    (
      {'methods': ('er',), 'er': {'capacity': 5, 'writer': 'ring'}},
      r'config\.er: ring memory of 5',
    ),
    ({'methods': ('er',), 'er': {'writer': 'rung'}}, r"config\.er: no memory writer 'rung'"),
    ({'methods': ('hat',)}, 'needs task_test'),
    ({'head': 'task'}, 'needs task_test'),
    ({'methods': ('ewc',), 'scenario': 'blurry'}, 'needs boundary'),
    ({'methods': ('seen_head',), 'head': 'seen'}, r"config\.head='seen' adds 'seen_head'"),
    ({'freeze': ('backbone/.*',)}, r"config\.freeze: pattern 'backbone/\.\*' matches no parameter"),
    ({'optimizer': {'groups': (('l0/.*', 1.0),)}}, r'config\.optimizer\.groups: no pattern covers'),
    ({'model': {'name': 'cnn', 'channels': (4,) * 9, 'sizes': (8,)}}, 'too small|halved'),
    ({'model': {'name': 'mlp', 'activation': 'rely'}}, r"jax\.nn has no 'rely'"),
  ):
    with pytest.raises(UserError, match=message) as caught:
      build.prepare(config.resolve({**RAW, **raw}))
    assert '\n' not in str(caught.value)


def test_what_the_stream_knows_is_filled_in():
  """A ring keeps tasks apart where they share their labels; PackNet prunes after two thirds."""
  raw = {'methods': ('er',), 'er': {'capacity': 100, 'writer': 'ring', 'draw': 5}}
  for scenario, groups in (('class', 10), ('domain', 10)):
    one = setup(scenario=scenario, **raw)
    hp = build.hyper(one.config, one.streams[0])
    learner = one.build(hp, one.weights)
    state = jax.eval_shape(learner.init, jax.random.key(0), build.example(one.streams[0]))
    assert state.method['er'].aux.shape == (groups,), scenario
  stream = one.streams[0]  # by domain
  for writer in writers.NAMES:
    apart = known(methods.find('er'), {'writer': writer}, stream, one.config)['tasks']
    assert apart == (5 if writer in ('ring', 'mof', 'kmeans') else 1), writer
  one = setup(scenario='task', head='task', methods=('packnet', 'hat'), epochs=3)
  stream = one.streams[0]
  assert stream.index.shape[1] == 15
  assert known(methods.find('packnet'), one.config['packnet'], stream, one.config) == {
    'prune_after': 10
  }
  assert known(methods.find('hat'), one.config['hat'], stream, one.config) == {
    'tasks': 5,
    'steps_per_epoch': 5,
  }
  assert known(methods.find('er'), {'tasks': 4, 'classes': 3}, stream, one.config) == {}


def test_tasks_of_unequal_length_have_their_own_steps():
  raw = {'scenario': 'task', 'head': 'task', 'tasks': None, 'task_sizes': (2, 3, 5), 'epochs': 3}
  one = setup(**raw, methods=('packnet', 'hat'))
  stream = one.streams[0]
  assert stream.steps is not None
  steps = [int(n) for n in stream.steps]
  assert len({*steps}) == 3
  found = known(methods.find('packnet'), one.config['packnet'], stream, one.config)
  assert found == {'prune_after': tuple(2 * n // 3 for n in steps)}
  found = known(methods.find('hat'), one.config['hat'], stream, one.config)
  assert found == {'tasks': 3, 'steps_per_epoch': tuple(n // 3 for n in steps)}


def test_seeds_whose_tasks_are_of_other_lengths_are_other_programs(tmp_path):
  """Domains of 10, 20 and 40 examples, in the order of the seed."""
  rng = np.random.default_rng(0)
  domain = np.repeat(np.arange(3), (10, 20, 40))
  arrays = {'x': rng.normal(size=(70, 4)).astype(np.float32), 'y': domain, 'domain': domain}
  parts = {f'{k}_{split}': a for k, a in arrays.items() for split in ('train', 'test')}
  np.savez(tmp_path / 'own.npz', **parts)
  raw = {'dataset': f'npz:{tmp_path}/own.npz', 'data': {}, 'scenario': 'class', 'by': 'domain'}
  raw |= {'tasks': None, 'order': 'seed', 'seeds': (0, 1), 'epochs': 3}
  raw |= {'model': {'name': 'mlp', 'sizes': (16, 8)}}
  own = {'inflora': {'inflora': {'targets': 'l0/w', 'rank': 2}}, 'er': {}}
  made = {m: build.prepare(resolved(**raw, **more, methods=(m,))) for m, more in own.items()}
  assert {m: len(parts) for m, parts in made.items()} == {'inflora': 2, 'er': 1}
  given = {**own['inflora']['inflora'], 'steps_per_epoch': 2}
  assert len(build.prepare(resolved(**raw, inflora=given, methods=('inflora',)))) == 1
  for counts in ((2, 3), (2, 3, 0)):
    given = {**given, 'steps_per_epoch': counts}
    with pytest.raises(UserError, match=r'config\.inflora\.steps_per_epoch must be .* 3 tasks'):
      build.prepare(resolved(**raw, inflora=given, methods=('inflora',)))
  steps = [[*np.asarray(s.streams[0].steps)] for s in made['inflora']]
  assert steps[0] != steps[1] and sorted(steps[0]) == sorted(steps[1])


def test_tasks_that_share_some_labels_have_slots_of_their_own():
  one = setup(scenario='domain', methods=('er',), tasks=None, task_sizes=(2, 3, 5))
  assert one.streams[0].task_classes == ((0, 1), (0, 1, 2), (0, 1, 2, 3, 4))
  assert known(methods.find('er'), {'writer': 'ring'}, one.streams[0], one.config)['tasks'] == 3


def test_a_teacher_before_what_adds_parameters_is_refused():
  with pytest.raises(UserError, match='hat adds parameters .* put it first'):
    setup(scenario='task', head='task', methods=('lwf', 'hat'), lwf={'outputs': 'heads'})
  setup(scenario='task', head='task', methods=('hat', 'lwf'), lwf={'outputs': 'heads'})


@pytest.mark.parametrize('methods', [('imm', 'dreamnet'), ('ewc', 'dreamnet'), ('si', 'hat')])
def test_an_order_that_fails_at_a_boundary_or_later_is_refused_at_once(methods):
  task = {'scenario': 'task', 'head': 'task'} if 'hat' in methods else {}
  with pytest.raises(UserError, match=f'{methods[1]} adds parameters .* put it first'):
    setup(methods=methods, **task)


def test_what_does_not_go_together_in_any_order_is_refused_at_once():
  with pytest.raises(UserError, match=r'memory of activations \(latent, remind\)'):
    setup(methods=('latent', 'dreamnet'), latent={'tap': 'l0'})


def test_a_teacher_keeps_its_shape_when_a_method_behind_it_adds_parameters():
  """Or a checkpoint from behind a boundary would not go on."""
  one = setup(methods=('lwf', 'dreamnet'))
  stream = one.streams[0]
  made = one.build(build.hyper(one.config, stream), one.weights)
  state = jax.eval_shape(made.init, jax.random.key(0), build.example(stream))
  assert 'decoder' in str(jax.tree.structure(state.params))
  assert 'decoder' not in str(jax.tree.structure(state.method['lwf'].teacher))


@pytest.mark.parametrize(
  ('raw', 'said'),
  [
    ({'warm': 3}, ''),
    ({}, '5 of 5 tasks'),
    ({'warm': 100}, '5 of 5 tasks'),
    ({'steps_per_epoch': 2}, ''),
  ],
)
def test_inflora_says_where_it_trains_nothing(raw, said):
  told: list[str] = []
  own = {'inflora': {'targets': 'l0/w', **raw}, 'model': {'name': 'mlp', 'sizes': (16, 8)}}
  build.prepare(config.resolve({**RAW, 'methods': ('inflora',), **own}), None, told.append)
  assert len(told) == bool(said) and all('config.inflora: ' in t and said in t for t in told)


def test_the_head_comes_last_and_a_gate_of_zero_is_absence():
  one = setup(methods=('ewc',), head='seen', ewc={'gate': 0.0, 'coef': 5.0})
  hp = build.hyper(one.config, one.streams[0])
  assert hp['methods']['ewc'] == {'gate': 0.0, 'coef': 5.0, 'decay': 1.0}
  batch = build.example(one.streams[0])
  plain = setup(head='seen')
  states = []
  for s in (one, plain):
    learner = s.build(build.hyper(s.config, s.streams[0]), s.weights)
    state = jax.jit(learner.init)(jax.random.key(0), batch)
    states.append(jax.jit(learner.step)(state, batch)[0])
  assert list(states[0].method) == ['ewc', 'seen_head']
  assert checkpoint.digest(states[0].params) == checkpoint.digest(states[1].params)


# --- the optimiser ----------------------------------------------------------------------------------


def make(**options):
  c = resolved(optimizer=options)
  hp = build.hyper(c, streams(c, None)[0])
  return (*optimizer.make(c, hp), hp)


PARAMS = {'l0': {'w': jnp.ones(2)}, 'head': {'w': jnp.ones(2)}}
GRADS = {'l0': {'w': jnp.full(2, 0.5)}, 'head': {'w': jnp.full(2, 0.5)}}


def test_groups_scale_the_rate_like_an_optimiser_of_their_own():
  groups = (('l0/.*', 0.1), ('.*', 1.0))
  tx, _, _ = make(name='adamw', lr=0.1, weight_decay=0.1, groups=groups)
  ours, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
  each = {'l0': optax.adamw(0.01, weight_decay=0.1), 'head': optax.adamw(0.1, weight_decay=0.1)}
  split = optax.multi_transform(each, {'l0': {'w': 'l0'}, 'head': {'w': 'head'}})
  theirs, _ = split.update(GRADS, split.init(PARAMS), PARAMS)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)  # 1 - b2 of a traced float32


def test_weight_decay_is_added_to_the_gradient_where_the_optimiser_has_none():
  tx, _, _ = make(name='sgd', lr=0.1, weight_decay=0.25)
  updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
  np.testing.assert_allclose(updates['l0']['w'], -0.1 * (0.5 + 0.25), rtol=1e-6)


def test_momentum_of_zero_keeps_no_state():
  tx, _, hp = make(name='sgd', lr=0.1, momentum=0.0)
  assert not jax.tree.leaves(tx.init(PARAMS)) and set(hp['optimizer']) == {'lr'}
  tx, _, hp = make(name='sgd', lr=0.1, momentum=0.9)
  assert len(jax.tree.leaves(tx.init(PARAMS))) == 2 and hp['optimizer']['momentum'] == np.float32(
    0.9
  )


def test_cosine_falls_to_zero_within_every_leg_and_goes_on_after_a_reset():
  tx, reset, hp = make(name='sgd', lr=1.0, momentum=0.9, schedule='cosine', reset=True)
  factor = optimizer.cosine(hp['legs'])
  n = int(hp['legs'][1])
  values = [float(factor(i)) for i in range(2 * n)]
  expected = [0.5 * (1 + np.cos(np.pi * (i % n) / n)) for i in range(2 * n)]
  np.testing.assert_allclose(values, expected, atol=1e-6)
  state = tx.init(PARAMS)
  for _ in range(3):
    _, state = tx.update(GRADS, state, PARAMS)
  assert reset is not None
  again = reset(state, PARAMS)
  assert all(not np.any(a) for a in jax.tree.leaves(again[0]))
  assert jax.tree.leaves(again[1]) == jax.tree.leaves(state[1]) == [3]


@pytest.mark.parametrize(('scenario', 'needs'), [('class', ('boundary',)), ('joint', ())])
def test_a_reset_asks_for_the_boundary_where_there_is_one_inside(scenario, needs):
  rule = {'name': 'adam', 'lr': 1e-3, 'reset': True}
  one = setup(scenario=scenario, base='class', optimizer=rule)
  made = one.build(build.hyper(one.config, one.streams[0]), one.weights)
  assert made.needs == needs


def test_what_is_frozen_is_shared_and_not_in_the_state():
  one = setup(freeze=('l0/.*',), methods=('ewc',))
  learner = one.build(build.hyper(one.config, one.streams[0]), one.weights)
  state = jax.eval_shape(learner.init, jax.random.key(5), build.example(one.streams[0]))
  assert set(paths(one.frozen)) == {'l0/w', 'l0/b'} == set(paths(one.weights['frozen']))
  assert set(paths(state.params)) == {'head/w', 'head/b'}


@pytest.mark.parametrize('freeze', [(), ('backbone/embed/.*',), ('backbone/.*',)])
def test_pretrained_weights_are_arguments_of_the_program(freeze):
  """Not constants of it, not drawn anew, and one copy whether they are trained or not."""
  try:
    tokenizer = pretrained.find('all-MiniLM-L6-v2').tokenizer
  except UserError as error:
    pytest.skip(str(error))
  one = setup(
    dataset='clinc150',
    data={'examples_per_class': 2, 'length': 8, 'tokenizer': str(tokenizer)},
    model={'name': 'bert', 'pretrained': 'all-MiniLM-L6-v2'},
    freeze=freeze,
  )
  assert not set(paths(one.weights['frozen'])) & set(paths(one.weights['initial']))
  count = sum(a.size for a in jax.tree.leaves(one.weights))
  assert 22e6 < count < 23e6
  hp, batch = build.hyper(one.config, one.streams[0]), build.example(one.streams[0])
  init = lambda w: one.build(hp, w).init(jax.random.key(0), batch)  # noqa: E731
  traced = jax.make_jaxpr(init)(one.weights)
  assert sum(np.size(c) for c in traced.consts) < 1e6
  params = jax.eval_shape(init, one.weights).params
  trained = sum(a.size for a in jax.tree.leaves(params))
  frozen = sum(a.size for a in jax.tree.leaves(one.frozen))
  assert trained + frozen == count + 384 * 150 + 150
  got = jax.jit(lambda w: init(w).params.get('backbone', {}))(one.weights)
  assert checkpoint.digest(got) == checkpoint.digest(one.weights['initial'].get('backbone', {}))


def saved_vit(folder, d: int = 8) -> vit.Config:
  """Writes a small pretrained ViT and returns its shape."""
  numpy_files = pytest.importorskip('safetensors.numpy', reason='needs safetensors')
  shape = vit.Config(12, 4, 1, d, 3, 2, 2 * d, 1e-6)
  rng = np.random.default_rng(0)
  wanted = vit._shapes(shape, vit._DINOV2)
  tensors = {name: rng.standard_normal(size).astype(np.float32) for name, size in wanted.items()}
  numpy_files.save_file(tensors, folder / 'model.safetensors')
  known = {'model_type': 'dinov2', 'hidden_act': 'gelu', 'image_size': 12, 'patch_size': 4}
  known |= {'num_channels': 1, 'hidden_size': d, 'num_hidden_layers': 3, 'mlp_ratio': 2}
  (folder / 'config.json').write_text(json.dumps(known | {'num_attention_heads': 2}))
  return shape


@pytest.mark.parametrize('freeze', [(), ('backbone/.*',), ('backbone/positions',)])
def test_a_pretrained_vit_of_another_image_size_up_to_a_layer(tmp_path, freeze):
  shape = saved_vit(tmp_path)
  one = setup(
    model={'name': 'vit', 'pretrained': str(tmp_path), 'image': 28, 'layer': 2}, freeze=freeze
  )
  hp, batch = build.hyper(one.config, one.streams[0]), build.example(one.streams[0])
  params = one.build(hp, one.weights).init(jax.random.key(0), batch).params
  got = overlay(one.frozen, params)['backbone']
  want = vit.fit(shape._replace(image=28, depth=2), vit.load(tmp_path)[1])
  assert got['positions'].shape == (50, 8)
  assert checkpoint.digest(got) == checkpoint.digest(want)


def test_frozen_weights_of_layers_are_kept_in_few_bits(tmp_path):
  """The matrices of the frozen layers and nothing else; what is not frozen has nothing to round."""
  saved_vit(tmp_path)
  given = {
    'model': {'name': 'vit', 'pretrained': str(tmp_path), 'image': 28},
    'freeze': ('backbone/.*',),
  }
  plain, few = (paths(setup(**given, frozen_bits=bits).frozen) for bits in (None, 8))
  stored = {p.rsplit('/', 1)[0] for p in set(few) - set(plain)}
  layers = [p for p in plain if p.startswith('backbone/layers/') and p.endswith('/w')]
  assert stored == set(layers) and len(stored) == 6
  for p in layers:
    assert few[f'{p}/int8'].dtype == jnp.int8
    np.testing.assert_allclose(few[f'{p}/int8'] * few[f'{p}/scale'], plain[p], atol=0.03)
  assert all(few[p] is plain[p] or np.array_equal(few[p], plain[p]) for p in set(plain) - stored)
  with pytest.raises(
    UserError, match='frozen_bits rounds frozen weights of layers: set config.freeze'
  ):
    resolved(model=given['model'], frozen_bits=8)
  with pytest.raises(UserError, match='matches none of the frozen weights'):  # an MLP has no stack
    setup(model={'name': 'mlp', 'sizes': (8,)}, freeze=('l0/.*',), frozen_bits=8)


def test_a_template_spells_labels_out(tmp_path):
  """With one the rows say which tokens a language model is to learn, and it must know them all."""
  tokenizers = pytest.importorskip('tokenizers', reason='needs tokenizers')
  words = {'[PAD]': 0, '[UNK]': 1, '[SEP]': 2, 'Intent': 3, ':': 4}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='[UNK]'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single='$A [SEP]', special_tokens=[('[SEP]', 2)]
  )
  made.save(str(tmp_path / 'tokenizer.json'))
  for template in ('', '{text} Intent: {label}'):
    data = {'examples_per_class': 2, 'length': 12, 'tokenizer': str(tmp_path / 'tokenizer.json')}
    raw: dict = {'dataset': 'clinc150', 'data': {**data, 'template': template}}
    if template:
      with pytest.raises(UserError, match='tells a classifier the answer'):
        resolved(**raw)
      shape = {
        'vocabulary': 5,
        'd': 8,
        'depth': 1,
        'heads': 2,
        'kv_heads': 2,
        'ffn': 8,
        'positions': 12,
      }
      raw['model'] = {'name': 'decoder', 'output': 'tokens', 'config': shape}
    (stream,) = streams(resolved(**raw))
    assert ('learn' in stream.x) == bool(template)
    asked = np.isin(stream.x['tokens'], (3, 4)).any(1)
    assert asked.all() == bool(template)
  build.prepare(resolved(**raw))
  shape['vocabulary'] = 4
  with pytest.raises(
    UserError, match='have token 4 and the network knows 4: config.data.tokenizer'
  ):
    build.prepare(resolved(**raw))


@pytest.mark.parametrize(
  ('raw', 'said'),
  [
    ({'scenario': 'task', 'head': 'seen'}, True),
    ({'scenario': 'task', 'head': 'task'}, False),
    ({'scenario': 'class', 'head': 'seen'}, False),
    ({'scenario': 'domain', 'head': 'all', 'told': ('task_test',)}, False),  # one set of answers
  ],
)
def test_a_head_that_mixes_tasks_that_are_told_is_pointed_out(raw, said):
  """As where the scenario of a configuration is overridden, and its head is not."""
  heard: list[str] = []
  build.prepare(resolved(**raw), tell=heard.append)
  assert any("config.head='task'" in line for line in heard) == said
