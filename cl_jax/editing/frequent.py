"""Frequent Directions (Liberty, KDD 2013): K^T K of many rows in the memory of a few."""

from __future__ import annotations

import numpy as np


def merge(rows: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, float]:
  """The sketch of what `rows` stands for and the rows `new` together, and what it has lost.

  All rows are rotated onto their principal directions, and the square of the (r + 1)-th singular value is
  taken off every squared singular value (alg. 1, with r rows kept of r + B; the paper's has B = 1).

  Args:
    rows: f32[r, d], a sketch; zeros to begin with.
    new: f32[B, d], B at least 1.

  Returns:
    The sketch f32[r, d], and delta f64, with which
      0 <= [rows; new]^T [rows; new] - merged^T merged <= delta I.
    Summed over all merges this bounds the error of the whole sketch, and is at most
    |K - K_j|_F^2 / (r + 1 - j) for the best rank-j K_j of all rows K, any j <= r (Ghashami et al. 2016).

  Worked in float64: singular values are square roots of eigenvalues here, which halves the digits.
  """
  r = len(rows)
  stacked = np.concatenate([rows, new]).astype(np.float64)
  values, vectors = np.linalg.eigh(stacked @ stacked.T)
  delta = max(float(values[-r - 1]), 0.0)
  top = values[-r:]
  # Where a direction vanishes its row is 0 whatever the scale; 1 keeps the division harmless.
  scale = np.sqrt(np.maximum(top - delta, 0.0) / np.where(top > 0, top, 1.0))
  return (scale[:, None] * (vectors[:, -r:].T @ stacked)).astype(np.float32), delta
