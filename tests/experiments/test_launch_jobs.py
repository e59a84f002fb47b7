"""The pieces of a launch by themselves: grids in parts, what becomes of a job, what Slurm says."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import (
  config,
  launch_jobs,
  launch_options,
  launch_part,
  launch_plan,
  launch_slurm,
  pool,
  sweep,
)
from experiments.launch_follow import Launch


def test_a_job_is_a_grid_of_exactly_its_cells(tiny):
  raw = config.load(f'{tiny}:class,er')
  axes = {
    'methods': (('er',), ()),
    'optimizer.lr': (0.1, 0.2, 0.3),
    'optimizer.momentum': (None, 0.0, 0.9),
  }
  cells = launch_plan.cells(raw, axes)
  for most in (1, 2, 4, 99):
    pieces = launch_plan.products(cells, most)
    assert sorted(c.sha256 for p in pieces for c in p) == sorted(c.sha256 for c in cells)
    assert max(map(len, pieces)) <= most
    for piece in pieces:
      source = launch_plan.source(raw, piece)
      grid = config.tuples(json.loads(json.dumps(source)))
      own = sweep.expand(grid, grid.pop('sweep'))
      assert {config.sha256(c) for c in own} == {c.sha256 for c in piece}
  corner = [c for c in cells if not (c.values['optimizer.lr'] == 0.3 and c.values['methods'])]
  assert len(launch_plan.products(corner, 99)) == 3, 'what is no grid is taken apart'


def test_without_a_sweep_the_seeds_are_one_job(tiny):
  (cell,) = launch_plan.cells(config.load(f'{tiny}:class,er'), {})
  assert 'sweep' not in launch_plan.source(config.load(f'{tiny}:class,er'), [cell])


def test_time_comes_from_finished_runs():
  part = launch_part.Part('000', '', 'sweep', ('a', 'b'), (0, 1), 1, 1e9, 4e12)
  assert launch_part.seconds(part, []) == launch_part.START + 4e12 / launch_part.SPEED
  line = {'flops_per_step': 1e9, 'steps': 100, 'wall_s': 50.0}
  assert launch_part.seconds(part, [line]) == pytest.approx(4e12 * 50 / 1e11)


@pytest.mark.parametrize(
  ('words', 'most'),
  [((), 4), (('--cpus=1',), 4), (('--cpus=2',), 2), (('--cpus=3',), 1), (('--cpus=9',), 1),
   (('--cpus=2', '--jobs=3'), 3), (('--executor=slurm', '--cpus=2'), sys.maxsize)],
)  # fmt: skip
def test_a_job_on_this_machine_gets_the_cores_that_it_was_promised(words, most, monkeypatch):
  monkeypatch.setattr(pool, 'cores', lambda: frozenset(range(4)))
  monkeypatch.setattr(pool, 'accelerated', lambda: False)
  wish, _ = launch_options.wishes(words)
  own = Launch(Path(), '', [], wish, None, print)  # pyright: ignore[reportArgumentType]
  assert own.limit == most
  if wish.cpus and not wish.jobs and wish.executor == 'local':
    assert min(map(len, pool.shares(pool.cores(), own.limit))) >= min(wish.cpus, 4)


def test_with_an_accelerator_it_is_one_job_whatever_its_cores(monkeypatch):
  monkeypatch.setattr(pool, 'cores', lambda: frozenset(range(4)))
  monkeypatch.setattr(pool, 'default_workers', lambda: 1)
  wish, _ = launch_options.wishes(['--cpus=2'])
  assert Launch(Path(), '', [], wish, None, print).limit == 1  # pyright: ignore[reportArgumentType]


# --- what becomes of a job --------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path) -> launch_jobs.Job:
  part = launch_part.Part('000', 'all', 'sweep', ('a',), (0, 1), 1, 1e9, 1e9)
  (tmp_path / 'log.txt').write_text('begin\nthe last words\n')
  return launch_jobs.read(part, tmp_path)


def checkpoint(job: launch_jobs.Job, step: int) -> None:
  (job.folder / 'checkpoints/runs-1' / str(step)).mkdir(parents=True)


def result(job: launch_jobs.Job, *seeds: int) -> None:
  text = ''.join(json.dumps({'config_sha256': 'a', 'seed': s}) + '\n' for s in seeds)
  (job.folder / 'results.jsonl').write_text(text)


def test_crashes_count_and_interruptions_that_got_on_do_not(job):
  assert 'waiting to be tried again, failed 1 time' in launch_jobs.ended(job, 1, 1)
  checkpoint(job, 3)
  launch_jobs.ended(job, 128 + signal.SIGTERM, 1)
  assert launch_jobs.read(job.part, job.folder).state['failures'] == 1 and job.waiting
  job.state['mark'] = launch_jobs.mark(job)  # the next start, which gets nowhere
  line = launch_jobs.ended(job, 128 + signal.SIGTERM, 1)
  assert 'failed 2 times for good: ended by SIGTERM; its last words: the last words' in line
  assert job.state['over'] and job.state['code'] == 143


def test_mistakes_and_nan_are_final_and_results_are_results(job):
  assert 'failed 1 time for good: the last words' in launch_jobs.ended(job, 2, 5)
  (job.folder / 'faults.jsonl').write_text('{"config_sha256": "a", "seed": 1}\n')
  assert launch_jobs.outcome(job) == ''
  result(job, 0)
  assert launch_jobs.outcome(job) == 'nan'
  launch_jobs.ended(job, 3, 5)
  assert job.state['over'] and job.state['code'] == 3
  result(job, 0, 1)
  assert launch_jobs.ended(job, 137, 5).endswith('done (failed 1 time before)')


def test_a_job_is_never_started_twice(job, monkeypatch):
  done = []
  monkeypatch.setattr(sweep, 'main', lambda argv: done.append(argv) or 0)
  with subprocess.Popen(
    [sys.executable, '-c', HOLD, str(job.folder / 'worker.json')],
    stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True,
  ) as other:  # fmt: skip
    assert other.stdout is not None and other.stdin is not None
    other.stdout.readline()
    (job.folder / 'worker.json').write_text(json.dumps(launch_jobs.identity(other.pid)))
    assert launch_jobs.perform('sweep', 1, job.folder, ['x']) == launch_jobs.BUSY and not done
    assert f'runs already, as process {other.pid}' in launch_jobs.ended(job, launch_jobs.BUSY, 2)
    again = launch_jobs.read(job.part, job.folder)
    assert launch_jobs.code_of(again) is None and not again.waiting
    elsewhere = {**launch_jobs.identity(other.pid), 'host': 'another name of this machine'}
    assert launch_jobs.alive(elsewhere, job.folder)
    other.stdin.close()
    other.wait()
    assert launch_jobs.code_of(again) == 137, 'gone, without an exit code'
    assert not launch_jobs.alive(elsewhere, job.folder), 'its lock is free'
  monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '1')
  assert launch_jobs.perform('sweep', 1, job.folder, ['x']) == 0 and done == [['x']]
  assert launch_jobs.code_of(again) == 0


HOLD = """
import fcntl, sys
file = open(sys.argv[1], 'a')
fcntl.flock(file, fcntl.LOCK_EX)
print('held', flush=True)
sys.stdin.read()
"""


# --- Slurm, without one -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('text', 'minutes'),
  [('90', 90), ('1:30', 2), ('2:00:00', 120), ('1-0', 1440), ('1-02:03', 1563), ('0-0:0:1', 1)],
)
def test_time_limits(text, minutes):
  assert launch_slurm.minutes(text) == minutes


def test_what_slurm_says_of_jobs(tmp_path, monkeypatch):
  squeue = tmp_path / 'squeue'
  squeue.write_text(
    '#!/bin/sh\necho "7|cl_jax_0_000|PENDING|Priority"\necho "3|cl_jax_0_000|FAILED|None"\n'
    'echo "8|cl_jax_0_001|CANCELLED|None"\necho "9|other|RUNNING|a|b"\n'
  )
  squeue.chmod(0o755)
  monkeypatch.setenv('PATH', str(tmp_path))
  found = launch_slurm.queue()
  assert found is not None and [e.id for e in found] == ['7', '3', '8', '9']
  entry = launch_slurm.entry_of(found, 'cl_jax_0_000', '3')
  assert entry is not None and entry.id == '7', (
    'the one in the queue is the job, also when resubmitted'
  )
  entry = launch_slurm.entry_of(found, 'cl_jax_0_001', '8')
  assert launch_slurm.end_of(entry, 137) == (143, 'cancelled in Slurm; ', True)
  assert launch_slurm.entry_of(found, 'other', '8') == found[-1]
  assert launch_slurm.entry_of(found, 'cl_jax_1_000', '3') is None, (
    'numbers start anew, names do not'
  )
  timed = found[1]._replace(state='TIMEOUT')
  assert launch_slurm.end_of(timed, 137)[0] in launch_jobs.ASKED
  assert launch_slurm.end_of(None, 5) == (5, '', False)
  squeue.write_text('#!/bin/sh\nexit 1\n')
  assert launch_slurm.queue() is None, 'no answer is not an empty queue'
