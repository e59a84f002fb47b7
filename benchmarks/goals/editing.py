"""G16: knowledge editing. Targets of many edits in one program, one by one, and in the published way."""

from __future__ import annotations

from benchmarks.goals import Setup
from benchmarks.measure import Row, Worker, core, interleave, row


def g16(setup: Setup) -> list[Row]:
  """Time per edit of the optimisation of targets, 10 steps, in a random network of SmolLM2-135M's shape."""
  edits = 2 if setup.quick else 8
  small = {'depth': 12} if setup.quick else {}
  kinds = ('grouped', 'single', 'published')
  turns = interleave(
    {k: Worker('editing', kind=k, edits=edits, cores=core(), **small) for k in kinds},
    max(setup.runs // 2, 1),
  )
  work = f'G16 targets of {edits} edits'
  return [
    row(turns, 'grouped', 'single', work, 'the same one by one', None, scale=edits, unit='s an edit'),
    row(turns, 'grouped', 'published', work, 'whole passes one by one', None, scale=edits, unit='s an edit'),
  ]  # fmt: skip
