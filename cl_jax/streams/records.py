"""Examples that stay in their files until they are asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

PIECE = 1000  # examples read at a time where many are asked for


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
  """In the place of an array [N, ...]: has its shape, and numbers of records where it has numbers.

  Indexing picks records and reads nothing, as `split` and what else makes a stream do; `np.asarray` reads.
  A stream whose `x` is made of these learns by `run_chunks(..., feed=grain_feed(stream))`.

  Attributes:
    read: (numbers of records i64[n]) -> array [n, *example] of `dtype`, the same whenever it is asked. For
      processes that read ahead it is pickled, so it opens its files at the first call.
    rows: i64[...], the numbers of the records.
    example: the shape of one.
    dtype: of one.
  """

  read: Callable[[np.ndarray], np.ndarray]
  rows: np.ndarray
  example: tuple[int, ...]
  dtype: np.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.rows.shape, *self.example)

  @property
  def ndim(self) -> int:
    return len(self.shape)

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: Any) -> Records:
    return dataclasses.replace(self, rows=np.asarray(self.rows[index]))

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    """All of them, in memory."""
    del copy  # it always is one
    flat = self.rows.reshape(-1)
    out = np.empty((len(flat), *self.example), self.dtype)
    for lo in range(0, len(flat), PIECE):
      some, place = np.unique(flat[lo : lo + PIECE], return_inverse=True)
      out[lo : lo + PIECE] = self.read(some)[place]
    out = out.reshape(self.shape)
    return out if dtype is None else out.astype(dtype, copy=False)


def in_files(x: Any) -> bool:
  """Whether a tree of inputs has leaves that stay in files."""
  return any(isinstance(leaf, Records) for leaf in jax.tree.leaves(x))


def same(a: Any, b: Any) -> bool:
  """Whether two leaves hold the same; what is in files is not read for it."""
  if a is b:
    return True
  if isinstance(a, Records) or isinstance(b, Records):
    both = isinstance(a, Records) and isinstance(b, Records)
    return both and a.read == b.read and np.array_equal(a.rows, b.rows)
  return np.array_equal(a, b)
