"""G5 to G7 and G11: more runs, more memory, more tasks; time, compilation and resident memory."""

from __future__ import annotations

import tempfile

from benchmarks import workloads
from benchmarks.goals import Setup
from benchmarks.goals.stream import absent
from benchmarks.measure import Row, Team, Worker, core, cores, interleave, row


def g5(setup: Setup) -> list[Row]:
  """Many runs on two cores: against one core, and against PyTorch in two processes (wall time)."""
  work, two = 'G5 W1, 8 runs, 256 units', cores()[-2:]
  names = ('cl_jax on one core', 'PyTorch, 2 processes')
  if len(two) < 2:
    why = 'this machine lends one core'
    return [Row(work, n, 'wall', t, note=why) for n, t in zip(names, (1.9, 1.3), strict=True)]
  units, size, n = (32, workloads.QUICK1, 4) if setup.quick else (256, workloads.W1, 8)
  common = {'n': n, 'units': units, 'size': size}
  contestants = {
    'ours': Worker(
      'many',
      env={'XLA_FLAGS': '--xla_force_host_platform_device_count=2'},
      devices=2,
      cores=two,
      **common,
    ),
    names[0]: Worker('many', cores=core(), **common),
  }
  data = None
  if setup.peers:
    data = workloads.export(*workloads.w1(size))
    contestants[names[1]] = Team(
      *(
        Worker(
          'torch_w1', setup.peers, setup.env, data=str(data), units=units, times=n // 2, cores=[c]
        )
        for c in two
      )
    )
  turns = interleave(contestants, setup.runs)
  if data:
    workloads.remove(data)
  note = 'wall time of two cores that other processes use as well'
  rows = [row(turns, 'ours', names[0], work, names[0], 1.9, 'wall', 'wall', note=note)]
  if not setup.peers:
    return [*rows, absent(work, names[1], 1.3, setup, 'wall')]
  return [*rows, row(turns, 'ours', names[1], work, names[1], 1.3, 'wall', 'wall', note=note)]


def g6(setup: Setup) -> list[Row]:
  """A step with a memory of 100 images, against one with 50,000."""
  units, size, large = (32, workloads.QUICK1, 1000) if setup.quick else (256, workloads.W1, 50_000)
  common = {'units': units, 'size': size, 'part': 'steps', 'cores': core()}
  turns = interleave(
    {
      'large': Worker('ours', capacity=large, **common),
      'small': Worker('ours', capacity=100, **common),
    },
    setup.runs,
  )
  work = f'G6 steps of W1, {units} units, memory {large}'
  return [row(turns, 'large', 'small', work, 'memory 100', 1 / 1.03)]


def g7(setup: Setup) -> list[Row]:
  """Compiling a run of 40 tasks, against 5; and out of the persistent cache, against from nothing."""
  many = 6 if setup.quick else 40
  turns = interleave(
    {n: Worker('compiling', tasks=t, cores=core()) for n, t in (('40', many), ('5', 5))}, setup.runs
  )
  work = 'G7 compiling W1 with replay'
  rows = [row(turns, '40', '5', f'{work}, {many} tasks', '5 tasks', 1 / 1.1, metric='compile')]
  with tempfile.TemporaryDirectory() as cache:
    turns = interleave(
      {
        'warm': Worker('compiling', tasks=10, cache=cache, cores=core()),
        'cold': Worker('compiling', tasks=10, cores=core()),
      },
      setup.runs,
    )
  rows.append(row(turns, 'warm', 'cold', f'{work}, from the cache', 'cold', 20.0, metric='compile'))
  return rows


def g11(setup: Setup) -> list[Row]:
  """Resident memory: against Avalanche; and 128 runs against one."""
  units, size, n = (32, workloads.QUICK1, 4) if setup.quick else (256, workloads.W1, 128)
  rows, work = [], f'G11 W1, {units} units'
  if setup.peers:
    data = workloads.export(*workloads.w1(size))
    turns = interleave(
      {
        'ours': Worker('ours', units=units, size=size, count=False, cores=core()),
        'Avalanche': Worker(
          'avalanche_stream', setup.peers, data=str(data), units=units, cores=core()
        ),
      },
      2,
    )
    workloads.remove(data)
    note = 'most of ours is what the compiler leaves behind'
    rows.append(
      row(
        turns,
        'ours',
        'Avalanche',
        work,
        'Avalanche, preloaded',
        1 / 0.6,
        'rss',
        'memory',
        'MB',
        1e6,
        note,
      )
    )
  else:
    rows.append(absent(work, 'Avalanche, preloaded', 1 / 0.6, setup, 'memory'))
  small = {'units': 32, 'size': size, 'cores': core()}
  turns = interleave(
    {'many': Worker('many', n=n, **small), 'one': Worker('many', n=1, **small)}, 2, warm=0
  )
  work = f'G11 W1, 32 units, {n} runs'
  rows.append(row(turns, 'many', 'one', work, 'one run', 1 / 1.05, 'rss', 'memory', 'MB', 1e6))
  return rows
