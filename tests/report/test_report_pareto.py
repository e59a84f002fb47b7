"""The front of what nothing beats, and its figure."""

from __future__ import annotations

import pytest

from cl_jax.report import pareto, place
from cl_jax.report.figures import LIGHT, canvas
from cl_jax.report.pareto import Point

POINTS = [
  Point('cheap', 'a', 0.3, None, {'bytes': 10.0, 'work': 4e-6}),
  Point('beaten', 'a', 0.25, 0.1, {'bytes': 20.0, 'work': 2e-6}),
  Point('equal', 'b', 0.3, None, {'bytes': 15.0}),
  Point('same price', 'b', 0.5, 0.05, {'bytes': 30.0, 'work': 8e-6}),
  Point('less for it', 'b', 0.4, None, {'bytes': 30.0, 'work': 0.0}),
  Point('best', 'a', 0.9, 0.02, {'bytes': 4e3, 'work': 1e-3}),
  Point('dearer', 'a', 0.9, None, {'bytes': 5e3}),
  Point('told', 'a', 1.0, None, {'bytes': 1.0, 'work': 1e-6}, True),
]


def test_the_front_by_hand():
  """Cheapest first; what costs as much or more and reaches no more is not on it, nor what is told more."""
  assert [p.name for p in pareto.front(POINTS, 'bytes')] == ['cheap', 'same price', 'best']
  assert [p.name for p in pareto.front(POINTS, 'work')] == ['beaten', 'cheap', 'same price', 'best']


def test_a_tie_is_beaten_by_none_and_an_unknown_accuracy_beats_none():
  points = [
    Point('unknown', 'a', float('nan'), None, {'bytes': 1.0}),
    Point('one', 'a', 0.5, None, {'bytes': 2.0}),
    Point('as good', 'b', 0.5, None, {'bytes': 2.0}),
    Point('best', 'b', 0.6, None, {'bytes': 3.0}),
  ]
  assert [p.name for p in pareto.front(points, 'bytes')] == ['one', 'as good', 'best']


def test_the_figure_is_the_same_each_time():
  panels = (('bytes', 'B'), ('work', 'J'))
  one, two = (pareto.draw(POINTS, panels, ('a', 'b')) for _ in range(2))
  assert one == two and one.startswith(b'\x89PNG')
  assert one != pareto.draw(POINTS[:-1], panels, ('a', 'b'))


def test_points_on_one_spot_share_a_label():
  twins = [POINTS[0], POINTS[0]._replace(name='twin'), POINTS[5]]
  assert [label for *_, label, _ in pareto._labels(twins, 'bytes', LIGHT)] == [
    'cheap, twin',
    'best',
  ]


def test_labels_keep_clear_of_lines():
  with canvas(LIGHT, 5, 4) as (fig, _):
    ax = fig.subplots()
    ax.set(xlim=(0, 10), ylim=(0, 10))
    fig.canvas.draw()
    place.beside(ax, [(2.0, 5.0, 'a label', 'black')], [(2.0, 5.0, 10.0, 5.0)])
    fig.canvas.draw()
    box = ax.texts[0].get_window_extent()
    (_, y), right = ax.transData.transform((2, 5)), ax.transData.transform((10, 5))[0]
    x = ax.transData.transform((2, 5))[0]
    assert not (box.y0 < y < box.y1 and box.x1 > x and box.x0 < right)


@pytest.mark.parametrize(
  'v, unit, text',
  [(2e-6, 'J', '2 µJ'), (0.05, 'J', '50 mJ'), (1.0, 'J', '1 J'), (2e5, '', '200 k')],
)
def test_ticks_have_prefixes(v, unit, text):
  assert pareto.tick(v, unit).strip() == text
