"""Labels keep their distance."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cl_jax.report.place import apart, crosses, within


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30), st.floats(0.1, 8))
def test_positions_keep_the_order_the_gap_and_the_limits(values, gap):
  placed = apart(values, gap, (0, 100))
  order = np.argsort(values, kind='stable')
  steps = np.diff(np.array(placed)[order])
  room = 100 / max(len(values) - 1, 1)
  assert (steps >= min(gap, room) - 1e-6).all()
  assert min(placed) >= -1e-6 and max(placed) <= 100 + 1e-6


def test_positions_that_are_far_apart_stay():
  assert apart([10, 50, 30], 5, (0, 100)) == [10, 50, 30]


def test_neighbours_share_the_way():
  assert np.allclose(apart([50, 50], 4, (0, 100)), [48, 52])


def test_boxes():
  assert crosses((0, 0, 2, 2), (1, 1, 3, 3)) and not crosses((0, 0, 1, 1), (1, 0, 2, 1))
  assert within((1, 1, 2, 2), (0, 0, 3, 3)) and not within((1, 1, 4, 2), (0, 0, 3, 3))
