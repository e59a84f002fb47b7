"""G18: data that stay in files, read by grain while the steps run."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.goals import Setup
from benchmarks.measure import Row, Turns, Worker, compare, core, interleave, row

SHARED = 'wall, shared core'  # with the workers, and with whatever else the machine does


def g18(setup: Setup) -> list[Row]:
  """CIFAR-10 as PNG in array_record: examples a second, and steps of the reduced ResNet-18, batches of 10.

  On one core, that workers and steps share: what reading costs shows whole, and more workers bring nothing.
  """
  size: dict[str, Any] = (
    {'batch': 4, 'reads': 1, 'chunks': 1, 'examples': 100}
    if setup.quick
    else {'batch': 10, 'reads': 20, 'chunks': 2, 'examples': 10_000}
  )
  counts = (0,) if setup.quick else (0, 1, 2)
  contestants = {f'workers={n}': Worker('feed', workers=n, cores=core(), **size) for n in counts}
  contestants['memory'] = Worker('feed', workers=None, cores=core(), **size)
  turns = interleave(contestants, min(setup.runs, 5))
  losses = {statistics.fmean(t['accuracy'] for t in found) for found in turns.values()}
  note = (
    'one core that other processes use as well'
    if len(losses) == 1
    else f'LOSSES DIFFER: {sorted(losses)}'
  )
  rows = []
  for name in list(turns)[: len(counts)]:
    for key, metric in (('per_cpu', 'CPU'), ('per_wall', SHARED)):
      rows.append(speed(turns, name, key, metric, note))
  for name in list(turns)[: len(counts)]:
    work = f'G18 ResNet-18 steps on CIFAR-10, grain with {name}'
    for key, metric in (('cpu', 'CPU'), ('wall', SHARED)):
      common = {'scale': 1e-3, 'unit': 'ms', 'note': note}
      rows.append(
        row(turns, name, 'memory', work, 'data in memory', 1 / 1.1, key, metric, **common)
      )
  return rows


def speed(turns: Turns, name: str, key: str, metric: str, note: str) -> Row:
  """Examples a second (of CPU or of wall time), where more is better, against rows of decoded arrays."""
  ratios, theirs, ours = compare(*([t[key] for t in turns[n]] for n in ('memory', name)))
  work = f'G18 reading CIFAR-10 alone, grain with {name}'
  return Row(work, 'decoded arrays', metric, None, ratios, ours, theirs, 'examples/s', note)
