"""Where labels go, so that they do not cover each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def apart(values: Sequence[float], gap: float, limits: tuple[float, float]) -> list[float]:
  """Positions in the order of `values`, close to them, at least `gap` apart, inside `limits`.

  Least squares under these constraints: neighbours that are too close form a block around their mean.
  Where they cannot all fit, they share the space evenly.
  """
  low, high = limits
  n = len(values)
  if n > 1:
    gap = min(gap, (high - low) / (n - 1))
  order = np.argsort(values, kind='stable')
  blocks: list[list[float]] = []  # [sum of (value - gap * rank in block), length]
  starts: list[float] = []

  def start(block: list[float]) -> float:
    length = (block[1] - 1) * gap
    return float(min(max(block[0] / block[1], low), high - length))

  for i in order:
    blocks.append([float(values[i]), 1])
    starts.append(start(blocks[-1]))
    while len(blocks) > 1 and starts[-1] < starts[-2] + blocks[-2][1] * gap - 1e-12:
      total, count = blocks.pop()
      starts.pop()
      blocks[-1][0] += total - gap * blocks[-1][1] * count
      blocks[-1][1] += count
      starts[-1] = start(blocks[-1])
  placed = [s + k * gap for s, b in zip(starts, blocks, strict=True) for k in range(int(b[1]))]
  out = [0.0] * n
  for i, y in zip(order, placed, strict=True):
    out[i] = y
  return out


def beside(
  ax: Any,
  points: Sequence[tuple[float, float, str, str]],
  avoid: Sequence[tuple[float, float, float, float]] = (),
) -> None:
  """Writes the label of every point (x, y, label, colour) next to it, where there is room.

  Tries eight places around the point at growing distances and takes the first that covers no other
  label, no point and nothing of `avoid` (lines from (x0, y0) to (x1, y1), upright or level) and lies inside
  the axes; the last resort is the right side. Of points that touch the upper one's label is not below.
  """
  renderer = ax.figure.canvas.get_renderer()
  box = ax.get_window_extent(renderer)
  frame = (box.x0, box.y0, box.x1, box.y1)
  dots = [tuple(ax.transData.transform(p[:2])) for p in points]
  unit = ax.figure.dpi / 72
  taken: list[tuple[float, ...]] = [(d[0] - 5, d[1] - 5, d[0] + 5, d[1] + 5) for d in dots]
  for x0, y0, x1, y1 in avoid:
    (a, b), (c, d) = ax.transData.transform([(x0, y0), (x1, y1)])
    taken.append((min(a, c) - 2, min(b, d) - 2, max(a, c) + 2, max(b, d) + 2))
  for (x, y, label, colour), dot in sorted(zip(points, dots, strict=True), key=lambda p: p[1]):
    probe = ax.text(0, 0, label, fontsize=9)
    extent = probe.get_window_extent(renderer)
    probe.remove()
    places = around(dot, extent.width, extent.height, unit)
    touching = [
      d[1] - dot[1] for d in dots if max(abs(d[0] - dot[0]), abs(d[1] - dot[1])) < 10 * unit
    ]
    wrong = [p for p in places if any(((p[1] + p[3]) / 2 - dot[1]) * way > 0 for way in touching)]
    free = (
      p
      for p in sorted(places, key=lambda p: p in wrong)
      if within(p, frame) and not any(crosses(p, t) for t in taken)
    )
    rect = next(free, places[0])
    taken.append(rect)
    centre = ((rect[0] + rect[2]) / 2, (rect[1] + rect[3]) / 2)
    far = places.index(rect) >= len(AROUND)
    ax.annotate(
      label,
      (x, y),
      ax.transData.inverted().transform(centre),
      color=colour,
      fontsize=9,
      ha='center',
      va='center',
      arrowprops={'arrowstyle': '-', 'color': colour, 'linewidth': 0.5} if far else None,
    )


AROUND = ((1, 0), (-1, 0), (0.7, 1), (0.7, -1), (-0.7, 1), (-0.7, -1), (0, 1), (0, -1))


def around(dot: Sequence[float], w: float, h: float, unit: float) -> list[tuple[float, ...]]:
  """Boxes of a size around a point, the nearest and most usual ones first."""
  out = []
  for r in (8, 16, 26, 38, 52, 70):
    for dx, dy in AROUND:
      x, y = dot[0] + dx * (r * unit + w / 2), dot[1] + dy * (r * unit + h / 2)
      out.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
  return out


def within(a: Sequence[float], b: Sequence[float]) -> bool:
  """Whether the box a lies inside b."""
  return b[0] < a[0] and b[1] < a[1] and a[2] < b[2] and a[3] < b[3]


def crosses(a: Sequence[float], b: Sequence[float]) -> bool:
  """Whether two boxes (x0, y0, x1, y1) overlap."""
  return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
