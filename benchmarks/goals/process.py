"""G8: from the start of a process to its result, compiled programs in the cache."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

from benchmarks import workloads
from benchmarks.goals import Setup
from benchmarks.goals.stream import absent, sizes
from benchmarks.measure import Row, Worker, core, row


def whole(start: Callable[[], Worker]) -> dict:
  """Starts a contestant, asks for one run and waits for it."""
  begin = time.perf_counter()
  worker = start()
  try:
    worker.go()
    worker.ready()
    found = worker.answer()
    return {**found, 'wall': time.perf_counter() - begin}
  finally:
    worker.close()


def g8(setup: Setup) -> list[Row]:
  """The whole process with a warm compilation cache, against tuned PyTorch and Avalanche (wall time)."""
  (units, *_), size = sizes(setup)
  work = f'G8 W1, {units} units, whole process'
  goals = {'PyTorch, by hand': 1 / 0.6, 'Avalanche, preloaded': 1 / 0.2}
  if not setup.peers:
    return [absent(work, n, t, setup, 'wall') for n, t in goals.items()]
  data = workloads.export(*workloads.w1(size))
  common = {'data': str(data), 'units': units, 'cores': core()}
  with tempfile.TemporaryDirectory() as cache:
    env = {
      'JAX_COMPILATION_CACHE_DIR': cache,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }
    starts = {
      'ours': lambda: Worker('ours', env=env, units=units, size=size, count=False, cores=core()),
      'PyTorch, by hand': lambda: Worker('torch_w1', setup.peers, setup.env, **common),
      'Avalanche, preloaded': lambda: Worker('avalanche_stream', setup.peers, setup.env, **common),
    }
    whole(starts['ours'])  # fills the cache
    turns: dict[str, list[dict]] = {name: [] for name in starts}
    for _ in range(setup.runs):
      for name, start in starts.items():
        turns[name].append(whole(start))
  workloads.remove(data)
  rows = []
  for name, target in goals.items():
    note = 'imports, tracing and reading the data'
    rows.append(row(turns, 'ours', name, work, name, target, 'wall', 'wall', note=note))
    rows.append(row(turns, 'ours', name, work, name, None, 'process_cpu', 'CPU'))
  return rows
