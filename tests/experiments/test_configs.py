"""The configurations that ship: each resolves as its docstring says, and its data becomes a stream."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest

from cl_jax import methods
from experiments import config, options, results, run, study
from experiments.streams import streams
from tests.experiments.conftest import language_model, lines

pytestmark = pytest.mark.usefixtures('quickly')

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
NAMES = [
  'split_mnist',
  'permuted_mnist',
  'rotated_mnist',
  'split_fashion',
  'split_cifar10',
  'split_cifar100',
  'split_tiny_imagenet',
  'core50',
  'five_datasets',
  'omniglot',
  'blurry_fashion',
  'clinc150',
  'lm_intents',
  'spoken_digits',
]


@pytest.mark.parametrize('name', NAMES)
def test_the_commands_of_the_docstring_are_valid(name):
  text = ast.get_docstring(ast.parse((CONFIGS / f'{name}.py').read_text())) or ''
  found = re.findall(r'python -m experiments\.run ((?:[^\n\\]|\\\n)+)', text)
  assert found
  for command in found:
    argv = command.replace('\\\n', ' ').split()
    argv = [w.replace('--config=', f'--config={CONFIGS.parent}/', 1) for w in argv]
    parsed = options.parse(argv, 'experiments.run', '')
    assert parsed.config['name'] == name and len(parsed.config['seeds']) >= 3
    assert str(parsed.workdir).startswith(f'runs/{name}/')


@pytest.mark.parametrize('name', NAMES)
def test_every_word_that_fits_gives_a_configuration(name):
  for method in ('naive', 'er', 'ewc', 'lwf', 'agem'):
    raw = config.load(f'{CONFIGS / name}.py:{method}')
    own = ('lora',) if name == 'lm_intents' else ()  # what it adapts with
    assert config.resolve(raw)['methods'] == (*own, *(() if method == 'naive' else (method,)))
  if name.startswith('split'):
    for scenario in ('task', 'class', 'domain'):
      for words in (scenario, f'{scenario},joint', f'cumulative,{scenario},er'):
        resolved = config.resolve(config.load(f'{CONFIGS / name}.py:{words}'))
        assert scenario in (resolved['scenario'], resolved['base'])
        assert resolved['head'] == {'task': 'task', 'class': 'seen', 'domain': 'all'}[scenario]


def test_every_method_finds_its_configuration():
  for method in methods.names():
    if not method.endswith('_head'):
      words = f'task,{method}'
      resolved = config.resolve(config.load(f'{CONFIGS / "split_fashion"}.py:{words}'))
      assert method in resolved


@pytest.mark.parametrize('name', ['split_fashion', 'blurry_fashion'])
def test_streams_of_the_data_that_ships(name):
  resolved = config.resolve(config.load(f'{CONFIGS / name}.py'))
  found = streams(resolved, None)
  assert len(found) == 5 and found[0].tasks == resolved['tasks']


@pytest.mark.parametrize(
  'name', ['split_mnist', 'permuted_mnist', 'rotated_mnist', 'split_cifar10', 'omniglot']
)
def test_streams_of_the_data_that_is_looked_up(name, data_dir):
  raw = config.load(f'{CONFIGS / name}.py')
  raw = config.override(raw, 'seeds', (0, 1))
  raw = config.override(raw, 'data.test_per_task', 100)
  one, other = streams(config.resolve(raw), data_dir)
  assert one.x is other.x and one.tasks == (raw['tasks'] or 5)
  if name != 'rotated_mnist':
    again = one.task_names == other.task_names
    assert not again or (one.y != other.y).any() or (one.views != other.views).any()


def test_options_of_prepared_data_sets(data_dir):
  """`train`, `test`, `domain`, `hold_out` and `image` reach the reader: alphabets of Omniglot as domains."""
  raw = {
    'dataset': 'omniglot',
    'data': {'train': 'small1', 'hold_out': 0.25, 'domain': 'alphabet', 'seed': 1},
    'by': 'domain',
    'tasks': None,
    'model': {'name': 'mlp', 'sizes': (8,)},
  }
  (stream,) = streams(config.resolve(raw), data_dir)
  assert stream.tasks == 5 and stream.classes == 136
  assert set(np.unique(stream.x)) == {0, 255}  # the records hold 0 and 1
  assert len(stream.y) == 2720 * 3 // 4 and stream.test.w.sum() == 2720 // 4
  (other,) = streams(config.resolve(config.override(raw, 'data.seed', 2)), data_dir)
  assert (other.y != stream.y).any() or (other.x != stream.x).any()
  (small,) = streams(config.resolve(config.override(raw, 'data.image', (28, 28, 1))), data_dir)
  assert small.x.shape[1:] == (28, 28, 1) and stream.x.shape[1:] == (105, 105, 3)
  (less,) = streams(config.resolve(config.override(raw, 'data.train', 'small1[:50%]')), data_dir)
  assert len(less.y) < len(stream.y)


def test_text_options_reach_the_tokenizer():
  from cl_jax.errors import UserError
  from cl_jax.models import pretrained

  try:
    files = pretrained.find('all-MiniLM-L6-v2')
  except UserError as error:
    pytest.skip(str(error))
  raw = {
    'dataset': 'clinc150',
    'data': {'length': 12, 'tokenizer': str(files.tokenizer), 'examples_per_class': 2},
    'tasks': 10,
    'model': {'name': 'bert'},
  }
  (stream,) = streams(config.resolve(raw), None)
  assert stream.x['tokens'].shape == (300, 12)


def test_the_small_setting_of_text_to_text_is_one_seed_and_two_tasks():
  small = config.resolve(config.load(f'{CONFIGS / "lm_intents.py"}:small,er'))
  assert (small['tasks'], small['iterations'], small['seeds']) == (2, 25, (0,))
  whole = config.resolve(config.load(f'{CONFIGS / "lm_intents.py"}:er'))
  assert (whole['tasks'], whole['epochs'], whole['methods']) == (7, 10, small['methods'])


def test_banking77_is_learnt_as_text_by_the_same_configuration(call, tmp_path):
  """Of the format that the data has, with a small network: labels in words, 11 tasks, exact answers."""
  folder = tmp_path / 'data/text/classify/banking77'
  folder.mkdir(parents=True)
  rows = [{'text': f'my w{i} is w{i + 1}', 'label': f'topic_{i}'} for i in range(77)]
  for split in ('train', 'test'):
    (folder / f'{split}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  words = [w for row in rows for w in row['text'].split()]
  words += ['This', 'is', 'about:', 'topic', *map(str, range(77))]
  model = language_model(tmp_path / 'lm', words)
  done = call(
    run.main,
    f'--config={CONFIGS / "lm_intents.py"}:banking77,er',
    f'--workdir={tmp_path / "run"}',
    f'--data_dir={tmp_path / "data"}',
    f'--config.model.pretrained={model}',
    '--config.seeds=0',
    '--config.epochs=1',
    '--config.er.capacity=10',
  )
  assert done.code == 0, done.err
  (line,) = lines(tmp_path / 'run')
  assert line['method'] == 'lora+er' and line['tasks'] == 11 and np.shape(line['R']) == (11, 11)
  assert 0 <= line['acc'] <= 1 and line['forgetting'] is not None


def test_learners_of_devices_have_names_of_their_own():
  """Rows of results/edge.csv go by them; a variant is what its word says."""
  found = {}
  for file in ('edge', 'edge_vit'):
    module, path, _ = study.found(str(CONFIGS / f'{file}.py'))
    for cell in module.CELLS:
      made = config.resolve(config.load(f'{path}:{cell}'))
      found.setdefault(results.variant_name(made), []).append(made)
  assert all(len(same) == 1 for same in found.values())
  (plain,), (made,) = found['ranpac'], found['ranpac (structured)']
  assert (plain['ranpac']['features'], made['ranpac']['features']) == ('gaussian', 'structured')
  assert found['latent (int8)'][0]['compress']['memory'] == 'int8'
  assert found['lora+er (vit_int8)'][0]['frozen_bits'] == 8
  assert found['lora+er (vit)'][0]['frozen_bits'] is None
  assert found['lora+er (vit_int8_pretrained)'][0]['model']['pretrained']
