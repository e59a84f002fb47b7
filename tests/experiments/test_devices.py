"""One run over two devices: of one process, or of two on loopback, of which one is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cl_jax import checkpoint
from cl_jax.errors import UserError
from experiments import (
  budget,
  config,
  launch,
  launch_follow,
  launch_plan,
  processes,
  run,
  sweep,
  workdir,
)
from experiments.options import Spread, parse
from experiments.watch import Interrupted
from tests.compiling import QUICKLY
from tests.experiments.conftest import lines

ROOT = Path(__file__).resolve().parents[2]
VIT = """
def get_config(arg=''):
  shape = {'image': 28, 'patch': 14, 'channels': 1, 'd': 32, 'depth': 2, 'heads': 2, 'ffn': 128}
  return {
    'name': 'tiny', 'data': {'examples_per_class': 20, 'test_per_task': 16, 'test_batch': 16},
    'tasks': 2, 'batch': 8, 'ends_batch': 16, 'iterations': 6, 'chunk': 3,
    'model': {'name': 'vit', 'config': shape, 'remat': True},
    'optimizer': {'name': 'sgd', 'lr': 0.05, 'momentum': 0.9},
  }
"""


@pytest.fixture(scope='module')
def vit(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp('configs') / 'vit.py'
  path.write_text(VIT)
  return path


def started(
  config: Path, place: Path, processes: int, every: int = 999, more: Sequence[str] = ()
) -> subprocess.Popen:
  """The command over two devices, of so many processes; checkpoints after so many seconds."""
  environment = {**os.environ, **QUICKLY, 'JAX_NUM_CPU_DEVICES': str(2 // processes)}
  argv = [
    f'--config={config}',
    f'--workdir={place}',
    '--shard=fsdp',
    f'--save_every={every}',
    *more,
  ]
  argv += [f'--processes={processes}'] if processes > 1 else []
  pipe = subprocess.PIPE
  return subprocess.Popen(
    [sys.executable, '-m', 'experiments.run', *argv],
    cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True,
  )  # fmt: skip


def ended(process: subprocess.Popen, code: int = 0) -> str:
  out, err = process.communicate(timeout=600)
  assert process.returncode == code, out + err
  return err


def children(parent: int) -> dict[int, int]:
  """{number: pid} of the processes that a command, by its pid, has started."""
  words = ['ps', '-ww', '-o', 'pid=,args=', '--ppid', str(parent)]
  rows = subprocess.run(words, capture_output=True, text=True).stdout.splitlines()
  return {
    int(r.rpartition('--process=')[2].split()[0]): int(r.split()[0])
    for r in rows
    if '--process=' in r
  }


@pytest.mark.long
def test_killed_one_of_two_processes_and_went_on(vit, tmp_path):
  """The same bits as of one process with two devices; what two have saved, one with one device reads."""
  ended(started(vit, tmp_path / 'whole', 1))
  (wanted,) = lines(tmp_path / 'whole')
  process = started(vit, tmp_path / 'two', 2, every=0)
  saved = tmp_path / 'two/checkpoints/seeds-0'
  while not (saved.is_dir() and any(p.name.isdigit() and int(p.name) for p in saved.iterdir())):
    assert process.poll() is None, process.communicate()
    time.sleep(0.02)
  os.kill(children(process.pid)[1], signal.SIGKILL)
  err = ended(process, 128 + signal.SIGKILL)
  assert 'process 1 of 2 was ended by SIGKILL' in err and 'run the same command again' in err
  assert not (tmp_path / 'two/results.jsonl').exists()
  err = ended(started(vit, tmp_path / 'two', 2))
  assert 'going on from leg' in err and 'DAMAGED' not in err
  (line,) = lines(tmp_path / 'two')
  assert line['state_sha256'] == wanted['state_sha256'] and line['R'] == wanted['R']
  assert line['device'].startswith('2 x cpu') and wanted['device'] == line['device']
  resolved = config.tuples(json.loads((tmp_path / 'two/config.json').read_text()))
  end = run.end_of(resolved, tmp_path / 'two', None, print)
  assert end is not None and checkpoint.digest(end.state) == wanted['state_sha256']


def test_they_end_with_the_one_that_started_them(vit, tmp_path):
  """And leave the directory free; a second command touches nothing before."""
  process = started(vit, tmp_path, 2, more=('--config.iterations=200000',))
  log, own = tmp_path / 'process-1.txt', {}
  try:
    while len(own := children(process.pid)) < 2 or not (tmp_path / 'config.json').exists():
      assert process.poll() is None, process.communicate()
      time.sleep(0.05)
    with log.open('a') as file:
      file.write('words')
    with pytest.raises(UserError, match='another process is at work'):
      processes.watched([], 2, tmp_path)
    assert 'words' in log.read_text()
    process.kill()
    process.wait(10)
    end = time.monotonic() + 20
    while any(alive(pid) for pid in own.values()) and time.monotonic() < end:
      time.sleep(0.05)
    assert not any(alive(pid) for pid in own.values())
    with workdir.claimed(tmp_path), workdir.claimed(tmp_path, processes.LOCK):
      pass
  finally:
    for pid in [process.pid, *own.values()]:
      if alive(pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()  # closes its pipes, which they have as well


def alive(pid: int) -> bool:
  words = ['ps', '-o', 'stat=', '-p', str(pid)]
  return subprocess.run(words, capture_output=True, text=True).stdout.strip()[:1] not in ('', 'Z')


def test_a_command_alone_in_the_directory_is_not_disturbed(tmp_path):
  (tmp_path / 'process-1.txt').write_text('words')
  with workdir.claimed(tmp_path), pytest.raises(UserError, match='another process is at work'):
    processes.watched([], 2, tmp_path)
  assert (tmp_path / 'process-1.txt').read_text() == 'words'


def test_a_signal_to_one_process_is_one_to_all(vit, tmp_path, monkeypatch):
  """Each listens before it prepares anything, since jax has taken SIGTERM to itself when it connected."""
  heard = []

  def prepares(options, place, shown, leg=None, stop=None):
    os.kill(os.getpid(), signal.SIGTERM)
    heard.append((stop or int)())
    return []

  monkeypatch.setattr(run, 'run', prepares)
  monkeypatch.setattr(run.devices, 'start', lambda spread: None)
  argv = [f'--config={vit}', f'--workdir={tmp_path}', '--shard=fsdp', '--processes=2']
  for i in (0, 1):
    monkeypatch.setattr(run.devices, 'first', lambda i=i: i == 0)
    monkeypatch.setattr(run.tables, 'table', lambda lines: '')
    monkeypatch.setattr(run.workdir, 'report', lambda place, shown: None)
    assert run.main([*argv, f'--process={i}', '--coordinator=127.0.0.1:1']) == 0
  assert heard == [signal.SIGTERM] * 2
  monkeypatch.setattr(run.devices.jax, 'process_count', lambda: 2)
  said = np.array([[0, 1], [signal.SIGTERM, 0]])
  monkeypatch.setattr(run.devices.multihost_utils, 'process_allgather', lambda own: said)
  assert run.devices.agreed(0, True) == (signal.SIGTERM, True)


def test_a_signal_promises_nothing_that_was_not_done(tmp_path):
  """In its set-up a process has nothing to save, and ends by the signal."""
  sleeper = [sys.executable, '-c', 'import time; time.sleep(60)']
  timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
  timer.start()
  with pytest.raises(
    Interrupted, match='stopped by SIGTERM, all 2 processes have ended$'
  ) as caught:
    processes.together([sleeper, sleeper], tmp_path)
  timer.join()
  assert caught.value.signum == signal.SIGTERM


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (('--processes=2',), 'need --shard=data or --shard=fsdp'),
    (('--shard=zero',), 'shard'),
    (('--shard=fsdp', '--processes=2', '--process=2', '--coordinator=h:1'), 'from 0 to 1; got 2'),
    (('--shard=fsdp', '--processes=2', '--process=1'), 'go together'),
    (('--shard=fsdp', '--coordinator=here'), 'must be HOST:PORT or auto'),
  ],
)
def test_mistakes(call, vit, tmp_path, argv, message):
  done = call(run.main, f'--config={vit}', f'--workdir={tmp_path / "x"}', *argv)
  assert done.code == 2 and message in done.line and not (tmp_path / 'x').exists()


def test_a_sweep_is_mapped_and_not_sharded(call, vit, tmp_path):
  argv = (f'--config={vit}', f'--workdir={tmp_path / "x"}', '--shard=data')
  grid = '--config.sweep={"optimizer.lr": (0.1, 0.2)}'
  assert '--shard is for experiments.run' in call(sweep.main, *argv, grid).line
  assert 'launch one configuration' in call(launch.main, *argv, grid).line


def test_a_launch_hands_it_on(vit, tmp_path):
  words = [f'--config={vit}', f'--workdir={tmp_path}', '--shard=fsdp', '--processes=2']
  options = parse(words, launch.PROGRAM, '')
  job = SimpleNamespace(folder=tmp_path)
  wish = SimpleNamespace(executor='local')
  argv = launch_follow.Launch(tmp_path, '', [], wish, options, print).argv(job)  # pyright: ignore
  assert parse(argv[1:] + words[:1], run.PROGRAM, '').spread == Spread('fsdp', 2, None, '')
  (cell,) = launch_plan.cells(options.raw, {})
  ((part, _),) = launch_plan.parts(options, [cell], 0, 1, 4, False, print)
  assert part.devices == 2  # of each process, of 4 cores


def test_what_ends_a_group(tmp_path, capsys):
  (tmp_path / 'process-1.txt').write_text('noise\nexperiments.run: no room\n')
  assert processes.verdict([0, 2], tmp_path) == 2
  assert capsys.readouterr().err == 'experiments.run: no room\n'
  with pytest.raises(Interrupted, match='process 1 of 2 was ended by SIGKILL'):
    processes.verdict([3, -9], tmp_path)
  for codes in ([-11, -9], [2, -7], [3, -15], [-6, -11]):  # the cause, not what came of it
    name = signal.Signals(-(-9 if -9 in codes else codes[1])).name
    with pytest.raises(Interrupted, match=f'process 1 of 2 was ended by {name}') as caught:
      processes.verdict(codes, tmp_path)
    assert caught.value.signum == signal.Signals[name]
  assert processes.verdict([-6, 2], tmp_path) == 2  # jax ends those who lost another by SIGABRT
  with pytest.raises(Interrupted, match='process 0 of 2 was ended by SIGABRT'):
    processes.verdict([-6, 0], tmp_path)
  assert processes.verdict([0, 0], tmp_path) == 0


def test_the_plan_of_a_shape(call):
  done = call(budget.main, '--shape=llama-8b', '--devices=8x80GB')
  assert done.code == 0 and 'llama-8b: 8,030,261,248 parameters, fsdp over 8 devices' in done.out
  assert 'fits; the fewest that it fits on: 2' in done.out
  done = call(budget.main, '--shape=llama-70b', '--devices=8x80GB', '--length=4096')
  assert done.code == 1 and 'DOES NOT FIT' in done.out
  for argv, message in (
    (('--shape=llama-9b',), "no shape 'llama-9b': there are smollm2-135m, llama-1b"),
    (('--shape=llama-8b', '--devices=8'), 'as in 8x80GB'),
    (('--shape=llama-8b', '--config=x'), 'leave --config out'),
    (('--shape=llama-8b', '--plot=x.png'), '--plot is of a run'),
    (('--shape=llama-8b', '--profile=cortex-m4'), '--profile is of a run'),
    (('--shape=llama-8b', '--data_dir=x'), '--data_dir is of a run'),
    *(
      (('--config=x', word), f'{word.partition("=")[0]} is for --shape')
      for word in (
        '--rows=1',
        '--length=9',
        '--optimiser=adamw',
        '--dtype=x',
        '--shard=fsdp',
        '--no-remat',
        '--compile',
        '--devices=8x80GB',
      )
    ),
    (('--shape=llama-8b', '--optimiser=adamx'), "no optimiser 'adamx'"),
  ):
    done = call(budget.main, *argv)
    assert done.code == 2 and message in done.line
