"""Grids: few programs, the results of single runs, resumed cell by cell."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from cl_jax import loop
from cl_jax.errors import UserError
from cl_jax.sweep import compile_groups
from experiments import build, config, engine, run, show, sweep
from tests.experiments.conftest import lines

pytestmark = pytest.mark.usefixtures('quickly')

GRID = "{'optimizer.lr': (0.03, 0.01, 1e30), 'er.capacity': (30, 40)}"


@pytest.fixture(scope='module')
def swept(tiny, tmp_path_factory) -> Path:
  place = tmp_path_factory.mktemp('sweeps') / 'swept'
  argv = [f'--config={tiny}:class,er', f'--workdir={place}', f'--config.sweep={GRID}']
  assert sweep.main(argv) == 3  # the rate 1e30 has no results
  return place


def test_every_cell_and_seed_has_a_line_or_a_fault(swept):
  found = {
    (c['config']['optimizer']['lr'], c['config']['er']['capacity'], c['seed']) for c in lines(swept)
  }
  assert found == {(lr, n, s) for lr in (0.03, 0.01) for n in (30, 40) for s in (0, 1)}
  faults = [json.loads(text) for text in (swept / 'faults.jsonl').read_text().splitlines()]
  assert len(faults) == 4 and {f['seed'] for f in faults} == {0, 1}
  assert all(f['what'] == 'the loss' and f['step'] == 1 and len(f['rows']) == 10 for f in faults)
  assert (swept / 'report.html').exists()
  assert faults[-1]['run'] == 'optimizer.lr 1e+30, er.capacity 40, seed 1'


def test_a_cell_equals_a_run_of_its_own(call, tiny, swept, tmp_path):
  argv = (f'--config={tiny}:class,er', f'--workdir={tmp_path}', '--config.optimizer.lr=0.03')
  assert call(run.main, *argv).code == 0
  mapped = {(c['config_sha256'], c['seed']): c for c in lines(swept)}
  assert len(lines(tmp_path)) == 2
  for line in lines(tmp_path):
    other = mapped[line['config_sha256'], line['seed']]
    np.testing.assert_allclose(line['R'], other['R'], atol=0.051)  # one of 20, by rounding
    assert line['state_bytes'] == other['state_bytes'] and line['config'] == other['config']


def test_what_is_done_is_not_repeated_and_a_grid_may_grow(call, tiny, swept):
  before = lines(swept)
  argv = (f'--config={tiny}:class,er', f'--workdir={swept}')
  done = call(sweep.main, *argv, f'--config.sweep={GRID}')
  assert (
    done.code == 3 and '12 of 12 runs are in' in done.err and '4 runs were stopped' in done.line
  )
  assert lines(swept) == before
  more = "{'optimizer.lr': (0.03, 0.02), 'er.capacity': (30,)}"
  done = call(sweep.main, *argv, f'--config.sweep={more}')
  assert done.code == 0 and '2 of 4 runs are in' in done.err
  assert lines(swept)[:8] == before and len(lines(swept)) == 10
  assert 'optimizer.lr' in done.out and '0.02' in done.out and '0.01' not in done.out


def test_a_signal_and_then_the_rest(call, tiny, tmp_path, monkeypatch, swept):
  seen, step = [], show.Show.step

  def interrupting(self, done, about):
    step(self, done, about)
    seen.append(done)
    if len(seen) == 9:
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(show.Show, 'step', interrupting)
  argv = (f'--config={tiny}:class,er', f'--workdir={tmp_path}', f'--config.sweep={GRID}')
  assert call(sweep.main, *argv).code == 128 + signal.SIGTERM
  done = call(sweep.main, *argv)
  assert done.code == 3 and 'going on from leg' in done.err
  key = lambda c: (c['config_sha256'], c['seed'], c['state_sha256'])  # noqa: E731
  wanted = {config.sha256(c['config']) for c in lines(tmp_path)}
  assert set(map(key, lines(tmp_path))) == {
    key(c) for c in lines(swept) if c['config_sha256'] in wanted
  }


def test_cells_that_differ_in_floats_alone_share_a_program(tiny):
  raw = config.load(f'{tiny}:class,er')
  axes = {
    'optimizer.lr': (0.1, 0.2),
    'er.coef': (0.5, 1.0),
    'er.capacity': (30, 40),
    'optimizer.momentum': (None, 0.0, 0.9, 0.5),
  }
  cells = sweep.expand(raw, axes)
  groups = compile_groups([build.traced(c) for c in cells])
  # Two capacities; no momentum (None and 0) or some, which has a state of its own: 0 and None differ
  # in the text of the configuration only.
  assert len(cells) == 32
  assert len(groups) == 6
  assert sorted(len(g.members) for g in groups) == [4, 4, 4, 4, 8, 8]


def test_a_factorial_ablation_is_one_program(call, tiny, tmp_path):
  """Gates switch methods on and off inside it; off is as if the method were not there."""
  raw = config.load(f'{tiny}:class,er,lwf')
  axes = {'er.gate': (0.0, 1.0), 'lwf.gate': (0.0, 1.0)}
  assert len(compile_groups([build.traced(c) for c in sweep.expand(raw, axes)])) == 1
  argv = (f'--config={tiny}:class,er,lwf', '--config.seeds=0')
  done = call(sweep.main, *argv, f'--workdir={tmp_path / "all"}', f'--config.sweep={axes}')
  assert done.code == 0 and len(lines(tmp_path / 'all')) == 4
  for line in lines(tmp_path / 'all'):
    on = [m for m in ('er', 'lwf') if line['config'][m]['gate']]
    place = tmp_path / ('+'.join(on) or 'naive')
    alone = (f'--config={tiny}:class,{",".join(on)}', '--config.seeds=0', f'--workdir={place}')
    assert call(run.main, *alone).code == 0
    np.testing.assert_allclose(line['R'], lines(place)[0]['R'], atol=0.051)  # one of 20


def test_the_program_of_a_group_is_compiled_once(call, tiny, tmp_path, monkeypatch):
  made = []
  real = engine.run_chunks
  monkeypatch.setattr(engine, 'run_chunks', lambda *a, **k: made.append(1) or real(*a, **k))
  argv = (f'--config={tiny}:class,er', f'--workdir={tmp_path}', '--config.seeds=0')
  axes = "{'optimizer.lr': (0.03, 0.02), 'er.coef': (1.0, 0.5)}"
  assert call(sweep.main, *argv, f'--config.sweep={axes}').code == 0
  assert len(made) == 1 and len(lines(tmp_path)) == 4
  assert real is loop.run_chunks


@pytest.mark.long
def test_widths_of_a_device(call, tiny, swept, tmp_path, monkeypatch):
  before = {(c['config_sha256'], c['seed']): c for c in lines(swept)}
  monkeypatch.setenv('CL_JAX_CACHE', str(tmp_path / 'cache'))
  for width, more in (('3', '3 at once'), ('measure', 'compiling')):
    argv = (f'--config={tiny}:class,er', f'--workdir={tmp_path / width}', f'--width={width}')
    grid = "{'optimizer.lr': (0.03, 0.01), 'er.capacity': (30,)}"
    done = call(sweep.main, *argv, f'--config.sweep={grid}')
    assert done.code == 0 and more in done.err
    for line in lines(tmp_path / width):
      other = before[line['config_sha256'], line['seed']]
      np.testing.assert_allclose(line['R'], other['R'], atol=0.051)
  (chosen,) = json.loads((tmp_path / 'cache' / 'calibration.json').read_text()).values()
  assert chosen in (1, 2, 4)
  for width in ('0', '-1', 'wide', '1.5'):
    done = call(run.main, f'--config={tiny}', f'--workdir={tmp_path / "x"}', f'--width={width}')
    assert done.code == 2 and '--width must be' in done.line


def test_methods_can_be_an_axis(tiny):
  raw = config.load(f'{tiny}:class,er')
  cells = sweep.expand(raw, {'methods': ((), ('er',), ('ewc',)), 'optimizer.lr': (0.1, 0.2)})
  assert [c['methods'] for c in cells[::2]] == [(), ('er',), ('ewc',)]
  assert 'er' not in cells[0] and cells[2]['er']['capacity'] == 30
  assert cells[4]['ewc']['coef'] == 1.0


def test_a_signal_in_the_last_moment_of_a_group_stops_the_next(call, tiny, tmp_path, monkeypatch):
  train, trained = engine.train, []

  def late(*args, **how):
    trained.append(args[0].seeds)
    outcome = train(*args, **how)
    signal.raise_signal(signal.SIGTERM)
    return outcome

  monkeypatch.setattr(engine, 'train', late)
  grid = "--config.sweep={'er.draw': (3, 5)}"
  argv = (f'--config={tiny}:class,er', f'--workdir={tmp_path}', '--config.seeds=0,', grid)
  done = call(sweep.main, *argv)
  assert done.code == 128 + signal.SIGTERM and '1 runs are still to be done' in done.line
  assert len(trained) == 1 and call(sweep.main, *argv).code == 0 and len(trained) == 2
  done = call(sweep.main, *argv, '--config.tuning.drop=0.3')
  assert done.code == 2 and 'config.tuning is for' in done.line


@pytest.mark.parametrize(
  ('axes', 'message'),
  [
    ({}, r'config\.sweep is empty'),
    ({'optimizer.lr': 0.1}, r"config\.sweep\['optimizer\.lr'\] must be a tuple"),
    ({'optimizer.lr': ()}, 'must be a tuple'),
    ({'optimizer.rl': (0.1,)}, r'did you mean config\.optimizer\.lr'),
    ({'optimizer.lr': (0.1, -1.0)}, r'config\.optimizer\.lr must be greater than 0'),
    ({'seeds': ((0,), (1,))}, 'cannot vary seeds'),
    ({'feed.name': ('grain',)}, 'cannot vary feed.name'),
    ({'tuning.drop': (0.1, 0.2)}, 'cannot vary tuning.drop'),
    ({'optimizer.lr': (0.1, 0.1)}, 'cells that are the same'),
    ({'ewc.coef': (1.0,)}, "add 'ewc' to config.methods"),
  ],
)
def test_mistakes_in_a_grid(tiny, axes, message):
  with pytest.raises(UserError, match=message):
    sweep.expand(config.load(f'{tiny}:class,er'), axes)


def test_run_refuses_a_grid_and_a_workdir_is_one_or_the_other(call, tiny, swept):
  argv = (f'--config={tiny}:class,er', f'--workdir={swept}')
  done = call(run.main, *argv, f'--config.sweep={GRID}')
  assert done.code == 2 and 'use python -m experiments.sweep' in done.line
  done = call(run.main, *argv)
  assert done.code == 2 and 'one is a sweep' in done.line
