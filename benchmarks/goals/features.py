"""G17: what features that are computed once save, in a run that changes nothing below its head."""

from __future__ import annotations

import numpy as np

from benchmarks.goals import Setup
from benchmarks.measure import Row, Worker, core, interleave, row

TOLERANCE = 1e-3  # of the weights of the head, relative to the largest


def g17(setup: Setup) -> list[Row]:
  """The same run with and without cache_features: MiniLM, 10 domains, three passes, a linear layer."""
  size = {'examples': 1, 'test': 2} if setup.quick else {'examples': 2, 'test': 10}
  turns = interleave(
    {k: Worker('features', kind=k, cores=core(), **size) for k in ('cold', 'warm', 'plain')},
    setup.runs,
    warm=0,
  )
  last = {k: t[-1] for k, t in turns.items()}
  note = ''
  for k in ('cold', 'warm'):
    R = [np.array(last[n]['R']) for n in (k, 'plain')]
    heads = [np.array(last[n]['head']) for n in (k, 'plain')]
    off = float(np.abs(heads[0] - heads[1]).max() / np.abs(heads[1]).max())
    if (R[0] != R[1]).any() or off > TOLERANCE:
      gap = float(np.abs(R[0] - R[1]).max())
      note = f'RESULTS DIFFER: accuracies by {gap:.4f}, weights by {off:.1e}'
  sentences = f'{150 * size["examples"]} sentences'
  work = f'G17 linear layer on MiniLM, {sentences}, '
  return [
    row(turns, 'cold', 'plain', work + 'features computed once', 'without', None, note=note),
    row(turns, 'warm', 'plain', work + 'features of an earlier run', 'without', None, note=note),
  ]
