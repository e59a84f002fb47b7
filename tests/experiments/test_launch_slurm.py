"""A launch in a real Slurm on this machine: requeued, preempted, killed jobs and a killed launcher.

Needs submitit and a Slurm of one machine that answers: 24 cells run there and, undisturbed, as processes;
every deterministic field must be the same. Preemption is tried where there is a partition `high` beside the
default one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from experiments import launch_jobs, launch_slurm
from tests.experiments.conftest import TINY
from tests.experiments.test_launch import deterministic, failures

ROOT = Path(__file__).resolve().parents[2]
GRID = (
  "{'optimizer.lr': (0.03, 0.02, 0.01, 0.005), 'er.capacity': (30, 40, 50), 'er.coef': (1.0, 0.5)}"
)
PATIENCE = 400.0


def absent() -> str:
  """Why there is no Slurm to try, '' where there is."""
  if not shutil.which('sbatch'):
    return 'needs Slurm: there is no sbatch on this machine'
  if find_spec('submitit') is None:
    return "needs Slurm's submitit: pip install 'cl_jax[slurm]'"
  if launch_slurm.queue() is None:
    return 'needs a running Slurm: squeue does not answer'
  nodes = tell('sinfo', '--noheader', '--Node', '--format=%N').split()
  return '' if len(set(nodes)) == 1 else 'needs a Slurm of one machine'


def tell(*words: str) -> str:
  done = subprocess.run(words, capture_output=True, text=True, timeout=60)
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


def until(what: Callable, why: str):
  """Waits for something and returns it."""
  end = time.monotonic() + PATIENCE
  while not (found := what()):
    assert time.monotonic() < end, f'never came: {why}'
    time.sleep(0.2)
  return found


def start(config: Path, place: Path, *more: str) -> subprocess.Popen:
  log = place.with_suffix('.txt').open('ab')
  words = (f'--config={config}:class,er', f'--workdir={place}', f'--config.sweep={GRID}')
  words = (*words, '--cells=4', '--save_every=1', '--cpus=1', *more)
  command = [sys.executable, '-m', 'experiments.launch', *words]
  with log:
    return subprocess.Popen(
      command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def training(folder: Path) -> str:
  """The id of the job that works on this folder and has a checkpoint."""
  state, log = launch_jobs.document(folder / 'state.json'), folder / 'log.txt'
  run = (state or {}).get('run') or {}
  if not run or not log.exists() or 'leg 1/5 done' not in log.read_text():
    return ''
  entry = launch_slurm.entry_of(launch_slurm.queue() or [], run['name'], run['id'])
  return run['id'] if entry and entry.state == 'RUNNING' else ''


def ours(state: str) -> list[str]:
  """The ids of launched jobs in this state."""
  found = launch_slurm.queue() or []
  return [e.id for e in found if e.state == state and e.name.startswith('cl_jax_')]


def starts(number: str) -> int:
  """How often Slurm has put a job back into the queue."""
  text = tell('scontrol', 'show', 'job', '--oneliner', number)
  return int(text.partition('Restarts=')[2].split()[0])


@pytest.fixture
def slurm():
  if why := absent():
    pytest.skip(why)


def test_whatever_happens_in_slurm_the_results_are_those_of_processes(slurm, tmp_path):
  config = tmp_path / 'tiny.py'
  config.write_text(TINY.replace("'examples_per_class': 20", "'examples_per_class': 300"))
  place = tmp_path / 'slurm'
  launcher = start(config, place, '--executor=slurm', '--time=5')
  jobs = place / 'jobs'
  try:
    # Put back into the queue by its owner.
    first = until(lambda: training(jobs / '000'), 'job 000 trains')
    tell('scontrol', 'requeue', first)
    # Told that its time is over: it saves, and puts itself back.
    second = until(lambda: training(jobs / '001'), 'job 001 trains')
    tell('scancel', '--signal=USR2', f'{second}.0')
    log = next((place / 'slurm').glob(f'*/{second}_0_log.out'))
    until(lambda: f'Requeued job {second}' in log.read_text(), 'job 001 puts itself back')
    # Killed.
    until(lambda: training(jobs / '002'), 'job 002 trains')
    worker = launch_jobs.document(jobs / '002' / 'worker.json')
    assert worker is not None
    os.kill(worker['pid'], signal.SIGKILL)
    until(lambda: failures(jobs / '002') == 1, 'the launcher sees that 002 died')
    # The launcher is killed, and another one adopts what runs.
    running = until(lambda: [j for j in sorted(jobs.iterdir()) if training(j)], 'some job trains')
    launcher.kill()
    launcher.wait()
    before = [(launch_jobs.document(j / 'state.json') or {})['run'] for j in running]
    launcher = start(config, place, '--executor=slurm', '--time=5')
    text = place.with_suffix('.txt')
    until(lambda: text.read_text().count('running already') == 2, 'the next launcher looks around')
    after = [(launch_jobs.document(j / 'state.json') or {})['run'] for j in running]
    assert all(a in (b, None) for a, b in zip(after, before, strict=True))
    # Preempted by a job of a higher partition.
    if 'high' in tell('sinfo', '--noheader', '--format=%R').split():
      until(lambda: any(training(j) for j in jobs.iterdir()), 'some job trains')
      before = {line: starts(line) for line in ours('RUNNING')}
      tell('sbatch', '--partition=high', '--exclusive', '--output=/dev/null', '--wrap=sleep 5')
      until(lambda: any(starts(n) > k for n, k in before.items()), 'a job is preempted and queued')
    assert launcher.wait(PATIENCE) == 0, place.with_suffix('.txt').read_text()
  finally:
    launcher.kill()
    for j in jobs.iterdir():  # only after a failed assertion is there anything left
      if run := (launch_jobs.document(j / 'state.json') or {}).get('run'):
        tell('scancel', run['id'])
  said = lambda job, text: text in (jobs / job / 'log.txt').read_text()  # noqa: E731
  assert said('000', 'going on from leg') and said('001', 'going on from leg')
  local = tmp_path / 'local'
  assert start(config, local, '--jobs=1').wait(PATIENCE) == 0
  assert len(deterministic(local)) == 48 and all(
    '"state_sha256": "' in n for n in deterministic(local)
  )
  assert deterministic(place) == deterministic(local)
