"""config.feed: examples that stay in files, from the command line."""

from __future__ import annotations

import os
import signal

import pytest

from cl_jax.errors import UserError
from experiments import build, config, engine, export, framework, launch, run, sweep
from tests.experiments.conftest import lines
from tests.prepared import prepare

SQUARES = """
def get_config():
  return {
    'dataset': 'squares', 'tasks': 2, 'batch': 8, 'ends_batch': 40, 'chunk': 2, 'methods': ('er',),
    'er': {'capacity': 10, 'draw': 4}, 'model': {'name': 'mlp', 'sizes': (8,)}, 'data': {'test_batch': 10},
  }
"""
GRAIN = ('--config.feed.name=grain', '--config.feed.workers=0', '--config.feed.ahead=3')


@pytest.fixture(scope='module')
def squares(tmp_path_factory):
  """(the configuration, where its data are)."""
  place = tmp_path_factory.mktemp('squares')
  prepare(place)
  (place / 'squares.py').write_text(SQUARES)
  return place / 'squares.py', place


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(squares, tmp_path, call, monkeypatch):
  """Stopped after a chunk inside the second task; the other run has its examples in memory."""
  path, data = squares
  common = (f'--config={path}', f'--data_dir={data}', '--save_every=0')
  whole = call(run.main, *common, f'--workdir={tmp_path / "a"}')
  assert whole.code == 0, whole.err
  chunks, passed = engine.run_chunks, []

  def stopping(*args, **options):
    for progress in chunks(*args, **options):
      passed.append((progress.leg, progress.done))
      if progress.leg == 1 and progress.done == 2:
        os.kill(os.getpid(), signal.SIGTERM)
      yield progress

  fed = (*common, f'--workdir={tmp_path / "b"}', *GRAIN)
  monkeypatch.setattr(engine, 'run_chunks', stopping)
  assert call(run.main, *fed).code == 128 + signal.SIGTERM
  assert passed[-1] == (1, 2) and not (tmp_path / 'b' / 'results.jsonl').exists()
  monkeypatch.setattr(engine, 'run_chunks', chunks)
  done = call(run.main, *fed)
  assert done.code == 0 and 'going on from leg 2 of 2, step 2' in done.err, done.err
  for one, two in zip(lines(tmp_path / 'a'), lines(tmp_path / 'b'), strict=True):
    for field in ('seed', 'R', 'state_sha256', 'config_sha256'):
      assert one[field] == two[field]


def test_what_does_not_go_together(squares, tmp_path, call):
  path, data = squares

  def says(words: str, main, *argv: str):
    done = call(main, f'--config={path}', f'--data_dir={data}', f'--workdir={tmp_path}', *argv)
    assert done.code == 2 and words in done.line, done.err

  says("config.feed.name must be one of '', 'grain'", run.main, '--config.feed.name=tf')
  says('config.feed.workers must be at least 0', run.main, *GRAIN, '--config.feed.workers=-1')
  says('config.feed.ahead must be at least 1', run.main, *GRAIN, '--config.feed.ahead=0')
  says("belong to config.feed.name='grain'", run.main, '--config.feed.workers=1')
  says(
    "config.dataset='fashion_mnist_small' is none",
    run.main,
    *GRAIN,
    '--config.dataset=fashion_mnist_small',
  )
  pad = ('--config.scenario=domain', '--config.transform.name=permuted', '--config.transform.pad=2')
  says('config.transform.pad needs the examples in memory', run.main, *GRAIN, *pad)
  says('--shard=data needs the examples in memory', run.main, *GRAIN, '--shard=data')
  for main in (sweep.main, framework.main, launch.main):
    says('needs the examples in memory', main, *GRAIN)


def test_a_number_of_workers_and_ahead_reach_grain(squares, monkeypatch):
  """And a feed tells no run from another."""
  path, data = squares
  plain = config.resolve(config.load(str(path)))
  fed = config.resolve({**plain, 'feed': {'name': 'grain', 'workers': 3, 'ahead': 5}})
  assert config.sha256(fed) == config.sha256(plain)
  setups = build.prepare({**fed, 'seeds': (0, 1)}, data)
  assert [s.seeds for s in setups] == [(0,), (1,)]
  with engine.feed(run.job(setups[0], data, 'sha')) as read:
    assert read is not None and (read.workers, read.ahead) == (3, 5)
  with pytest.raises(UserError, match='needs the examples in memory'):
    export.subject(fed, str(data))
