"""Configurations: completed from signatures, checked, and nothing in them is without effect."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest

from cl_jax import methods
from cl_jax.errors import UserError
from configs import common
from experiments import config, options, run

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'


def resolve(**raw):
  return config.resolve(raw)


def test_every_field_has_a_comment():
  """A comment stands before every field, or before the first of a few that belong together."""
  source = inspect.getsource(common.defaults).splitlines()
  explained, described = False, 0
  for line in source:
    text = line.strip()
    if text.startswith('#'):
      explained = True
    elif text.endswith('{'):
      explained = False  # the fields inside speak for themselves
    elif re.match(r"'(\w+)': ", text):
      described += explained
      assert explained, text
    elif text.startswith('}'):
      explained = False
  assert described > 40


def test_defaults_are_complete_and_survive_json():
  resolved = resolve()
  assert resolved['tasks'] == 5 and resolved['model']['sizes'] == (256, 256)
  again = config.resolve(config.tuples(json.loads(config.dumps(resolved))))
  assert again == resolved and config.sha256(again) == config.sha256(resolved)


@pytest.mark.parametrize('name', [n for n in methods.names()])
def test_every_argument_of_every_method_is_a_field(name):
  """Whatever a factory takes can be overridden, with the factory's own default."""
  factory = inspect.signature(methods.find(name)).parameters
  free = {n for n, p in factory.items() if p.default is p.empty} - {*config.KNOWN}
  own = resolve(methods=(name,), **({name: dict.fromkeys(free, 'l0')} if free else {}))[name]
  for argument, p in factory.items():
    # The model tells its wires, `compress` the codec.
    assert (argument in own) == (argument not in ('wires', 'codec')), argument
    if argument not in (*config.KNOWN, 'wires', 'codec', *free):
      assert own[argument] == (None if p.default is p.empty else p.default)


def test_arguments_of_model_and_optimiser_are_fields():
  resolved = resolve(optimizer={'name': 'adamw', 'lr': 1e-3}, model={'name': 'bert'})
  assert resolved['optimizer'] | {'b1': 0.9, 'weight_decay': 1e-4} == resolved['optimizer']
  assert resolved['model']['config']['depth'] == 6 and resolved['model']['pool'] == 'mean'
  assert 'momentum' in resolve()['optimizer']


@pytest.mark.parametrize(
  ('raw', 'message'),
  [
    ({'optimiser': {}}, r'no field config\.optimiser: did you mean config\.optimizer\?'),
    ({'optimizer': {'rl': 1.0}}, r'did you mean config\.optimizer\.lr\?'),
    ({'lr': 1.0}, r'did you mean .*config\.optimizer\.lr'),
    ({'ewc': {'coef': 1.0}}, r"config\.ewc belongs to a method that is not used: add 'ewc'"),
    ({'methods': ('er',), 'er': {'capacty': 3}}, r'did you mean config\.er\.capacity\?'),
    ({'methods': ('ewcc',)}, r"no method 'ewcc': did you mean ewc or ewcpp\b"),
    ({'methods': ('er', 'er')}, 'must be different names'),
    ({'methods': 'er'}, r'config\.methods must be of type tuple'),
    ({'model': {'name': 'mpl'}}, r"no model 'mpl': did you mean mlp\?"),
    ({'model': {'name': 'layers'}}, "no model 'layers'"),
    ({'optimizer': {'name': 'adm'}}, r"no optimiser 'adm': did you mean adam\?"),
    ({'optimizer': {'name': 'chain'}}, "no optimiser 'chain'"),
    ({'seeds': [0, 1]}, r'config\.seeds is a list.*write a tuple, \(0, 1\)'),
    ({'seeds': ()}, r'config\.seeds must be different whole numbers'),
    ({'seeds': (1, 1)}, r'config\.seeds must be different whole numbers'),
    ({'optimizer': {'lr': float('nan')}}, r'config\.optimizer\.lr is nan: give a finite number'),
    ({'optimizer': {'lr': float('inf')}}, r'config\.optimizer\.lr is inf'),
    ({'optimizer': {'lr': -0.1}}, r'config\.optimizer\.lr must be greater than 0'),
    ({'optimizer': {'lr': 0}}, r'config\.optimizer\.lr must be greater than 0'),
    ({'optimizer': {'momentum': 1.0}}, r'config\.optimizer\.momentum must lie in \[0, 1\)'),
    ({'optimizer': {'groups': (('l0', -1.0),)}}, r'config\.optimizer\.groups must be'),
    ({'transform': {'name': 'rotated', 'degrees': (0.0, float('nan'))}}, 'degrees is nan'),
    ({'tasks': 0}, r'config\.tasks must be at least 1; got 0'),
    ({'tasks': None}, r'config\.tasks must be given'),
    ({'batch': 2.5}, r'config\.batch must be of type int; got 2\.5'),
    ({'batch': True}, r'config\.batch must be of type int; got True'),
    ({'batch': None}, r'config\.batch cannot be None'),
    ({'validation': 1.0}, r'config\.validation must lie in \[0, 1\)'),
    ({'evaluate': 'valid'}, r'needs config\.validation'),
    ({'scenario': 'blury'}, r"config\.scenario must be one of 'task', 'class'"),
    ({'base': 'task'}, r'config\.base says what joint.*leave it empty'),
    ({'epochs': 3, 'iterations': 10}, 'leave that at 1'),
    ({'scenario': 'online', 'epochs': 2}, 'single pass'),
    ({'scenario': 'blurry', 'iterations': 5}, 'counted in epochs'),
    ({'blurry': {'width': 0.1}}, r"applies to config\.scenario='blurry' only"),
    ({'transform': {'pad': 2}}, r"applies to config\.transform\.name='permuted' only"),
    ({'transform': {'name': 'rotated', 'degrees': (0.0, 90.0)}}, r'2 angles for config\.tasks=5'),
    ({'transform': {'name': 'permuted'}, 'task_sizes': (5, 5), 'tasks': 2}, 'the whole dataset'),
    ({'order': 'random'}, r"config\.order must be 'fixed', 'seed' or a whole number"),
    ({'task_sizes': (4, 3, 3)}, 'has 3 tasks and config.tasks is 5'),
    ({'by': 'domain'}, 'by domain every domain is a task'),
    ({'model': {'sizes': (8, 0)}}, r'config\.model\.sizes must be positive'),
    ({'model': {'init': float('nan')}}, r'config\.model\.init is nan'),
    ({'methods': ('er',), 'er': {'capacity': 0}}, r'config\.er\.capacity must be at least 1'),
    ({'methods': ('er',), 'er': {'coef': -1.0}}, r'config\.er\.coef must be at least 0'),
    ({'methods': ('packnet',), 'packnet': {'prune': 1.0}}, r'must lie in \(0, 1\)'),
    ({'methods': ('lwf',), 'lwf': {'temperature': 0.0}}, r'temperature must be greater than 0'),
    ({'cache_features': True}, r'set config\.freeze'),
    ({'methods': ('lwf',), 'head': 'current'}, r"lwf distils .* config\.lwf\.outputs='old'"),
    (
      {'methods': ('dgr', 'lwf'), 'head': 'current'},
      r"dgr distils .* config\.dgr\.outputs='heads'",
    ),
    (
      {'methods': ('lwf',), 'head': 'task'},
      r"lwf distils .* config\.lwf\.outputs='heads'",
    ),
    ({'methods': ('er_ace', 'derpp')}, 'derpp learns from logits of a training step'),
    ({'methods': ('dreamnet', 'current_head')}, r'dreamnet distils outputs of finished tasks'),
    ({'optimizer': {'reset': True}, 'told': ()}, r'config\.told does not tell'),
  ],
)
def test_mistakes_name_the_field_and_what_to_do(raw, message):
  with pytest.raises(UserError, match=message) as caught:
    config.resolve(raw)
  assert '\n' not in str(caught.value)


def test_types_of_fields_come_from_annotations_and_defaults():
  schema = config.model_fields({'name': 'cnn'})
  assert schema['channels'].types == (tuple,) and schema['channels'].required
  assert config.model_fields({'name': 'vit'})['mean'].types == (float, tuple)
  with pytest.raises(UserError, match=r'config\.model\.channels must be given.*tuple'):
    resolve(model={'name': 'cnn', 'sizes': (8,)})
  with pytest.raises(UserError, match=r'config\.model\.channels must be of type tuple'):
    resolve(model={'name': 'cnn', 'sizes': (8,), 'channels': 4})
  given = resolve(model={'name': 'vit', 'mean': (0.5, 0.4, 0.3), 'config': {'depth': 2}})['model']
  assert given['mean'] == (0.5, 0.4, 0.3) and given['config']['depth'] == 2
  with pytest.raises(UserError, match=r'config\.model\.config\.depth must be of type int'):
    resolve(model={'name': 'vit', 'config': {'depth': 2.5}})


def test_numbers_become_what_the_field_holds():
  resolved = resolve(optimizer={'lr': 1}, model={'name': 'mlp', 'init': '0.5'})
  assert resolved['optimizer']['lr'] == 1.0 and isinstance(resolved['optimizer']['lr'], float)
  assert resolved['model']['init'] == 0.5
  assert resolve(model={'name': 'mlp', 'init': 'torch'})['model']['init'] == 'torch'


def test_another_choice_drops_the_arguments_of_the_old_one():
  raw = {
    'methods': ('ewc',),
    'ewc': {'coef': 3.0},
    'model': {'name': 'mlp', 'sizes': (4,)},
    'optimizer': {'name': 'adam', 'b1': 0.5, 'lr': 0.01},
  }
  for dotted, value in (
    ('methods', ('er',)),
    ('model.name', 'resnet'),
    ('optimizer.name', 'sgd'),
  ):
    raw = config.override(raw, dotted, value)
  resolved = config.resolve(raw)
  assert 'ewc' not in resolved and resolved['er']['capacity'] == 500
  assert 'sizes' not in resolved['model'] and resolved['optimizer']['lr'] == 0.01


def test_difference_names_the_fields():
  a, b = resolve(), resolve(batch=3, optimizer={'lr': 0.5})
  assert config.difference(a, b) == ['batch: 128 / 3', 'optimizer.lr: 0.1 / 0.5']
  assert config.difference(a, json.loads(config.dumps(a))) == []


def test_configuration_files_that_cannot_be_used(tmp_path):
  for text, message in (
    ('def get_config(:', 'cannot be read'),
    ('x = 1', 'no function get_config'),
    ('def get_config(arg=""):\n  return 3', 'must return a dict'),
  ):
    path = tmp_path / 'c.py'
    path.write_text(text)
    with pytest.raises(UserError, match=message):
      config.load(str(path))
  with pytest.raises(UserError, match=r'no file .*cc\.py; did you mean .*c\.py'):
    config.load(str(tmp_path / 'cc.py'))
  (tmp_path / 'c.json').write_text('{')
  with pytest.raises(UserError, match='is not JSON'):
    config.load(str(tmp_path / 'c.json'))
  (tmp_path / 'c.txt').write_text('')
  with pytest.raises(UserError, match=r'neither \.py nor \.json'):
    config.load(str(tmp_path / 'c.txt'))


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    ('compression.py:naive', r'compression\.py:naive .*IndexError'),
    ('edge_sparse.py:chanels', r'did you mean \S+edge_sparse\.py:channels or \S+channels,'),
    ('study_encoder.py:lora,naive,2x', r'did you mean \S+study_encoder\.py:lora,naive or '),
  ],
)  # fmt: skip
def test_words_that_a_configuration_does_not_know(call, source, message):
  """Are one line that names them, with the cells that come near; --debug shows the line of the file."""
  words = (f'--config={CONFIGS}/{source}', '--workdir=x')
  done = call(run.main, *words)
  assert done.code == 2 and re.search(message, done.line)
  assert '--debug' in done.line and 'get_config' not in done.err
  assert re.search(
    rf'{source.partition(":")[0]}", line \d+, in get_config', call(run.main, *words, '--debug').err
  )


@pytest.mark.parametrize(
  ('word', 'said'),
  [
    ('clas', 'did you mean class'),
    ('erx', 'did you mean er'),
    ('task_free', r"config\.told='\(\)'"),
    ('xyzzy', 'scenarios are task, class, domain, joint'),
  ],
)
def test_words_that_are_neither_scenario_nor_method(word, said):
  with pytest.raises(UserError, match=f"'{word}' is no scenario and no method: .*{said}"):
    config.load(f'{CONFIGS}/split_fashion.py:{word}')


@pytest.mark.parametrize(
  ('raw', 'said'),
  [
    ({'methods': ('imm', 'ewc')}, 'imm beside ewc: the network that is read'),
    (
      {'methods': ('dgr', 'packnet'), 'scenario': 'task'},
      'packnet beside dgr: dreams have no task',
    ),
    ({'methods': ('rehearsal', 'cwr')}, 'cwr beside rehearsal'),
    ({'methods': ('er', 'mer')}, 'mer beside er: rows from the other'),
    (
      {'methods': ('cwr',), 'update': {'parts': (('.*', 'out 0.5'),)}},
      'cwr needs all of the output',
    ),
    (
      {'methods': ('slca',), 'update': {'parts': (('head/b', 'all'), ('.*', 'in 0.5'))}},
      'slca needs all',
    ),
    ({'methods': ('partial',), 'update': {'parts': (('l.*', 'last 1'),)}}, 'partial counts layers'),
    ({'methods': ('hat',), 'scenario': 'joint', 'base': 'task'}, 'hat opens the gates of one'),
    ({'methods': ('si',), 'si': {'xi': 0.0}}, r'config\.si\.xi must be greater than 0'),
    ({'model': 'mlp'}, r'config\.model must be a dict of fields'),
    ({'optimizer': 3}, r'config\.optimizer must be a dict of fields'),
  ],
)
def test_what_works_alone_and_not_together(raw, said):
  with pytest.raises(UserError, match=said):
    config.resolve({'dataset': 'fashion_mnist_small', 'tasks': 5, **raw})


def test_a_whole_output_layer_beside_parts_is_fine():
  parts = (('head/.*', 'all'), ('.*', 'out 0.5'))
  config.resolve({'tasks': 5, 'methods': ('cwr',), 'update': {'parts': parts}})


def test_arguments_that_weights_come_with(tmp_path):
  """The files beside them are heard where the configuration is silent, and what they say is written down."""
  given = {'name': 'bert', 'pretrained': str(tmp_path)}
  plain = resolve(model=given)['model']
  assert (plain['pool'], plain['normalise']) == ('mean', False)
  modules = [{'type': f'sentence_transformers.models.{k}'} for k in ('Pooling', 'Normalize')]
  (tmp_path / 'modules.json').write_text(json.dumps(modules))
  (tmp_path / '1_Pooling').mkdir()
  (tmp_path / '1_Pooling' / 'config.json').write_text('{"pooling_mode_cls_token": true}')
  heard = resolve(model=given)['model']
  assert (heard['pool'], heard['normalise']) == ('cls', True)
  assert resolve(model={**given, 'pool': 'mean'})['model'] == {**heard, 'pool': 'mean'}
  assert resolve(model={'name': 'decoder', 'pretrained': str(tmp_path)})['model']['pool'] == 'last'

  (tmp_path / '1_Pooling' / 'config.json').write_text('{"pooling_mode_max_tokens": true}')
  with pytest.raises(UserError, match='the pooling is max_tokens.* set config.model.pool and'):
    resolve(model=given)
  chosen = [('model.pool', 'cls'), ('model.normalise', 'False')]
  assert options.overridden({'model': given}, chosen)[0]['model']['pool'] == 'cls'

  (tmp_path / 'preprocessor_config.json').write_text('{"image_mean": [0.4, 0.5, 0.6]}')
  image = resolve(model={'name': 'vit', 'pretrained': str(tmp_path)})['model']
  assert (image['mean'], image['std']) == ((0.4, 0.5, 0.6), 0.5)
