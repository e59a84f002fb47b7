"""Seeded orders and the tables made of them.

Every random choice has a seed and a purpose, and draws from the raw 64-bit output of PCG64, which
NumPy guarantees not to change (its `permutation` and `normal` may): a stream is the same bytes on
every machine and version.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def _raw(seed: int, purpose: str, count: int) -> np.ndarray:
  bits = np.random.PCG64(np.random.SeedSequence([seed, *purpose.encode()]))
  return bits.random_raw(count)


def shuffled(seed: int, purpose: str, count: int) -> np.ndarray:
  """A permutation i64[count]. Two purposes, or two seeds, give independent ones."""
  return np.argsort(_raw(seed, purpose, count), kind='stable')


def normal(seed: int, purpose: str, count: int) -> np.ndarray:
  """Standard normal draws f64[count] (Box and Muller)."""
  unit = ((_raw(seed, purpose, 2 * count) >> np.uint64(11)) + 0.5) * 2.0**-53
  return np.sqrt(-2.0 * np.log(unit[:count])) * np.cos(2.0 * np.pi * unit[count:])


def batched(rows: np.ndarray, batch: int, drop_last: bool = False) -> np.ndarray:
  """Cuts row numbers into i32[S, batch]; -1 pads the last batch, or it is dropped."""
  rows = np.asarray(rows, np.int32)
  if drop_last:
    return rows[: len(rows) // batch * batch].reshape(-1, batch)
  return np.pad(rows, (0, -len(rows) % batch), constant_values=-1).reshape(-1, batch)


def epochs_of(
  rows: np.ndarray,
  batch: int,
  epochs: int,
  iterations: int | None,
  drop_last: bool,
  seed: int,
  purpose: str,
) -> np.ndarray:
  """Batches i32[S, batch] of freshly shuffled epochs, as a loader with `shuffle=True` gives them.

  With `iterations`, S is exactly that: epochs follow each other until they are enough; otherwise
  there are `epochs` of them. No batch spans two epochs.
  """
  per_epoch = len(rows) // batch if drop_last else -(-len(rows) // batch)
  count = epochs if iterations is None else -(-iterations // per_epoch)
  parts = [
    batched(rows[shuffled(seed, f'{purpose}/epoch {e}', len(rows))], batch, drop_last)
    for e in range(count)
  ]
  return np.concatenate(parts)[:iterations]


def stacked(tables: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
  """Stacks i32[S_t, B] to (i32[T, max S, B], steps i32[T]); short ones end in -1 rows.

  `steps` is None when all are equally long.
  """
  lengths = np.array([len(table) for table in tables], np.int32)
  longest = int(lengths.max())
  out = np.stack(
    [np.pad(table, ((0, longest - len(table)), (0, 0)), constant_values=-1) for table in tables]
  )
  return out.astype(np.int32, copy=False), None if (lengths == longest).all() else lengths
