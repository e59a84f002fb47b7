"""One run of two processes with two devices each, launched here and in Slurm, and one of them killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import devices, launch, launch_jobs, launch_options, launch_slurm, processes
from tests.compiling import QUICKLY
from tests.experiments.test_devices import children
from tests.experiments.test_launch import deterministic, start, until
from tests.experiments.test_launch_slurm import slurm, tell  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parents[2]
MLP = """
def get_config(arg=''):
  return {
    'name': 'tiny', 'data': {'examples_per_class': 20, 'test_per_task': 16, 'test_batch': 16},
    'tasks': 2, 'batch': 8, 'ends_batch': 16, 'iterations': 12, 'chunk': 3,
    'model': {'name': 'mlp', 'sizes': (16,)}, 'optimizer': {'lr': 0.05},
  }
"""


@pytest.fixture
def mlp(tmp_path, monkeypatch) -> Path:
  """The configuration; whatever is started sees two devices, and compiles at once."""
  for name, value in {**QUICKLY, 'JAX_NUM_CPU_DEVICES': '2'}.items():
    monkeypatch.setenv(name, value)
  path = tmp_path / 'mlp.py'
  path.write_text(MLP)
  return path


def words(config: Path, place: Path, *more: str) -> list[str]:
  return [f'--config={config}', f'--workdir={place}', '--shard=fsdp', '--processes=2', *more]


def undisturbed(config: Path, place: Path, *more: str) -> list[str]:
  """Results of two processes that nobody launched and nobody killed."""
  where = f'--coordinator={processes.LOOPBACK}{processes.free_port()}'
  argv = [sys.executable, '-m', 'experiments.run', *words(config, place, *more), where]
  both = [subprocess.Popen([*argv, f'--process={i}'], cwd=ROOT) for i in (0, 1)]
  assert [p.wait(600) for p in both] == [0, 0]
  return deterministic(place)


def beside(what: Callable[[], None]) -> threading.Thread:
  thread = threading.Thread(target=what)
  thread.start()
  return thread


def saved(folder: Path) -> bool:
  return any(int(p.name) for p in folder.glob('checkpoints/*/*') if p.name.isdecimal())


@pytest.mark.long
def test_a_launch_goes_on_from_the_checkpoint_when_one_process_dies(call, mlp, tmp_path):
  folder = tmp_path / 'launched/jobs/000'

  def kill() -> None:
    who = until(lambda: launch_jobs.document(folder / 'worker.json'), 'the job starts')
    second = until(lambda: children(who['pid']).get(1), 'its second process')
    until(lambda: saved(folder), 'a checkpoint')
    os.kill(second, signal.SIGKILL)

  killer = beside(kill)
  done = call(launch.main, *words(mlp, tmp_path / 'launched', '--save_every=0'))
  killer.join()
  assert done.code == 0, done.err
  assert 'job 000: waiting to be tried again, failed 1 time: ended by SIGKILL' in done.err
  log = (folder / 'log.txt').read_text()
  assert 'process 1 of 2 was ended by SIGKILL' in log and 'going on from leg' in log
  (line,) = deterministic(tmp_path / 'launched')
  assert '"state_sha256": "' in line and '4 x cpu' in line
  assert [line] == undisturbed(mlp, tmp_path / 'undisturbed')


def test_a_job_of_two_tasks_in_slurm_is_requeued_and_killed(slurm, mlp, tmp_path):  # noqa: F811
  """Told once that its time is over, then its second task is killed."""
  place, log = tmp_path / 'launched', tmp_path / 'log.txt'
  more = ('--config.iterations=60', '--save_every=0')
  folder, said = place / 'jobs/000', lambda text: text in (folder / 'log.txt').read_text()
  launcher = start((*words(mlp, place, *more), '--executor=slurm', '--time=5'), log)
  try:
    until(lambda: saved(folder), 'a checkpoint')
    number = (launch_jobs.document(folder / 'state.json') or {})['run']['id']
    tell('scancel', '--signal=USR2', f'{number}.0')
    until(lambda: said('going on from leg'), 'the job puts itself back and goes on')
    os.kill((launch_jobs.document(folder / 'worker-1.json') or {})['pid'], signal.SIGKILL)
    assert launcher.wait(600) == 0, log.read_text()
  finally:
    launcher.kill()
    launcher.wait()
    if run := (launch_jobs.document(folder / 'state.json') or {}).get('run'):
      tell('scancel', run['id'])  # only after a failed assertion is there anything left
  assert 'job 000: waiting to be tried again, failed 1 time' in log.read_text()
  assert said('stopped by SIGTERM') and said('state saved')
  assert (folder / 'log.txt').read_text().count('going on from leg') == 2
  found = deterministic(place)
  assert len(found) == 1 and '4 x cpu' in found[0]
  assert found == undisturbed(mlp, tmp_path / 'undisturbed', *more)


# --- without a Slurm ----------------------------------------------------------------------------------


def test_what_slurm_is_asked_for(monkeypatch, tmp_path):
  """As many tasks as processes, shared out over the nodes; the cores of a job over its tasks."""
  asked = {}

  class Executor:
    def __init__(self, *a, **k): ...
    def update_parameters(self, **k):
      asked.update(k)

    def submit(self, task):
      asked['task'] = task
      return SimpleNamespace(job_id='7')

  monkeypatch.setitem(sys.modules, 'submitit', SimpleNamespace(SlurmExecutor=Executor))
  part = SimpleNamespace(name='000', program='run', devices=3, seeds=(0,))
  job = launch_jobs.Job(part, tmp_path)  # pyright: ignore[reportArgumentType]
  wish, _ = launch_options.wishes(['--executor=slurm', '--nodes=2', '--cpus=12', '--gpus=8'])
  monkeypatch.setattr(launch_slurm, 'mark', lambda job: '')
  launch_slurm.submit(job, [], tmp_path, 'x', wish.slurm, 4)
  assert (asked['nodes'], asked['ntasks_per_node'], asked['cpus_per_task']) == (2, 2, 3)
  assert asked['gpus_per_node'] == 8 and asked['task'].joined
  assert asked['srun_args'] == ['--cpus-per-task=3', '--kill-on-bad-exit=1']


def test_one_process_a_node_has_all_its_gpus():
  """jax would give it the first one."""
  assert devices.alone_on_its_node({'SLURM_NTASKS': '2', 'SLURM_STEP_NUM_NODES': '2'})
  assert not devices.alone_on_its_node({'SLURM_NTASKS': '2', 'SLURM_STEP_NUM_NODES': '1'})
  assert not devices.alone_on_its_node({})


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    (('--nodes=3', '--executor=slurm'), '--nodes=3 cannot share out --processes=2'),
    (('--nodes=2',), '--nodes is for --executor=slurm'),
  ],
)
def test_mistakes(call, mlp, tmp_path, more, message):
  done = call(launch.main, *words(mlp, tmp_path / 'x'), *more)
  assert done.code == 2 and message in done.line and not (tmp_path / 'x').exists()
