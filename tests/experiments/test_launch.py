"""Launches: every cell checked first, jobs that are killed, a launcher that is killed, the same results."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import launch, launch_jobs, launch_slurm, launch_status, sweep
from experiments.launch_part import Part
from tests.experiments.conftest import TINY, lines

ROOT = Path(__file__).resolve().parents[2]
GRID = "{'optimizer.lr': (0.03, 0.02, 0.01), 'er.capacity': (30, 40)}"
DIFFER = ('wall_s', 'compile_s', 'peak_rss_bytes', 'started', 'command')
PATIENCE = 240.0

pytestmark = pytest.mark.usefixtures('started_quickly')


def deterministic(place: Path) -> list[str]:
  """results.jsonl as text, without the fields that are times, places or sizes of the process."""
  return [
    json.dumps({k: v for k, v in line.items() if k not in DIFFER}, sort_keys=True)
    for line in lines(place)
  ]


def words(tiny: Path, place: Path, *more: str) -> tuple[str, ...]:
  # Two seeds and three rates a capacity: two programs of three cells.
  given = (f'--config={tiny}:class,er', f'--workdir={place}', f'--config.sweep={GRID}')
  return (*given, '--save_every=0', '--cpus=1', *more)


def start(argv: tuple[str, ...], log: Path) -> subprocess.Popen:
  with log.open('ab') as out:
    return subprocess.Popen(
      [sys.executable, '-m', 'experiments.launch', *argv],
      cwd=ROOT,
      stdout=out,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )


def until(what: Callable, why: str):
  end = time.monotonic() + PATIENCE
  while not (found := what()):
    assert time.monotonic() < end, f'never came: {why}'
    time.sleep(0.05)
  return found


def worker(folder: Path, text: str = '') -> int:
  """The process that works on a job and has said something, 0 as long as there is none."""
  who = launch_jobs.document(folder / 'worker.json')
  log = folder / 'log.txt'
  if not who or not launch_jobs.alive(who, folder) or text not in log.read_text():
    return 0
  return who['pid']


def failures(folder: Path) -> int:
  return (launch_jobs.document(folder / 'state.json') or {}).get('failures', 0)


@pytest.fixture(scope='module')
def longer(tmp_path_factory) -> Path:
  """The tiny experiment with twice the steps: long enough to be killed in the middle."""
  path = tmp_path_factory.mktemp('launches') / 'longer.py'
  path.write_text(TINY.replace("'examples_per_class': 20", "'examples_per_class': 40"))
  return path


@pytest.fixture(scope='module')
def undisturbed(longer, tmp_path_factory) -> Path:
  place = tmp_path_factory.mktemp('launches') / 'undisturbed'
  launcher = start(words(longer, place, '--jobs=2'), place.with_suffix('.txt'))
  assert launcher.wait(PATIENCE) == 0, place.with_suffix('.txt').read_text()
  return place


def test_a_grid_is_done_once_in_private_folders_and_in_the_order_of_the_grid(
  undisturbed, longer, call
):
  found = [
    (c['config']['optimizer']['lr'], c['config']['er']['capacity'], c['seed'])
    for c in lines(undisturbed)
  ]
  assert found == [(lr, n, s) for lr in (0.03, 0.02, 0.01) for n in (30, 40) for s in (0, 1)]
  for folder in (undisturbed, *undisturbed.glob('jobs'), *undisturbed.glob('jobs/*')):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
  assert sorted(p.name for p in undisturbed.glob('jobs/*')) == ['000', '001']
  logs = {p: p.read_bytes() for p in undisturbed.glob('jobs/*/log.txt')}
  done = call(launch.main, *words(longer, undisturbed))
  assert done.code == 0 and '2 jobs in' in done.err and '2 over, 0 running' in done.err
  assert {p: p.read_bytes() for p in logs} == logs and '0.02' in done.out
  said = call(launch.main, '--status', str(undisturbed))
  assert said.code == 0 and '2 done, 0 running, 0 waiting, 0 failed' in said.out
  assert (
    said.out.count(' done ') >= 2 and 'er.capacity' in said.out and 'no launcher' not in said.out
  )


@pytest.mark.long
def test_a_killed_worker_and_a_killed_launcher_change_nothing(undisturbed, longer, tmp_path, call):
  place, log = tmp_path / 'disturbed', tmp_path / 'log.txt'
  job = place / 'jobs/000'
  first = start(words(longer, place, '--jobs=1'), log)
  second = None
  try:
    pid = until(lambda: worker(job, 'leg 1/5 done'), 'job 000 trains')
    os.kill(pid, signal.SIGKILL)
    until(lambda: failures(job) == 1, 'the launcher sees that its worker died')
    other = until(lambda: worker(job, 'going on from leg'), 'job 000 goes on')
    assert other != pid
    first.kill()
    first.wait()
    said = call(launch.main, f'--status={place}')
    assert (
      f'000  running  optimizer.lr 3 values, er.capacity 30, 2 seeds: process {other}' in said.out
    )
    assert '(failed 1 time before)' in said.out and '0 done, 1 running, 1 waiting' in said.out
    assert 'no launcher is at work; to go on: python -m experiments.launch' in said.out
    second = start(words(longer, place, '--jobs=1'), log)
    until(lambda: '0 over, 1 running already' in log.read_text(), 'the next launcher adopts it')
    assert launch_jobs.document(job / 'worker.json') == launch_jobs.identity(other)
    assert second.wait(PATIENCE) == 0, log.read_text()
  finally:
    for process in (first, second):
      if process is not None:
        process.kill()
  text = log.read_text()
  assert (
    'job 000: waiting to be tried again, failed 1 time: ended by SIGKILL; its last words' in text
  )
  assert 'job 000: done (failed 1 time before)' in text
  assert (job / 'log.txt').read_text().count('compiling') == 1, (
    'one start, and from then resumptions'
  )
  assert deterministic(place) == deterministic(undisturbed)


@pytest.mark.long
def test_a_launcher_that_is_asked_to_stop_lets_its_jobs_save(longer, tmp_path, undisturbed, call):
  place, log = tmp_path / 'stopped', tmp_path / 'log.txt'
  grid = "--config.sweep={'optimizer.lr': (0.03, 0.02, 0.01), 'er.capacity': (30,)}"
  argv = (*words(longer, place), grid)
  launcher = start(argv, log)
  pid = until(lambda: worker(place / 'jobs/000', 'leg 1/5 done'), 'job 000 trains')
  launcher.terminate()
  assert launcher.wait(PATIENCE) == 128 + signal.SIGTERM
  assert not launch_jobs.since(pid) and 'state saved' in (place / 'jobs/000/log.txt').read_text()
  assert call(launch.main, *argv).code == 0 and failures(place / 'jobs/000') == 0
  wanted = [text for text in deterministic(undisturbed) if '"capacity": 30' in text]
  assert deterministic(place) == wanted and len(wanted) == 6


# --- before anything is started ---------------------------------------------------------------------


@pytest.mark.parametrize(
  ('grid', 'messages'),
  [
    (
      "{'optimizer.lr': (0.1, -1.0), 'er.capacity': (30, 40)}",
      ('cell 3 of 4 (optimizer.lr -1.0, er.capacity 30): config.optimizer.lr', '2 cells are wrong'),
    ),
    ("{'tasks': (5, 3)}", ('cell 2 of 2 (tasks 3): ', 'nothing was started')),
    ("{'optimizer.rl': (0.1,)}", ('cell 1 of 1', 'did you mean config.optimizer.lr')),
    ("{'optimizer.lr': 0.1}", ('must be a tuple',)),
    ("{'optimizer.lr': (0.1, 0.1)}", ('cells that are the same',)),
  ],
)
def test_every_cell_is_checked_first(call, tiny, tmp_path, grid, messages):
  argv = (f'--config={tiny}:class,er', f'--workdir={tmp_path / "x"}', f'--config.sweep={grid}')
  done = call(launch.main, *argv)
  assert done.code == 2 and all(m in done.line for m in messages), done.err
  assert not (tmp_path / 'x' / 'jobs').exists() and not (tmp_path / 'x' / 'launch.json').exists()


def test_a_plan_says_what_jobs_need_and_makes_nothing(call, tiny, tmp_path):
  argv = (*words(tiny, tmp_path / 'x'), '--plan', '--cells=2')
  done = call(launch.main, *argv)
  assert done.code == 0 and not (tmp_path / 'x').exists()
  rows = done.out.splitlines()
  assert [row.split()[:2] for row in rows[1:5]] == [
    ['000', '2'],
    ['001', '4'],
    ['002', '2'],
    ['003', '4'],
  ]
  assert (
    all(0.5 <= float(row.split()[2]) < 0.7 for row in rows[1:5]) and '4 jobs, 12 runs' in rows[5]
  )


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    (('--executor=ray',), 'executor'),
    (('--jobs=0',), 'jobs'),
    (('--partition=low',), '--partition is for --executor=slurm'),
    (('--executor=slurm', '--time=soon'), '--time must be minutes'),
    (('--executor=slurm', '--mem=lots'), '--mem must be a size'),
    (('--config.optimizer.rl=1',), 'did you mean'),
    (('--staus=x',), 'there is no option --staus: did you mean --status?'),
    (('--work-dir=x',), 'did you mean --workdir?'),
    (('--noplan', '--nooffline', '--quux'), 'there is no option --quux (see --help)'),
  ],
)
def test_mistakes_on_the_command_line(call, tiny, tmp_path, more, message):
  done = call(launch.main, *words(tiny, tmp_path / 'x'), *more)
  assert done.code == 2 and message in done.line and not (tmp_path / 'x').exists()


def test_another_configuration_is_refused_and_a_grid_may_grow(
  call, longer, undisturbed, monkeypatch
):
  done = call(launch.main, *words(longer, undisturbed), '--config.epochs=3')
  assert done.code == 2 and 'belongs to another configuration' in done.line
  assert call(launch.main, '--status=/nowhere').code == 2
  started = []
  monkeypatch.setattr(launch, 'follow', lambda launch, todo: started.extend(todo))
  monkeypatch.setattr(launch, 'gathered', lambda *a: [])
  before = (undisturbed / 'launch.json').read_text()
  grid = "--config.sweep={'optimizer.lr': (0.03, 0.02, 0.005), 'er.capacity': (30,)}"
  assert call(launch.main, *words(longer, undisturbed), grid).code == 0
  assert [(j.part.name, len(j.part.cells)) for j in started] == [('000', 3), ('002', 1)]
  (undisturbed / 'launch.json').write_text(before)


def test_results_of_a_sweep_are_not_replaced(call, tiny, tmp_path, monkeypatch):
  monkeypatch.setattr(launch, 'follow', lambda launch, todo: None)
  (tmp_path / 'results.jsonl').write_text('{"config_sha256": "a", "seed": 0}\n')
  done = call(launch.main, *words(tiny, tmp_path))
  assert done.code == 2 and 'has results of experiments.sweep or run' in done.line
  assert (tmp_path / 'results.jsonl').read_text() == '{"config_sha256": "a", "seed": 0}\n'
  assert not (tmp_path / 'jobs').exists() and not (tmp_path / 'config.json').exists()
  (tmp_path / 'launch.json').write_text('{}')  # nor does a sweep add what a launch would drop
  argv = [w for w in words(tiny, tmp_path) if not w.startswith('--cpus')]
  done = call(sweep.main, *argv)
  assert done.code == 2 and 'belongs to experiments.launch' in done.line


def test_a_job_that_crashes_is_tried_again_and_then_listed(call, tiny, tmp_path, monkeypatch):
  crash = "print('boom', flush=True); import os; os._exit(7)"
  monkeypatch.setattr(launch_jobs, 'command', lambda job: (sys.executable, '-c', crash))
  grid = "--config.sweep={'optimizer.lr': (0.03, 0.02)}"
  argv = (*words(tiny, tmp_path / 'x'), grid, '--retries=1')
  for n in (2, 4):  # the same command is another set of tries
    done = call(launch.main, *argv)
    assert done.code == 7 and 'failed 2 times for good: boom' in done.err
    assert '1 of 1 jobs failed for good' in done.line
    assert (tmp_path / 'x/jobs/000/log.txt').read_text() == 'boom\n' * n
  said = call(launch.main, '--status', str(tmp_path / 'x'))
  assert said.code == 0 and '1 failed' in said.out and 'boom' in said.out


def test_slurm_without_submitit_says_what_to_install(call, tiny, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'submitit', None)
  done = call(launch.main, *words(tiny, tmp_path / 'x'), '--executor=slurm')
  assert (
    done.code == 2 and "pip install 'cl_jax[slurm]'" in done.line and not (tmp_path / 'x').exists()
  )


def test_without_a_grid_no_cell_is_named_and_words_are_cut_where_they_end(call, tiny, tmp_path):
  argv = (f'--config={tiny}:class,er', f'--workdir={tmp_path / "x"}', '--config.tasks=3')
  done = call(launch.main, *argv)
  assert done.code == 2 and done.line.endswith('; nothing was started') and 'cell' not in done.line
  folder = tmp_path / 'job'
  folder.mkdir()
  job = launch_jobs.Job(Part('000', '', 'run', ('a',), (0,), 1, 0, 0), folder)
  (folder / 'log.txt').write_text('some words ' * 20 + 'end; run the same command again to go on')
  text = launch_status.progress(job)
  assert (
    text[:8] in ('... some', '... word') and text.endswith('words end') and 90 < len(text) <= 104
  )
  entry = launch_slurm.Entry('7', 'n', 'PENDING', 'Priority')
  job.state['run'] = {'id': '7', 'name': 'n'}
  assert launch_status.brief(job, [entry]) == 'in the queue (Priority)'
  assert launch_status.brief(job, [entry._replace(state='RUNNING')]).endswith('words end')
