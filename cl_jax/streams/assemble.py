"""Puts a stream together from what a split has decided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cl_jax.streams import order, schedules
from cl_jax.streams.arrays import Arrays
from cl_jax.streams.schedules import Plan
from cl_jax.streams.select import Select
from cl_jax.types import Batch, Stream

TOLD = {
  'task': ('boundary', 'task_train', 'task_test'),
  'class': ('boundary', 'task_train'),
  'domain': ('boundary', 'task_train'),
}


class Cut(NamedTuple):
  """The tasks of a stream; the fields that `Stream` has too mean the same there.

  Attributes:
    pools: per task, the ascending rows of the training data that it learns from.
    tests: per task, the rows of the test data (or of the training data, for validation).
  """

  scenario: str
  task_names: tuple[str, ...]
  task_classes: Sequence[tuple[int, ...]]
  classes: int
  pools: Sequence[np.ndarray]
  tests: Sequence[np.ndarray]
  views: Any = None
  view: Callable | None = None
  offset: Any = None


def assemble(
  train: Arrays, test: Arrays, cut: Cut, told: tuple[str, ...] | None, plan: Plan, select: Select
) -> Stream:
  """The stream that learns the tasks of `cut` one after the other."""
  schedules.check_plan(plan)
  told = TOLD[cut.scenario] if told is None else schedules.check_told(told)
  source = test if select.evaluate == 'test' else train
  x: Any = train.x
  y: Any = train.y
  pools, used = cut.pools, np.unique(np.concatenate(cut.pools))
  if len(used) < len(y):  # what no task learns from does not go to the device
    x, y = jax.tree.map(lambda leaf: leaf[used], x), y[used]
    pools = [np.searchsorted(used, pool) for pool in pools]
  ends: Any = schedules.ends(pools, plan)
  stream = Stream(
    x=x,
    y=y,
    index=ends,  # a place holder: `reordered` draws the batches
    ends=ends,
    test=_test(source, cut, told, select.test_batch),
    scenario=cut.scenario,
    told=told,
    classes=int(cut.classes),
    task_names=tuple(cut.task_names),
    task_classes=tuple(cut.task_classes),
    views=cut.views,
    offset=cut.offset,
    view=cut.view,
  )
  return schedules.reordered(stream, plan)


def _test(source: Arrays, cut: Cut, told: tuple[str, ...], batch: int) -> Batch:
  index, _ = order.stacked([order.batched(rows, batch) for rows in cut.tests])
  real: Any = index >= 0
  rows = np.where(real, index, 0)
  x = jax.tree.map(lambda leaf: np.asarray(leaf[rows]), source.x)  # read here what is in files
  if cut.view is not None:
    for t in range(len(index)):  # in place, a task at a time: the copies stay small
      flat = x[t].reshape(-1, *x.shape[3:])
      x[t] = cut.view(flat, jax.tree.map(lambda v, t=t: v[t], cut.views)).reshape(x[t].shape)
  y: Any = source.y[rows] + (0 if cut.offset is None else cut.offset[:, None, None])
  task: Any = schedules.task_of_test(index.shape, told)
  return Batch(x, y.astype(np.int32), real.astype(np.float32), task)
