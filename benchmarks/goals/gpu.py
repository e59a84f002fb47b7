"""G15: an accelerator, where there is one."""

from __future__ import annotations

from benchmarks import workloads
from benchmarks.goals import Setup
from benchmarks.measure import Row, Worker, compare, interleave


def g15(setup: Setup) -> list[Row]:
  """128 runs at once on a GPU, against one run's rate."""
  n, size = (4, workloads.QUICK1) if setup.quick else (128, workloads.W1)
  work, against = f'G15 W1, 256 units, {n} runs at once', 'one run'
  one = Worker('many', n=1, size=size)
  if (found := one.ready()['platform']) == 'cpu':
    one.close()
    return [Row(work, against, 'wall per run', 25.0, note='no GPU: jax sees the CPU alone')]
  turns = interleave({'many': Worker('many', n=n, width=n, size=size), 'one': one}, setup.runs)
  ratios, ours, theirs = compare(
    [t['wall'] / n for t in turns['many']], [t['wall'] for t in turns['one']]
  )
  return [Row(work, against, 'wall per run', 25.0, ratios, ours, theirs, note=f'on {found}')]
