"""Checks a stream on the host before anything is compiled for it."""

from __future__ import annotations

import jax
import numpy as np

from cl_jax.errors import UserError
from cl_jax.streams.records import Records
from cl_jax.streams.schedules import check_told
from cl_jax.streams.take import MIXED
from cl_jax.types import Stream

SCENARIOS = ('task', 'class', 'domain', 'online', *MIXED)


def check(stream: Stream) -> Stream:
  """Returns the stream, or raises UserError that says which field is wrong, where, and why.

  Streams made by `cl_jax.streams` pass; this is for those built by hand and for changed data.
  """
  tasks, count = stream.tasks, len(stream.y)
  index, ends = np.asarray(stream.index), np.asarray(stream.ends)
  _that(
    stream.scenario in SCENARIOS,
    f'scenario must be one of {", ".join(SCENARIOS)}; got {stream.scenario!r}',
  )
  check_told(stream.told)
  _that(tasks > 0, 'task_names is empty; name every task')
  _that(
    len(stream.task_classes) == tasks,
    f'task_classes has {len(stream.task_classes)} entries for {tasks} tasks',
  )
  try:
    hash((stream.scenario, stream.told, stream.classes, stream.task_names, stream.task_classes))
  except TypeError as error:
    raise UserError(f'stream: its names, classes and told must be tuples ({error})') from error

  for name, table in (('index', index), ('ends', ends)):
    _that(
      table.dtype == np.int32 and table.ndim == 3,
      f'{name} must be int32 [legs, S, B]; got {table.dtype}{list(table.shape)}',
    )
    limit = tasks * count if stream.scenario in MIXED else count
    bad = np.argwhere((table < -1) | (table >= limit))
    _that(
      not len(bad), f'{name}{bad[0].tolist() if len(bad) else ""} lies outside -1 to {limit - 1}'
    )
    empty = np.flatnonzero((table < 0).all(axis=(1, 2)))
    _that(not len(empty), f'{name} has no examples in leg {empty[0] if len(empty) else ""}')
  legs = len(index)
  _that(len(ends) == legs, f'index has {legs} legs and ends {len(ends)}')
  if stream.scenario not in ('joint', 'blurry'):
    _that(legs == tasks, f'index has {legs} legs for {tasks} tasks')
  for leg, rows in enumerate(ends):
    rows = rows[rows >= 0]
    _that(len(np.unique(rows)) == len(rows), f'ends repeats an example in leg {leg}')
  if stream.steps is not None:
    steps = np.asarray(stream.steps)
    _that(
      steps.shape == (legs,) and steps.min() >= 1 and steps.max() <= index.shape[1],
      f'steps must be {legs} numbers from 1 to {index.shape[1]}; got {steps.tolist()}',
    )
    for leg, n in enumerate(steps):
      _that(
        (index[leg, n:] == -1).all(), f'index has examples after step {n}, the last of leg {leg}'
      )

  _data('x', stream.x, count)
  _labels('y', stream.y, stream.offset, stream.classes, tasks)
  for classes in stream.task_classes:
    _that(
      all(0 <= c < stream.classes for c in classes),
      f'task_classes {classes} exceed the {stream.classes} outputs',
    )
  _test(stream)
  if (stream.view is None) != (stream.views is None):
    raise UserError('stream: view and views must be given together')
  if stream.view is not None:
    _that(
      '<' not in stream.view.__qualname__,
      f'view {stream.view.__qualname__} must be a function of a module: a new function object '
      'would compile the program again',
    )
    for leaf in jax.tree.leaves(stream.views):
      _that(len(leaf) == tasks, f'views has {len(leaf)} entries for {tasks} tasks')
  return stream


def _test(stream: Stream) -> None:
  test, tasks = stream.test, stream.tasks
  shape = np.shape(test.y)
  _that(len(shape) == 3 and shape[0] == tasks, f'test.y must be [{tasks}, E, B]; got {list(shape)}')
  for name in ('w', 'task'):
    _that(np.shape(getattr(test, name)) == shape, f'test.{name} must be shaped like test.y')
  _that(
    jax.tree.structure(test.x) == jax.tree.structure(stream.x),
    'test.x has another structure than x',
  )
  for leaf, data in zip(jax.tree.leaves(test.x), jax.tree.leaves(stream.x), strict=True):
    _that(
      leaf.shape == (*shape, *data.shape[1:]) and leaf.dtype == data.dtype,
      f'test.x is {leaf.dtype}{list(leaf.shape)}; expected {data.dtype}{[*shape, *data.shape[1:]]}',
    )
  _data('test.x', test.x, tasks)
  _labels('test.y', test.y, None, stream.classes, 1)
  weight = np.asarray(test.w).reshape(tasks, -1).sum(axis=1)
  _that(np.isfinite(weight).all() and (weight > 0).all(), 'test.w leaves a task without examples')


def _data(name: str, x, count: int) -> None:
  for path, leaf in jax.tree_util.tree_leaves_with_path(x):
    where = f'{name}{jax.tree_util.keystr(path)}'
    _that(
      np.ndim(leaf) > 0 and len(leaf) == count,
      f'{where} has shape {list(np.shape(leaf))}; its leading axis must be {count}',
    )
    if isinstance(leaf, Records):  # in files, and not read for this
      continue
    leaf = np.asarray(leaf)
    if np.issubdtype(leaf.dtype, np.floating) and not np.isfinite(leaf).all():
      row = int(np.argmin(np.isfinite(leaf.reshape(count, -1)).all(axis=1)))
      raise UserError(f'stream: {where} has NaN or infinity in row {row}; clean the data')


def _labels(name: str, y, offset, classes: int, tasks: int) -> None:
  y = np.asarray(y)
  _that(y.dtype == np.int32, f'{name} must be int32; got {y.dtype}')
  top = int(y.max()) + (0 if offset is None else int(np.max(offset)))
  _that(
    y.min() >= 0 and top < classes,
    f'{name} goes from {y.min()} to {top}, outside the {classes} outputs',
  )
  if offset is not None:
    _that(np.shape(offset) == (tasks,), f'offset must have {tasks} entries; got {np.shape(offset)}')


def _that(true: bool, otherwise: str) -> None:
  if not true:
    raise UserError(f'stream: {otherwise}')
