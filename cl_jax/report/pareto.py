"""What a learner costs against what it reaches: points, and the front of those that no other beats.

Kinds have a colour of Okabe & Ito (2008), a shape and a grey of their own; points on the front are filled and
joined, so that a print in grey says as much. Every point carries its name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from cl_jax.report import place
from cl_jax.report.figures import LIGHT, Theme, canvas
from cl_jax.report.tables import scaled

# Colour and marker; the colours differ in lightness as well.
STYLES = (
  ('#003f73', 'o'), ('#d55e00', 's'), ('#009e73', '^'), ('#7a2a63', 'D'), ('#9c6b00', 'v'), ('#7f7f7f', 'P'),
)  # fmt: skip
FADED = '#555555'


class Point(NamedTuple):
  """A learner.

  Attributes:
    name: its label.
    kind: what it is grouped by, for colour and marker.
    accuracy: in [0, 1], higher is better.
    half: of the interval, or None.
    costs: {name of a panel: a positive number, less is better}; a panel leaves out who has none.
    apart: whether it solves an easier problem: drawn as a cross, and never on the front.
  """

  name: str
  kind: str
  accuracy: float
  half: float | None
  costs: dict[str, float]
  apart: bool = False


def front(points: Sequence[Point], cost: str) -> list[Point]:
  """Those that none beats: nobody reaches as much for less, or more for as much; the cheapest first."""
  known = [p for p in points if not p.apart and p.costs.get(cost) and not math.isnan(p.accuracy)]
  found: list[Point] = []
  for p in sorted(known, key=lambda p: (p.costs[cost], -p.accuracy)):
    same = found and (p.accuracy, p.costs[cost]) == (found[-1].accuracy, found[-1].costs[cost])
    if not found or p.accuracy > found[-1].accuracy or same:
      found.append(p)
  return found


def draw(
  points: Sequence[Point],
  panels: Sequence[tuple[str, str]],
  kinds: Sequence[str],
  apart: str = 'another problem',
  theme: Theme = LIGHT,
  form: str = 'png',
  source: str = '',
) -> bytes:
  """A picture with a panel below the other for each (cost, unit).

  Args:
    points: the learners.
    panels: see `Point.costs`; units as in 'B', 'J' or ''.
    kinds: all there may be, in an order that gives each the same look in every figure.
    apart: what the legend says of points that are `apart`.
    theme: see `figures.Theme`.
    form, source: see `figures.metadata`.
  """
  style = dict(zip(kinds, STYLES, strict=False))
  with canvas(theme, 8.4, 0.6 + 3.7 * len(panels)) as (fig, image):
    axes = fig.subplots(len(panels), 1, squeeze=False)[:, 0]
    lines = [
      _panel(ax, points, *panel, style, theme) for ax, panel in zip(axes, panels, strict=True)
    ]
    there = {p.kind for p in points if not p.apart}
    handles = [_mark(*style[k], False, k, theme) for k in kinds if k in there]
    handles.append(_mark(theme.ink, 'o', True, 'filled and joined: on the front', theme))
    if any(p.apart for p in points):
      handles.append(_mark(FADED, 'x', True, apart, theme))
    fig.legend(handles=handles, loc='outside upper left', ncols=3, frameon=False, fontsize=9)
    fig.canvas.draw()
    for ax, (cost, _), avoid in zip(axes, panels, lines, strict=True):
      place.beside(ax, _labels(points, cost, theme), avoid)
    return image(form, source)


def _labels(
  points: Sequence[Point], cost: str, theme: Theme
) -> list[tuple[float, float, str, str]]:
  """(x, y, name, colour); points on the same spot share a label."""
  best = {p.name for p in front(points, cost)}
  spots: dict[tuple[float, float], list[Point]] = {}
  for p in points:
    if p.costs.get(cost):
      near = (float(f'{p.costs[cost]:.2g}'), round(100 * p.accuracy))
      spots.setdefault(near, []).append(p)
  return [
    (
      group[0].costs[cost],
      100 * group[0].accuracy,
      ', '.join(p.name for p in group),
      theme.ink if best & {p.name for p in group} else FADED,
    )
    for group in spots.values()
  ]


def _panel(
  ax: Any,
  points: Sequence[Point],
  cost: str,
  unit: str,
  style: dict[str, tuple[str, str]],
  theme: Theme,
) -> list[tuple[float, float, float, float]]:
  """Draws points and front; the level and upright lines that labels keep clear of."""
  best = front(points, cost)
  shown = [p for p in points if p.costs.get(cost)]
  xs = [p.costs[cost] for p in shown]
  margin = (max(xs) / min(xs)) ** 0.12 if max(xs) > min(xs) else 2.0
  low, high = min(xs) / margin, max(xs) * margin
  lines: list[tuple[float, float, float, float]] = []
  if best:
    steps = [*((p.costs[cost], 100 * p.accuracy) for p in best), (high, 100 * best[-1].accuracy)]
    ax.step(*zip(*steps, strict=True), where='post', color=theme.ink, linewidth=1.2, zorder=1)
    for (x0, y0), (x1, y1) in pairwise(steps):
      lines += [(x0, y0, x1, y0), (x1, y0, x1, y1)]
  names = {p.name for p in best}
  for p in shown:
    x, y = p.costs[cost], 100 * p.accuracy
    colour, marker = (FADED, 'x') if p.apart else style[p.kind]
    filled = p.apart or p.name in names
    ax.errorbar(
      x, y, None if p.half is None else 100 * p.half, fmt=marker,
      color=colour, markersize=7, markerfacecolor=colour if filled else theme.paper, markeredgewidth=1.4,
      elinewidth=0.8, capsize=2, zorder=3,
    )  # fmt: skip
    if p.half is not None:
      lines.append((x, y - 100 * p.half, x, y + 100 * p.half))
  ax.set_xscale('log')
  ax.set(xlim=(low, high), ylim=(0, 106), xlabel=cost, ylabel='accuracy at the end, %')
  ax.xaxis.set_major_formatter(lambda v, _: tick(v, unit))
  ax.xaxis.set_minor_formatter(lambda v, _: '')
  if (spread := max(xs) / min(xs)) < 50:
    from matplotlib import ticker

    marks = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if spread < 4 else (1.0, 2.0, 5.0)
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=marks))
  return lines


def tick(v: float, unit: str) -> str:
  """'2 mJ', '50 kB': with a decimal prefix, also below 1."""
  for power, prefix in ((-3, 'm'), (-6, 'µ'), (-9, 'n')):
    if v < 0.9995 * 10 ** (power + 3) and v >= 0.9995 * 10**power:
      return f'{v / 10**power:.3g} {prefix}{unit}'
  return scaled(v, unit, '.3g')


def _mark(colour: str, marker: str, filled: bool, label: str, theme: Theme) -> Any:
  from matplotlib.lines import Line2D

  return Line2D(
    [], [], linestyle='', color=colour, marker=marker, markersize=7, markeredgewidth=1.4, label=label,
    markerfacecolor=colour if filled else theme.paper,
  )  # fmt: skip
