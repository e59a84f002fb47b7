"""In which order examples arrive: schedules are functions from a stream to a stream.

Each starts from the distinct training examples of every task (`Stream.ends`) and lays out new
index tables; data, views, labels and tests stay as they are. So `joint(split(...))`,
`blurry(rotated(...))` and `reordered(stream, plan with another seed)` all work.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from cl_jax.errors import UserError
from cl_jax.streams import order
from cl_jax.streams.select import whole
from cl_jax.streams.take import MIXED
from cl_jax.types import Stream


class Plan(NamedTuple):
  """How the examples of a leg become batches.

  Attributes:
    batch: examples in a step.
    epochs: passes over the leg's examples; not used with `iterations`.
    iterations: steps per leg, over as many shuffled epochs as that takes.
    drop_last: leave out the incomplete batch of an epoch instead of padding it.
    ends_batch: batch size of `Stream.ends`.
    seed: of every shuffle.
  """

  batch: int = 128
  epochs: int = 1
  iterations: int | None = None
  drop_last: bool = False
  ends_batch: int = 256
  seed: int = 0


DEFAULT = Plan()


def check_plan(plan: Plan) -> None:
  """Raises UserError for a number out of range."""
  for name, least in (('batch', 1), ('epochs', 1), ('ends_batch', 1), ('seed', 0)):
    whole(getattr(plan, name), name, least)
  if plan.iterations is not None:
    whole(plan.iterations, 'iterations')


def reordered(stream: Stream, plan: Plan = DEFAULT) -> Stream:
  """The same legs with freshly drawn batches, for another seed or another number of steps."""
  if stream.scenario == 'blurry':
    raise UserError('a blurry stream cannot be reordered; make it again from its split')
  return _legs(stream, _pools(stream), plan, stream.scenario)


def joint(stream: Stream, plan: Plan = DEFAULT) -> Stream:
  """All tasks at once, the upper bound: one leg with the examples of every task; R is [1, T]."""
  return _legs(stream, [np.concatenate(_mixed_pools(stream, 'joint'))], plan, 'joint')


def cumulative(stream: Stream, plan: Plan = DEFAULT) -> Stream:
  """Leg t learns from all tasks up to t: what unlimited storage of the past would give."""
  pools = _mixed_pools(stream, 'cumulative')
  return _legs(
    stream, [np.concatenate(pools[: t + 1]) for t in range(len(pools))], plan, 'cumulative'
  )


def online(stream: Stream, plan: Plan = Plan(batch=10), told: tuple[str, ...] = ()) -> Stream:  # noqa: B008
  """A single pass: every example is seen in one batch only. By default nothing is told.

  To keep the scenario's name and what it tells, use the split itself with `epochs=1`.
  """
  if plan.epochs != 1 or plan.iterations is not None:
    raise UserError('an online stream is one pass; leave epochs at 1 and iterations unset')
  _separate(stream, 'online')
  return tell(dataclasses.replace(reordered(stream, plan), scenario='online'), told)


def task_free(stream: Stream) -> Stream:
  """The same stream with its tasks and boundaries hidden (batch.task is -1, no boundary hook)."""
  return tell(stream, ())


def tell(stream: Stream, told: tuple[str, ...]) -> Stream:
  """Changes what the learner may know, in training and in the tests."""
  told = check_told(told)
  test = stream.test._replace(task=task_of_test(stream.test.y.shape, told))
  return dataclasses.replace(stream, told=told, test=test)


def task_of_test(shape: tuple[int, ...], told: tuple[str, ...]) -> np.ndarray:
  """`test.task` i32[T, E, B]: the task where it is told at test time, else -1."""
  task = np.full(shape, -1, np.int32)
  if 'task_test' in told:
    task[:] = np.arange(shape[0], dtype=np.int32)[:, None, None]
  return task


def blurry(
  stream: Stream,
  plan: Plan = DEFAULT,
  segments: int | None = None,
  by: str = 'task',
  width: float = 0.5,
) -> Stream:
  """Tasks, or classes, come and go gradually; no boundary is told.

  The centres of the U tasks (or classes, in the stream's order) are spread evenly over the stream.
  An example of unit u arrives at time (u + 1/2) / U + width / U * N(0, 1), and examples are learnt
  in the order of arrival, each once per epoch of `plan`: the mix of units at any moment is
  that of equal gaussians around their centres.

  The gaussian schedule of Shanahan, Kaplanis & Mitrovic 2021 ("Encoders and ensembles for task-free
  continual learning"); there the unit of every example is drawn from that mix, with replacement;
  here every example occurs exactly as often as in the other schedules. `iterations` is not used.

  Args:
    segments: the legs that the stream is cut into, with an evaluation after each; None = T.
    by: 'task' or 'class'.
    width: standard deviation in units of the distance between neighbouring centres.
  """
  check_plan(plan)
  segments = stream.tasks if segments is None else segments
  if by not in ('task', 'class'):
    raise UserError(f"blurry: by must be 'task' or 'class'; got {by!r}")
  if not 0.0 <= width < float('inf'):
    raise UserError(f'blurry: width must be a number of at least 0; got {width}')
  if plan.iterations is not None:
    raise UserError('blurry: the schedule is counted in epochs; leave iterations unset')
  rows = np.tile(np.concatenate(_mixed_pools(stream, 'blurry')), plan.epochs)
  task, n = rows // len(stream.y), rows % len(stream.y)
  unit, units = task, stream.tasks
  if by == 'class':
    label = np.asarray(stream.y)[n]
    if stream.offset is not None:
      label = label + np.asarray(stream.offset)[task]
    sequence = list(dict.fromkeys(c for classes in stream.task_classes for c in classes))
    place = np.zeros(stream.classes, np.int64)
    place[sequence] = np.arange(len(sequence))
    unit, units = place[label], len(sequence)
  time = (unit + 0.5 + width * order.normal(plan.seed, 'arrival', len(rows))) / units
  # Ties (width 0) are broken by a shuffle, not by the order of the table.
  order_ = np.lexsort((order.shuffled(plan.seed, 'ties', len(rows)), time))
  table = order.batched(rows[order_], plan.batch, plan.drop_last)
  if not 1 <= segments <= len(table):
    raise UserError(
      f'blurry: segments must lie between 1 and the {len(table)} steps; got {segments}'
    )
  parts = np.array_split(table, segments)
  index, steps = order.stacked(parts)
  pools = [np.unique(part[part >= 0]) for part in parts]
  stream = dataclasses.replace(
    stream, index=index, steps=steps, ends=ends(pools, plan), scenario='blurry'
  )
  return tell(stream, ())


def ends(pools, plan: Plan) -> np.ndarray:
  """i32[L, E, ends_batch]: the examples of each leg once, shuffled."""
  shuffles = [order.shuffled(plan.seed, f'ends {i}', len(pool)) for i, pool in enumerate(pools)]
  tables = [order.batched(p[s], plan.ends_batch) for p, s in zip(pools, shuffles, strict=True)]
  return order.stacked(tables)[0]


def check_told(told) -> tuple[str, ...]:
  """`told` as a tuple; raises UserError for a word that means nothing."""
  known = ('boundary', 'task_train', 'task_test')
  if isinstance(told, str) or any(word not in known for word in told):
    raise UserError(f'told must be a tuple with any of {", ".join(known)}; got {told!r}')
  return tuple(told)


def _pools(stream: Stream) -> list[np.ndarray]:
  # Ascending, so that a schedule depends on the examples only and not on how `ends` was shuffled.
  return [np.sort(leg[leg >= 0]) for leg in np.asarray(stream.ends)]


def _mixed_pools(stream: Stream, what: str) -> list[np.ndarray]:
  _separate(stream, what)
  count = len(stream.y)
  if stream.tasks * count > np.iinfo(np.int32).max:
    raise UserError(
      f'{what}: {stream.tasks} tasks of {count} examples exceed 32-bit row numbers; '
      'use fewer examples'
    )
  return [pool + np.int32(t * count) for t, pool in enumerate(_pools(stream))]


def _separate(stream: Stream, what: str) -> None:
  if stream.scenario in MIXED:
    raise UserError(
      f'{what} starts from a stream of separate tasks; this one is {stream.scenario!r}'
    )


def _legs(stream: Stream, pools, plan: Plan, scenario: str) -> Stream:
  check_plan(plan)
  small = min(len(pool) for pool in pools)
  if plan.drop_last and small < plan.batch:
    raise UserError(
      f'drop_last leaves no batch: a leg has {small} examples and batch is {plan.batch}'
    )
  tables = [
    order.epochs_of(
      pool, plan.batch, plan.epochs, plan.iterations, plan.drop_last, plan.seed, f'leg {i}'
    )
    for i, pool in enumerate(pools)
  ]
  index, steps = order.stacked(tables)
  return dataclasses.replace(
    stream, index=index, steps=steps, ends=ends(pools, plan), scenario=scenario
  )
