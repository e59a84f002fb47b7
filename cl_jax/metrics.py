"""Continual-learning metrics of an accuracy matrix, on the host, in float64.

R[t, i] is the accuracy on task i after leg t, f[T, T]; tasks are counted from 0. Where R is not square
(joint training has one row) only the measures of its last row are defined; the others are None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def summary(R, start=None, curve=None) -> dict[str, float | None]:
  """All measures by the names of results.jsonl.

  Args:
    R: f[L, T].
    start: f[T], accuracy before any training (the random-initialisation row), for `fwt`.
    curve: f[L, K, T], accuracy every k steps inside the legs, for `min_acc`.
  """
  R = np.asarray(R, np.float64)
  square = R.shape[0] == R.shape[1]
  return {
    'acc': accuracy(R),
    'forgetting': forgetting(R) if square else None,
    'bwt': backward_transfer(R) if square else None,
    'fwt': forward_transfer(R, start) if square and start is not None else None,
    'learning_acc': learning_accuracy(R) if square else None,
    'aaa': average_incremental_accuracy(R) if square else None,
    'min_acc': minimum_accuracy(R, curve) if square else None,
  }


def accuracy(R) -> float:
  """ACC: the mean of the last row (Lopez-Paz & Ranzato 2017, eq. 2)."""
  return float(np.mean(np.asarray(R)[-1]))


def forgetting(R) -> float | None:
  """Mean over the earlier tasks of (best accuracy before the last leg) - (accuracy at the end).

  Chaudhry et al. 2018, eq. 3: the maximum EXCLUDES the final row. None with one task.
  """
  R = np.asarray(R, np.float64)
  return float(np.mean(R[:-1, :-1].max(axis=0) - R[-1, :-1])) if len(R) > 1 else None


def backward_transfer(R) -> float | None:
  """BWT: mean over the earlier tasks of R[T-1, i] - R[i, i] (Lopez-Paz & Ranzato 2017, eq. 3)."""
  R = np.asarray(R, np.float64)
  return float(np.mean((R[-1] - np.diag(R))[:-1])) if len(R) > 1 else None


def forward_transfer(R, start) -> float | None:
  """FWT: mean over the later tasks of R[i-1, i] - start[i] (Lopez-Paz & Ranzato 2017, eq. 4)."""
  R, start = np.asarray(R, np.float64), np.asarray(start, np.float64)
  return float(np.mean(np.diag(R, k=1) - start[1:])) if len(R) > 1 else None


def learning_accuracy(R) -> float:
  """Mean of R[i, i]: how well each task was learnt when it was new (Riemer et al. 2019)."""
  return float(np.mean(np.diag(np.asarray(R))))


def average_incremental_accuracy(R) -> float:
  """Mean over the legs of the mean accuracy on the tasks seen so far (Rebuffi et al. 2017)."""
  R = np.asarray(R, np.float64)
  return float(np.mean([R[t, : t + 1].mean() for t in range(len(R))]))


def minimum_accuracy(R, curve=None) -> float | None:
  """min-ACC: mean over the earlier tasks of the lowest accuracy after the task was learnt.

  De Lange et al. 2023 (stability gap), eq. 2. With `curve` the minimum is over all evaluations inside
  later legs, which shows the drop right after a switch; without it over the ends of the legs.
  """
  R = np.asarray(R, np.float64)
  T = len(R)
  if T < 2:
    return None
  lows = []
  for i in range(T - 1):
    values = [R[i + 1 :, i]]
    if curve is not None:
      values.append(np.asarray(curve, np.float64)[i + 1 :, :, i].ravel())
    values = np.concatenate(values)
    lows.append(values[~np.isnan(values)].min())
  return float(np.mean(lows))


# Two-sided 97.5 % quantiles of Student's t for 1..30 degrees of freedom (then the normal's 1.960).
T975 = (
  12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
  2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float | None]:
  """(mean, half-width of its 95 % confidence interval by Student's t over seeds); None for one seed."""
  v = np.asarray(values, np.float64)
  if len(v) < 2:
    return float(v.mean()), None
  t = T975[len(v) - 2] if len(v) - 2 < len(T975) else 1.960
  return float(v.mean()), float(t * v.std(ddof=1) / math.sqrt(len(v)))
