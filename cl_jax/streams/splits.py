"""From two splits of a dataset to a sequence of tasks: pure functions to `Stream`.

Validation data is held out of the training split, per class; the test split is never trained on or
selected with. Arrays stay NumPy; `cl_jax.streams.take.put` moves a stream to the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cl_jax.errors import UserError
from cl_jax.streams import order, schedules, views
from cl_jax.streams.arrays import Arrays, check_pair
from cl_jax.streams.assemble import TOLD, Cut, assemble
from cl_jax.streams.records import Records
from cl_jax.streams.schedules import Plan
from cl_jax.streams.select import ALL, Select, check_select, choose, whole
from cl_jax.types import Stream


def split(
  train: Arrays,
  test: Arrays,
  scenario: str,
  tasks: int | tuple[int, ...] | None = None,
  *,
  by: str = 'label',
  order_seed: int | None = None,
  told: tuple[str, ...] | None = None,
  plan: Plan = schedules.DEFAULT,
  select: Select = ALL,
) -> Stream:
  """Cuts a dataset into tasks by label or by domain (van de Ven, Tuytelaars & Tolias 2022).

  Args:
    scenario: 'task' and 'class' keep the dataset's labels. 'domain' uses the label within the task
      (its place among the task's classes), so that all tasks share one small output layer; domains
      that share classes keep the dataset's labels, which mean the same everywhere.
    tasks: their number (early tasks get the remainder), or the number of classes of each. By domain
      every domain is a task and `tasks` may only repeat their number.
    by: 'label', or 'domain' (needs `train.domain`).
    order_seed: shuffles the classes (or the domains) before the cut; None keeps their order.
    told: what the learner may know; None is the scenario's own: 'task' tells the task in
      training and at test time and the boundaries, the others tell it in training only.
    plan: how examples become batches. select: which examples take part.

  Raises:
    UserError: impossible numbers, missing domains, a task without training or test examples.
  """
  _check(train, test, scenario, select)
  if by == 'label':
    labels = _ordered(len(train.names), 'classes', order_seed)
    sizes = _sizes(tasks, len(labels))
    task_classes = [tuple(map(int, part)) for part in np.split(labels, np.cumsum(sizes)[:-1])]
    task_names = _class_names(train.names, task_classes)
    place = np.zeros(len(labels), np.int64)
    place[np.concatenate(task_classes)] = np.repeat(np.arange(len(sizes)), sizes)
    task_of_train, task_of_test = place[train.y], place[test.y]
  elif by == 'domain':
    if train.domain is None or test.domain is None:
      raise UserError("split by='domain': the dataset has no domains; use by='label'")
    domains = _ordered(len(train.domain_names), 'domains', order_seed)
    if tasks not in (None, len(domains)):
      raise UserError(
        f'split by domain: there are {len(domains)} domains, so tasks={tasks} is not '
        'possible; leave it unset'
      )
    place = np.argsort(domains)
    task_of_train, task_of_test = place[train.domain], place[test.domain]
    task_names = tuple(train.domain_names[d] for d in domains)
    task_classes = [
      tuple(np.unique(train.y[task_of_train == t]).tolist()) for t in range(len(domains))
    ]
  else:
    raise UserError(f"split: by must be 'label' or 'domain'; got {by!r}")

  used = [c for classes in task_classes for c in classes]
  within = scenario == 'domain' and len(set(used)) == len(used)
  for t, own in enumerate(task_classes if within or scenario == 'task' else ()):
    if lacking := int((~np.isin(test.y[task_of_test == t], own)).sum()):
      raise UserError(
        f'split: {lacking} test examples of {task_names[t]!r} have classes that it has none of for training, '
        'and so no output: leave them out'
      )
  if within:
    label = np.zeros(len(train.names), np.int32)
    label[used] = np.concatenate([np.arange(len(c)) for c in task_classes])
    train, test = train._replace(y=label[train.y]), test._replace(y=label[test.y])
    task_classes = [tuple(range(len(c))) for c in task_classes]
  classes = max(map(len, task_classes)) if within else len(train.names)

  rows = [np.flatnonzero(task_of_train == t) for t in range(len(task_names))]
  test_rows = [np.flatnonzero(task_of_test == t) for t in range(len(task_names))]
  pools, tests = choose(select, train.y, task_of_train, rows, test_rows, task_names)
  cut = Cut(scenario, task_names, task_classes, classes, pools, tests)
  return assemble(train, test, cut, told, plan, select)


def permuted(
  train: Arrays,
  test: Arrays,
  scenario: str,
  tasks: int,
  *,
  view_seed: int = 0,
  first_plain: bool = False,
  pad: int = 0,
  told: tuple[str, ...] | None = None,
  plan: Plan = schedules.DEFAULT,
  select: Select = ALL,
) -> Stream:
  """Every task is the whole dataset with its pixels (or features) in an order of its own.

  Goodfellow et al. 2013; Kirkpatrick et al. 2017. 'domain' shares the C outputs; 'class' and 'task'
  give task t the labels t*C to t*C + C - 1. Training images stay as they are stored and are
  permuted in the step; the test images of every task are permuted here, once.

  Args:
    view_seed: of the permutations, apart from the order of examples (`plan.seed`).
    first_plain: task 0 sees the images as they are.
    pad: zero pixels added on every side first; 2 makes 28x28 into the 32x32 of van de Ven & Tolias.
    others: as for `split`.
  """
  _check(train, test, scenario, select)
  tasks = whole(tasks, 'tasks')
  view_seed, pad = whole(view_seed, 'view_seed', 0), whole(pad, 'pad', 0)
  if pad:
    train, test = (data._replace(x=_padded(data.x, pad)) for data in (train, test))
  shape = _array(train.x, 'permuted').shape
  pixels = shape[1] * shape[2] if len(shape) == 4 else int(np.prod(shape[1:]))
  table = views.permutations(pixels, tasks, view_seed, first_plain)
  names = tuple(f'permutation {t}' for t in range(tasks))
  return _viewed(train, test, scenario, names, views.permute, table, told, plan, select)


def rotated(
  train: Arrays,
  test: Arrays,
  scenario: str,
  tasks: int | None = None,
  *,
  degrees: tuple[float, ...] | None = None,
  told: tuple[str, ...] | None = None,
  plan: Plan = schedules.DEFAULT,
  select: Select = ALL,
) -> Stream:
  """Every task is the whole dataset turned by an angle of its own (Lopez-Paz & Ranzato 2017).

  Args:
    degrees: counter-clockwise angles; None = `tasks` angles evenly over [0, 180).
    others: as for `permuted`.
  """
  _check(train, test, scenario, select)
  if degrees is None:
    tasks = whole(tasks, 'tasks')
    degrees = tuple(180.0 * np.arange(tasks) / tasks)
  if not degrees or not np.isfinite(degrees).all() or tasks not in (None, len(degrees)):
    raise UserError(
      f'rotated: degrees must be finite numbers, one per task; got {degrees} for tasks={tasks}'
    )
  x = _array(train.x, 'rotated')
  if x.dtype != np.uint8 or x.ndim != 4:
    raise UserError(
      f'rotated: inputs must be uint8 images [N, H, W, C]; got {x.dtype}{list(x.shape)}'
    )
  table = views.rotation_table(x.shape[1], x.shape[2], degrees)
  names = tuple(f'{angle:g} degrees' for angle in degrees)
  return _viewed(train, test, scenario, names, views.rotate, table, told, plan, select)


def _viewed(train, test, scenario, names, view, table, told, plan, select) -> Stream:
  count, tasks = len(train.names), len(names)
  pools, tests = choose(
    select,
    train.y,
    None,
    [np.arange(len(train.y))] * tasks,
    [np.arange(len(test.y))] * tasks,
    names,
  )
  shared = scenario == 'domain'
  offset = None if shared else np.arange(tasks, dtype=np.int32) * np.int32(count)
  first = [0 if shared else t * count for t in range(tasks)]
  task_classes = [tuple(range(a, a + count)) for a in first]
  classes = count if shared else tasks * count
  cut = Cut(scenario, names, task_classes, classes, pools, tests, table, view, offset)
  return assemble(train, test, cut, told, plan, select)


def _check(train: Arrays, test: Arrays, scenario: str, select: Select) -> None:
  check_pair(train, test)
  check_select(select)
  if scenario not in TOLD:
    raise UserError(f'scenario must be one of {", ".join(TOLD)}; got {scenario!r}')


def _ordered(count: int, what: str, seed: int | None) -> np.ndarray:
  if seed is None:
    return np.arange(count)
  return order.shuffled(whole(seed, 'order_seed', 0), f'order of {what}', count)


def _sizes(tasks, classes: int) -> list[int]:
  if isinstance(tasks, tuple):
    if not tasks or min(tasks) < 1 or sum(tasks) != classes:
      raise UserError(
        f'the numbers of classes per task {tasks} must be positive and sum to {classes}'
      )
    return list(tasks)
  tasks = whole(tasks, 'tasks')
  if tasks > classes:
    raise UserError(f'{tasks} tasks need at least as many classes; the dataset has {classes}')
  return [classes // tasks + (t < classes % tasks) for t in range(tasks)]


def _class_names(names, task_classes) -> tuple[str, ...]:
  return tuple(
    ' + '.join(names[i] for i in c) if len(c) < 3 else f'{names[c[0]]} .. {names[c[-1]]}'
    for c in task_classes
  )


def _array(x, what: str) -> Any:
  if not isinstance(x, np.ndarray | Records):
    raise UserError(f'{what}: inputs must be one array of pixels or features, not a tree')
  return x


def _padded(x, pad: int) -> np.ndarray:
  x = _array(x, 'permuted')
  if x.ndim != 4:
    raise UserError(f'permuted: pad={pad} needs images [N, H, W, C]; got {list(x.shape)}')
  if isinstance(x, Records):
    raise UserError(
      f'permuted: pad={pad} needs images in memory and these stay in files: leave pad at 0'
    )
  return np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
