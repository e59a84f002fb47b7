"""The reservoir memory of the replay references: positions in the stream, never rows.

Vitter's algorithm R as in `er.py`: with n rows seen before this one, n < M writes slot n and draws
nothing (j = -1); otherwise j is uniform on the integers 0..n INCLUSIVE and the row replaces slot j
if j < M, else it is dropped. A draw takes min(D, filled) distinct filled slots; the rest is -1.
"""

from __future__ import annotations

import numpy as np


class Reservoir:
  def __init__(self, capacity: int, rng: np.random.Generator) -> None:
    self.slots = np.full(capacity, -1, dtype=np.int64)  # slot -> position in the stream
    self.seen = 0
    self.rng = rng

  def write(self) -> int:
    """Writes the next row of the stream; the draw j, or -1 while the memory fills."""
    j = -1
    if self.seen < len(self.slots):
      self.slots[self.seen] = self.seen
    else:
      j = int(self.rng.integers(0, self.seen, endpoint=True))
      if j < len(self.slots):
        self.slots[j] = self.seen
    self.seen += 1
    return j

  def draw(self, count: int) -> np.ndarray:
    """Slot numbers [count], -1 from the first place that no row was left for."""
    filled = np.flatnonzero(self.slots >= 0)
    out = np.full(count, -1, dtype=np.int64)
    n = min(count, len(filled))
    if n:
      out[:n] = self.rng.choice(filled, size=n, replace=False)
    return out

  def at(self, slots: np.ndarray) -> np.ndarray:
    """Positions in the stream that these slots hold, -1 where there is no slot."""
    return np.where(slots >= 0, self.slots[np.maximum(slots, 0)], -1)


def rows_at(positions: np.ndarray, x: np.ndarray, y: np.ndarray) -> dict:
  """The rows at these positions: x (0 where none), y (-1 where none), weight (1 or 0)."""
  there = positions >= 0
  return {
    'x': np.where(there[..., None], x[positions], 0.0),
    'y': np.where(there, y[positions], -1),
    'weight': there.astype(np.float64),
  }


def both_outcomes(js: np.ndarray, capacity: int, least: int = 5) -> None:
  """Rows that replaced another and rows that were dropped must both occur."""
  assert ((js >= 0) & (js < capacity)).sum() >= least, js
  assert (js >= capacity).sum() >= least, js
