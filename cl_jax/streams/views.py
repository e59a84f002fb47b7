"""What a task does to its inputs: permuted and rotated pixels.

A view is `(x, parameters of one task) -> x` for a batch. It is written with indexing and integer
arithmetic alone, so that it gives the same bytes on NumPy arrays (the test sets, viewed once) and
inside a compiled step (the training batches).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cl_jax.streams.order import shuffled

_ONE = 4096  # weights of a rotation are integers in units of 1/4096


def permute(x, perm):
  """Reorders pixels. x [B, H, W, C] or [B, D]; perm i32[H*W] or i32[D]; channels stay together."""
  flat = x.reshape(x.shape[0], perm.shape[0], -1)
  return flat[:, perm].reshape(x.shape)


def rotate(x, table):
  """Turns images u8[B, H, W, C]; table is one task's slice of `rotation_table`."""
  flat = x.reshape(x.shape[0], table['source'].shape[-1], -1)
  total: Any = _ONE // 2  # rounds to nearest
  for corner in range(4):
    weight = table['weight'][corner][None, :, None]
    total = total + weight * flat[:, table['source'][corner]].astype('int32')
  return (total >> 12).astype(x.dtype).reshape(x.shape)


def permutations(pixels: int, tasks: int, seed: int, first_plain: bool) -> np.ndarray:
  """i32[tasks, pixels], independent permutations; the first is the identity if `first_plain`."""
  table = np.stack([shuffled(seed, f'permutation {t}', pixels) for t in range(tasks)])
  if first_plain:
    table[0] = np.arange(pixels)
  return table.astype(np.int32)


def rotation_table(height: int, width: int, degrees) -> dict[str, Any]:
  """Bilinear rotations about the image centre, counter-clockwise; zeros come in from outside.

  Returns:
    {'source': i32[T, 4, H*W], 'weight': i32[T, 4, H*W]}: the four pixels that each output pixel is
    mixed from, and their weights in units of 1/4096 (0 where the source lies outside).
  """
  row, column = np.meshgrid(np.arange(height), np.arange(width), indexing='ij')
  row, column = row.ravel() - (height - 1) / 2, column.ravel() - (width - 1) / 2
  sources, weights = [], []
  for angle in np.deg2rad(np.asarray(degrees, np.float64)):
    from_row = np.cos(angle) * row + np.sin(angle) * column + (height - 1) / 2
    from_column = -np.sin(angle) * row + np.cos(angle) * column + (width - 1) / 2
    top, left = np.floor(from_row), np.floor(from_column)
    down = np.round((from_row - top) * _ONE).astype(np.int64)
    right = np.round((from_column - left) * _ONE).astype(np.int64)
    both = down * right // _ONE
    shares = (_ONE - down - right + both, right - both, down - both, both)  # their sum is _ONE
    parts = []
    for (dr, dc), share in zip(((0, 0), (0, 1), (1, 0), (1, 1)), shares, strict=True):
      r, c = (top + dr).astype(np.int64), (left + dc).astype(np.int64)
      inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
      parts.append((np.where(inside, r * width + c, 0), np.where(inside, share, 0)))
    sources.append([p[0] for p in parts])
    weights.append([p[1] for p in parts])
  return {'source': np.array(sources, np.int32), 'weight': np.array(weights, np.int32)}
