"""The command line: overrides by type, and one line for what is not understood."""

from __future__ import annotations

import json
import logging

import pytest

from cl_jax.errors import UserError
from experiments import cli, config, options, run


def parse(*argv: str) -> options.Options:
  return options.parse(list(argv), 'experiments.run', 'About.')


@pytest.fixture
def given(tiny, tmp_path):
  def of(*argv: str, arg: str = '') -> options.Options:
    return parse(f'--config={tiny}{arg}', f'--workdir={tmp_path / "w"}', *argv)

  return of


def test_overrides_have_the_type_of_their_field(given):
  c = given(
    '--config.batch=5',
    '--config.optimizer.lr=1',
    '--config.optimizer.momentum=.9',
    '--config.optimizer.nesterov=True',
    '--config.model.sizes=(4,3)',
    '--config.model.init=torch',
    '--config.seeds=2,5',
    '--config.tasks=None',
    '--config.task_sizes=(6,4)',
    '--config.data.examples_per_class=None',
    '--config.freeze=l0/.*',
    '--config.optimizer.groups=(("l1/.*",0.5),(".*",1.0))',
    '--config.er.capacity',
    '44',
    arg=':class,er',
  ).config
  assert (
    c['batch'] == 5
    and c['optimizer'] | {'lr': 1.0, 'momentum': 0.9, 'nesterov': True} == (c['optimizer'])
  )
  assert c['model']['sizes'] == (4, 3) and c['model']['init'] == 'torch'
  assert c['seeds'] == (2, 5) and c['tasks'] is None and c['task_sizes'] == (6, 4)
  assert c['data']['examples_per_class'] is None and c['freeze'] == ('l0/.*',)
  assert c['optimizer']['groups'] == (('l1/.*', 0.5), ('.*', 1.0))
  assert c['er']['capacity'] == 44


def test_a_text_that_is_a_number_is_one_where_both_are_allowed(given):
  assert given('--config.model.init=0.25').config['model']['init'] == 0.25
  again = given('--config.model.init=0.25', '--config.model.init=he').config
  assert again['model']['init'] == 'he'


def test_methods_keep_their_order_and_bring_their_fields(given):
  c = given("--config.methods=('lwf','er','ewc')", '--config.ewc.coef=7').config
  assert c['methods'] == ('lwf', 'er', 'ewc') and c['ewc']['coef'] == 7.0
  assert given('--config.methods=er', arg=':class,ewc').config['methods'] == ('er',)
  assert given('--config.methods=', arg=':class,ewc').config['methods'] == ()


def test_the_word_after_the_file(given):
  assert given(arg=':task,er').config['scenario'] == 'task'
  c = given(arg=':joint,task').config
  assert (c['scenario'], c['base'], c['methods']) == ('joint', 'task', ())
  assert given(arg=':class,naive').config['methods'] == ()


def test_another_model_and_optimiser_bring_their_fields(given):
  c = given('--config.optimizer.name=adam', '--config.optimizer.b1=0.8').config
  assert c['optimizer']['b1'] == 0.8 and 'momentum' not in c['optimizer']
  c = given('--config.model.name=vit', '--config.model.mean=(0.5,0.4,0.3)').config
  assert c['model']['mean'] == (0.5, 0.4, 0.3) and c['model']['std'] == 0.5
  c = given('--config.model.name=resnet', '--config.model.width=4').config
  assert c['model']['width'] == 4 and 'sizes' not in c['model']


def test_the_resolved_configuration_is_a_configuration(given, tmp_path):
  c = given('--config.optimizer.lr=0.3', arg=':class,er').config
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(c, indent=1))
  again = parse(f'--config={path}', '--workdir=w').config
  assert again == c and config.sha256(again) == config.sha256(c)


def test_a_text_reaches_a_field_that_is_called_as_a_method_of_dicts(given):
  found = given(
    '--config.update.channels=magnitude',
    "--config.update.parts=(('.*','out 0.5'),)",
    arg=':class,er',
  )
  assert found.config['update'] == {'parts': (('.*', 'out 0.5'),), 'channels': 'magnitude'}


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (('--config.optimiser.lr=1',), r'config\.optimiser: did you mean config\.optimizer'),
    (('--config.optimizer.rl=1',), r'did you mean config\.optimizer\.lr'),
    (('--config.lr=1',), r'did you mean .*config\.optimizer\.lr'),
    (('--config.ewc.coef=1',), r"add 'ewc' to config\.methods"),
    (('--config.er.capacity=many',), r'config\.er\.capacity=many'),
    (('--config.batch=1.5',), r'config\.batch=1\.5'),
    (('--config.drop_last=perhaps',), r'config\.drop_last=perhaps'),
    (('--config.optimizer.lr=nan',), r'config\.optimizer\.lr is nan'),
    (('--config.optimizer=sgd',), r'config\.optimizer has fields of its own'),
    (('--config.batch.size=3',), r'no field config\.batch\.size'),
    (('--config.batch',), 'needs a value'),
    (('--config.batch=None',), r'config\.batch cannot be None'),
    (('extra',), r"'extra' is not understood"),
    (('--wrkdir=x',), r"Unknown command line flag 'wrkdir'"),
    (('--save_every=-1',), 'must be a number of seconds'),
    (('--save_every=nan',), 'must be a number of seconds'),
    (('--save_every=soon',), 'save_every=soon'),
    (('--config.methods=eer',), r"no method 'eer'"),
    (('--config.task_sizes={[]:1}',), 'task_sizes'),
    (
      (
        '--config.compress.optimizer=bfloat16',
        '--config.optimizer.name=rmsprop',
        '--config.optimizer.centered=True',
      ),
      r'optimizer\.centered=False',
    ),
  ],
)
def test_mistakes_are_one_line(given, argv, message):
  with pytest.raises(UserError, match=message) as caught:
    given(*argv, arg=':class,er')
  assert '\n' not in ' '.join(str(caught.value).split(' (see --help)'))


def test_what_must_be_given(tiny, tmp_path):
  with pytest.raises(UserError, match='--config is missing'):
    parse('--workdir=x')
  with pytest.raises(UserError, match='--workdir is missing'):
    parse(f'--config={tiny}')


def test_help_is_short_and_lists_the_fields_of_a_configuration(call, tiny):
  done = call(run.main, '--help')
  assert done.code == 0 and done.err == ''
  assert len(done.out.splitlines()) < 20 and '--workdir=DIR' in done.out
  done = call(run.main, f'--config={tiny}:class,er', '--help')
  assert done.code == 0 and '--config.er.capacity=30' in done.out


def test_errors_are_one_line_and_debug_shows_the_traceback(call, tiny, tmp_path):
  argv = (f'--config={tiny}', f'--workdir={tmp_path}', '--config.tasks=3')
  done = call(run.main, *argv)
  assert done.code == 2 and len(done.err.splitlines()) == 1
  assert done.line.startswith('experiments.run: config.tasks=3 does not divide')
  done = call(run.main, *argv, '--debug')
  assert done.code == 2 and 'Traceback' in done.err


def test_what_a_command_says_is_said_once_whatever_a_library_does_to_the_root_logger(capsys):
  root, ours = logging.getLogger(), logging.getLogger('cl_jax.streams.cache')
  handler = logging.StreamHandler()  # as logging.basicConfig sets one up
  root.addHandler(handler)
  try:
    assert cli.guarded('a', lambda words: ours.info('preparing') or 0, []) == 0
  finally:
    root.removeHandler(handler)
  assert capsys.readouterr().err == 'preparing\n'
  assert logging.getLogger('cl_jax').propagate
