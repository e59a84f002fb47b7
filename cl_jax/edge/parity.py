"""Two states of a learner, leaf by leaf: integers bitwise, floats by their largest difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Parity(NamedTuple):
  """How far a state is from JAX's.

  Attributes:
    differing: names of the integer leaves (memory, labels, counters, keys) that are not equal, bit for bit.
    error: the largest |a - b| / max(1, |b|) of all floats; inf where one is NaN and the other is not.
    worst: the name of the leaf that has it.
  """

  differing: tuple[str, ...]
  error: float
  worst: str


def compare(
  state: Sequence[Mapping[str, Any]], got: Sequence[np.ndarray], want: Sequence[Any]
) -> Parity:
  """Compares the leaves of `got` with those of `want`; `state` is the manifest's table."""
  differing, error, worst = [], 0.0, ''
  for leaf, a, b in zip(state, got, want, strict=True):
    b = np.asarray(b)
    if a.dtype.kind != 'f':
      if a.tobytes() != b.tobytes():
        differing.append(leaf['name'])
    elif a.size and (here := difference(a, b)) > error:
      error, worst = here, leaf['name']
  return Parity(tuple(differing), error, worst)


def difference(a: np.ndarray, b: np.ndarray) -> float:
  """The largest |a - b| / max(1, |b|); equal infinities and NaN in both count as equal."""
  a, b = a.astype(np.float64), b.astype(np.float64)
  same = (a == b) | (np.isnan(a) & np.isnan(b))
  with np.errstate(invalid='ignore'):
    apart = np.abs(a - b) / np.maximum(1.0, np.abs(b))
  apart = np.where(same, 0.0, np.where(np.isfinite(apart), apart, np.inf))
  return float(apart.max())
