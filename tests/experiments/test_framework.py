"""The command of the continual hyperparameter framework."""

from __future__ import annotations

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest

from cl_jax.framework import decayed
from cl_jax.types import no_tap
from experiments import build, config, framework, run
from tests.experiments.conftest import lines

pytestmark = pytest.mark.usefixtures('quickly')

TUNING = ('--config.tuning.rates=(0.03, 0.01, 1e30)', '--config.tuning.first_rates=()')


@pytest.fixture(scope='module')
def tuned(tiny, tmp_path_factory):
  place = tmp_path_factory.mktemp('framework') / 'ewc'
  argv = [f'--config={tiny}:class,ewc', f'--workdir={place}', *TUNING]
  assert framework.main(argv) == 0
  return place


def test_lines_say_what_was_chosen(tuned):
  assert [line['seed'] for line in lines(tuned)] == [0, 1]
  for line in lines(tuned):
    assert len(line['tuning']) == line['tasks'] == len(line['R'])
    assert np.isfinite(line['R']).all() and line['config']['validation'] == 0.2
    for t, choice in enumerate(line['tuning']):
      assert choice['rate'] in (0.03, 0.01)  # 1e30 diverges
      before = line['tuning'][t - 1]['base']['ewc.coef'] if t else 800.0
      decays = choice['attempts'] - 1
      assert choice['stability']['ewc.coef'] == before * 0.5**decays
      kept = choice['accuracy'] >= 0.8 * choice['reference']
      assert choice['met'] == kept and (kept or choice['attempts'] == 10)
    runs = 5 * 3 + sum(c['attempts'] for c in line['tuning'])
    assert line['tuning_steps'] == runs * line['steps'] / 5
  assert (tuned / 'report.html').exists()


def test_it_repeats_nothing(call, tiny, tuned):
  before = (tuned / 'results.jsonl').read_text()
  done = call(framework.main, f'--config={tiny}:class,ewc', f'--workdir={tuned}', *TUNING)
  assert done.code == 0 and (tuned / 'results.jsonl').read_text() == before
  assert 'times the steps of the runs themselves' in done.out


def test_a_signal_and_then_the_rest(call, tiny, tuned, tmp_path, monkeypatch):
  seen = []

  def look(stop, work, seed, t):
    seen.append(t)
    if t == 2:
      raise framework.Interrupted(signal.SIGINT, 'stopped')

  argv = (f'--config={tiny}:class,ewc', f'--workdir={tmp_path}', *TUNING)
  with monkeypatch.context() as patch:
    patch.setattr(framework, 'check', look)
    assert call(framework.main, *argv).code == 128 + signal.SIGINT
  done = call(framework.main, *argv)
  assert done.code == 0 and 'going on from task 3 of 5' in done.err
  for ours, whole in zip(lines(tmp_path), lines(tuned), strict=True):
    same = ('R', 'tuning', 'tuning_steps', 'state_sha256')
    assert [ours[k] for k in same] == [whole[k] for k in same]


def spoilt(stream, t, rng):
  """The stream with noise in place of all data but those of task t: training, and what is evaluated."""
  own = np.unique(np.asarray(stream.index[t])[np.asarray(stream.index[t]) >= 0])
  x = rng.integers(0, 256, stream.x.shape, np.uint8)
  x[own] = np.asarray(stream.x)[own]
  y = rng.integers(0, stream.classes, len(stream.y)).astype(np.int32)
  y[own] = np.asarray(stream.y)[own]
  tests = jax.tree.map(np.array, stream.test)
  for k in range(stream.tasks):
    if k != t:
      tests.x[k] = rng.integers(0, 256, tests.x[k].shape)
      tests.y[k] = rng.integers(0, stream.classes, tests.y[k].shape)
  return dataclasses.replace(stream, x=x, y=y, test=tests)


def test_choices_see_the_current_task_alone(tiny):
  """With noise in place of every other task's data and of all test data, they are the same bit by bit."""
  raw = {**config.load(f'{tiny}:class,ewc'), 'validation': 0.2, 'seeds': (0,)}
  own = config.resolve(raw)
  valid_config = config.resolve({**raw, 'evaluate': 'valid'})
  (valid,) = build.prepare(valid_config)
  (plain,) = build.prepare(config.resolve({**raw, 'evaluate': 'valid', 'methods': ()}))
  (test,) = build.prepare(own)

  def tuner(stream):
    return framework.Tuned(valid._replace(streams=[stream]), plain.build, test.streams[0], own)

  stream, rng = valid.streams[0], np.random.default_rng(0)
  honest = tuner(stream)
  made = valid.build(honest.hp, valid.weights)
  state = made.init(jax.random.key(0), build.example(stream))
  base, look = {'ewc.coef': 400.0}, lambda: None
  for t in (0, 1, 3):
    choice, (new, loss), runs = honest.task(state, t, base, look)
    other, (blind, blind_loss), _ = tuner(spoilt(stream, t, rng)).task(state, t, base, look)
    assert choice == other and runs >= 6
    np.testing.assert_array_equal(loss, blind_loss)
    same = jax.tree.map(np.array_equal, new.params, blind.params)
    assert all(jax.tree.leaves(same))
    noise = tuner(spoilt(stream, (t + 1) % 5, rng)).task(state, t, base, look)[0]
    assert noise != choice  # the spoiling itself is noticed
    state = new


def test_no_attempt_repeats_another(tiny):
  """PackNet's share of the first task has no effect on others, nor theirs on it."""
  (valid,) = build.prepare(config.resolve({**config.load(f'{tiny}:task,packnet'), 'seeds': (0,)}))
  tuner = framework.Tuned(valid, valid.build, valid.streams[0], valid.config)
  tried = []

  def trial(stability):
    tried.append(stability)
    return 0.0, None

  decayed(trial, tuner.start, 0.01, 1.0, tuner.search)
  for name in ('packnet.prune', 'packnet.first'):
    assert len({one[name] for one in tried}) == len(tried) == 10


def test_fine_tuning_competes_with_the_classes_seen(tiny):
  """Without a rate the network is the one of the first task, which takes most of the second's for its own."""
  raw = {**config.load(f'{tiny}:class,ewc'), 'validation': 0.2, 'seeds': (0,), 'head': 'seen'}
  (valid,) = build.prepare(config.resolve({**raw, 'evaluate': 'valid'}))
  (plain,) = build.prepare(config.resolve({**raw, 'evaluate': 'valid', 'methods': ()}))
  stream = valid.streams[0]
  tuner = framework.Tuned(valid, plain.build, stream, config.resolve(raw))
  state = valid.build(tuner.hp, valid.weights).init(jax.random.key(0), build.example(stream))
  state = tuner.task(state, 0, {'ewc.coef': 400.0}, lambda: None)[1][0]
  accuracies, _ = tuner.plasticity(state, 1, (1e-12,))
  test = jax.tree.map(lambda a: a[1, 0], stream.test)
  said = valid.model(valid.weights).apply(state.params, test, no_tap, False).logits[:, :4]
  right = np.average(said.argmax(-1) == test.y, weights=test.w)
  assert right < 0.3 and accuracies == [pytest.approx(right)]


def test_a_method_with_a_loss_of_its_own_is_searched_with_it(tiny):
  """iCaRL without distillation, and not the softmax of fine-tuning, gives the goal at every rate."""
  raw = {**config.load(f'{tiny}:class,icarl'), 'validation': 0.2, 'seeds': (0,)}
  (valid,) = build.prepare(config.resolve({**raw, 'evaluate': 'valid'}))
  (plain,) = build.prepare(config.resolve({**raw, 'evaluate': 'valid', 'methods': ()}))
  stream = valid.streams[0]
  tuner = framework.Tuned(valid, plain.build, stream, config.resolve(raw))
  state = valid.build(tuner.hp, valid.weights).init(jax.random.key(0), build.example(stream))
  rates = (
    0.05,
    1e-12,
  )  # at 1e-12 means of features tell the classes apart, the output layer does not
  accuracies, steps = tuner.plasticity(state, 0, rates)
  for rate, accuracy, taken in zip(rates, accuracies, steps, strict=True):
    hp = framework.with_values(tuner.hp, rate, {'icarl.coef': 0.0})
    *_, wanted, right = tuner.attempt(hp, state, stream, 0, valid.weights)
    assert (accuracy, taken) == (pytest.approx(float(right), nan_ok=True), int(wanted))
  assert min(accuracies) > 0.8


def test_a_method_without_stability_and_one_with_parameters(call, tiny, tmp_path):
  argv = (*TUNING, '--config.seeds=0', '--config.head=task')
  done = call(framework.main, f'--config={tiny}:task,hat', f'--workdir={tmp_path / "hat"}', *argv)
  assert done.code == 0
  (line,) = lines(tmp_path / 'hat')
  assert set(line['tuning'][0]['stability']) == {'hat.coef', 'hat.smax'}
  argv = (*TUNING, '--config.seeds=0')
  done = call(framework.main, f'--config={tiny}:class,er', f'--workdir={tmp_path / "er"}', *argv)
  assert done.code == 0
  (line,) = lines(tmp_path / 'er')
  assert {c['attempts'] for c in line['tuning']} == {1}
  argv = (*argv, "--config.tuning.start=(('er.coef', 2.0),)")
  done = call(framework.main, f'--config={tiny}:class,er', f'--workdir={tmp_path / "er2"}', *argv)
  assert done.code == 0
  (line,) = lines(tmp_path / 'er2')
  assert line['tuning'][0]['stability']['er.coef'] <= 2.0


def test_plasticity_is_searched_without_what_names_the_method(tiny):
  """Rates of its parameters and codes of its state have no place in the network alone."""
  raw = {**config.load(f'{tiny}:task,hat'), 'validation': 0.2, 'seeds': (0,), 'head': 'task'}
  raw = config.override(raw, 'optimizer.groups', (('hat/.*', 2.0), ('head/.*', 0.5), ('.*', 1.0)))
  raw = config.override(raw, 'compress.state', (('.*used/.*', 'bfloat16'),))
  own = config.resolve(raw)
  (setup,) = build.prepare(own)
  plain = framework.plain_of(own, setup)
  assert plain['optimizer']['groups'] == (('head/.*', 0.5), ('.*', 1.0))
  assert plain['compress']['state'] == () and plain['methods'] == ()
  build.prepare(plain)
  frozen = {'freeze': ('l0/.*',), 'optimizer': {'groups': (('l0/.*|hat/.*', 2.0), ('.*', 1.0))}}
  own = config.resolve({**raw, 'compress': {}, **frozen})
  (setup,) = build.prepare(own)
  plain = framework.plain_of(own, setup)
  assert plain['optimizer']['groups'] == (('.*', 1.0),)
  build.prepare(plain)


def test_a_strength_that_diverges_is_decayed(call, tiny, tmp_path):
  """DER's squared differences diverge where alpha is too large for the rate: that attempt ends in NaN."""
  assert framework.stability_of(
    {'methods': ('der',), 'der': {'alpha': 0.3}, 'tuning': {'start': ()}}
  ) == {'der.alpha': 0.3}
  argv = (*TUNING, '--config.seeds=0,', "--config.tuning.start=(('derpp.alpha', 1e20),)")
  argv = (
    *argv,
    '--config.tuning.decay=1e-10',
    '--config.tuning.attempts=5',
    '--config.optimizer.lr=0.1',
  )
  assert (
    call(framework.main, f'--config={tiny}:class,derpp', f'--workdir={tmp_path}', *argv).code == 0
  )
  (line,) = lines(tmp_path)
  first = line['tuning'][0]
  assert first['attempts'] > 1 and first['stability']['derpp.alpha'] < 1e19
  assert np.isfinite(first['accuracy'])


def test_what_is_reported_was_measured_with_what_was_chosen(call, tiny, tmp_path, monkeypatch):
  """HAT's predictions depend on smax: on the data of the choice R[t, t] is the accuracy of the choice."""
  learn = framework.Tuned.learn

  def on_the_validation_data(self, *args):
    self.test = self.stream.test
    return learn(self, *args)

  monkeypatch.setattr(framework.Tuned, 'learn', on_the_validation_data)
  argv = ("--config.tuning.start=(('hat.smax', 0.5),)", '--config.seeds=0,', '--config.head=task')
  where = f'--workdir={tmp_path}'
  assert call(framework.main, f'--config={tiny}:task,hat', where, *TUNING, *argv).code == 0
  (line,) = lines(tmp_path)
  chosen = [c['accuracy'] for c in line['tuning']]
  np.testing.assert_allclose(np.diag(line['R']), chosen, atol=1e-6)


def test_patience_saves_steps_and_keeps_the_best_epoch(call, tiny, tmp_path):
  """Twelve epochs at most: fewer steps than without, and other models."""
  found = {}
  for name, patience in (('all', '()'), ('early', '(1, 1, 0.5)')):
    argv = (
      *TUNING,
      '--config.seeds=0,',
      '--config.epochs=12',
      f'--config.tuning.patience={patience}',
    )
    place = tmp_path / name
    assert call(framework.main, f'--config={tiny}:class,er', f'--workdir={place}', *argv).code == 0
    (found[name],) = lines(place)
  early, everything = found['early'], found['all']
  assert early['tuning_steps'] < everything['tuning_steps'] == 4 * everything['steps']
  assert np.isfinite(early['R']).all() and early['tuning'] != everything['tuning']


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (('--config.tuning.patience=(5, 10)',), 'config.tuning.patience must be'),
    (
      ('--config.tuning.patience=(5, 10, 0.1)', '--config.iterations=9', '--config.epochs=1'),
      'leave config.iterations out',
    ),
    (('--config.scenario=joint',), 'goes from task to task'),
    (('--config.evaluate=valid', '--config.validation=0.1'), 'goes from task to task'),
    (('--config.tuning.rates=(0.1, -1.0)',), 'config.tuning.rates must be positive'),
    (('--config.tuning.attempts=0',), 'config.tuning.attempts must be at least 1'),
    (("--config.tuning.start=(('ewc.coeff', 4.0),)",), "'ewc.coeff' is no float of a method"),
    (("--config.sweep={'optimizer.lr': (0.1,)}",), 'leave it out'),
    (
      ("--config.methods=('icarl',)", '--config.tuning.patience=(5, 10, 0.1)'),
      'icarl answers otherwise after the boundary',
    ),
    (('--config.optimizer.schedule=cosine',), "leave it at 'constant'"),
  ],
)
def test_mistakes(call, tiny, tmp_path, words, message):
  done = call(framework.main, f'--config={tiny}:class,ewc', f'--workdir={tmp_path}', *words)
  assert done.code == 2 and message in done.line


def test_run_refuses_what_it_would_not_use(call, tiny, tmp_path):
  done = call(run.main, f'--config={tiny}', f'--workdir={tmp_path}', '--config.tuning.drop=0.1')
  assert done.code == 2 and 'experiments.framework' in done.line


def test_results_are_json(tuned):
  text = (tuned / 'results.jsonl').read_text()
  assert all(json.loads(line)['tuning'] for line in text.splitlines())
