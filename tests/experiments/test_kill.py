"""SIGKILL at random moments, then the same command: the bytes of the uninterrupted run.

CL_JAX_KILLS sets how many processes are killed (3); `pytest -m many_kills` kills 30.
"""

from __future__ import annotations

import ast
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.compiling import QUICKLY
from tests.experiments.conftest import lines

ROOT = Path(__file__).resolve().parents[2]


def command(tiny: Path, place: Path) -> list[str]:
  return [
    *(sys.executable, '-m', 'experiments.run', f'--config={tiny}:class,er,ewc'),
    *(f'--workdir={place}', '--save_every=0'),
  ]


def final(place: Path) -> list[tuple]:
  return [
    (line['seed'], line['state_sha256'], str(line['R']), line['acc'], line['config_sha256'])
    for line in lines(place)
  ]


def start(tiny: Path, place: Path) -> subprocess.Popen:
  # Two devices, so that the two seeds lie apart.
  environment = {**os.environ, **QUICKLY, 'JAX_NUM_CPU_DEVICES': '2'}
  return subprocess.Popen(
    command(tiny, place),
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.fixture(scope='module')
def uninterrupted(tiny, tmp_path_factory) -> tuple[list[tuple], float]:
  """The results, and the seconds that a process takes once its programs are compiled."""
  seconds = 0.0
  for name in ('cold', 'warm'):
    place = tmp_path_factory.mktemp('kill') / name
    begin = time.monotonic()
    process = start(tiny, place)
    _, err = process.communicate()
    assert process.returncode == 0, err
    seconds = time.monotonic() - begin
  return final(place), seconds


def kill_and_resume(tiny: Path, tmp_path: Path, wanted, seconds: float, kills: int) -> int:
  """Kills so many processes, starting a new run whenever one came to its end; counts the resumptions."""
  rng = random.Random(0)
  run, killed, resumed = 0, 0, 0
  while True:
    place = tmp_path / f'run{run}'
    process = start(tiny, place)
    try:
      # Most of a process is its start; half of the moments lie in the part that trains and saves.
      low = rng.choice((0.0, 0.4)) * seconds if killed < kills else 1000
      _, err = process.communicate(timeout=rng.uniform(low, seconds) if killed < kills else None)
    except subprocess.TimeoutExpired:
      process.kill()
      _, err = process.communicate()
      killed += 1
      resumed += 'going on from' in err
      continue
    resumed += 'going on from' in err
    assert process.returncode == 0, err
    assert 'DAMAGED' not in err, err
    assert final(place) == wanted
    if killed >= kills:
      return resumed
    run += 1


@pytest.mark.long
def test_killed_at_random_moments(tiny, tmp_path, uninterrupted):
  wanted, seconds = uninterrupted
  kill_and_resume(tiny, tmp_path, wanted, seconds, int(os.environ.get('CL_JAX_KILLS', '3')))


@pytest.mark.long
def test_three_seeds_go_on_with_another_number_of_devices(tiny, tmp_path):
  """Two devices have a place too many for three runs; what is saved has the runs alone."""
  for number in ('2', '1', '2'):
    environment = {**os.environ, **QUICKLY, 'JAX_NUM_CPU_DEVICES': number}
    argv = [*command(tiny, tmp_path), '--config.seeds=0,1,2']
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = (tmp_path / 'results.jsonl').read_text()
    (tmp_path / 'results.jsonl').unlink()
  assert 'going on from' in done.stderr and len(results.splitlines()) == 3


@pytest.mark.many_kills
def test_killed_at_thirty_random_moments(tiny, tmp_path, uninterrupted):
  wanted, seconds = uninterrupted
  resumed = kill_and_resume(tiny, tmp_path, wanted, seconds, 30)
  assert resumed >= 5


@pytest.mark.long
def test_seeds_on_two_devices_equal_seeds_on_one(tiny, tmp_path, uninterrupted):
  wanted, _ = uninterrupted
  environment = {**os.environ, **QUICKLY, 'JAX_NUM_CPU_DEVICES': '1'}
  place = tmp_path / 'one'
  subprocess.run(command(tiny, place), cwd=ROOT, env=environment, check=True, capture_output=True)
  for one, two in zip(final(place), wanted, strict=True):
    assert one[0] == two[0] and one[-1] == two[-1]
    np.testing.assert_allclose(ast.literal_eval(one[2]), ast.literal_eval(two[2]), atol=0.051)
