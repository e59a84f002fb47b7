"""Which examples take part: validation data, caps, and what a task is evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cl_jax.errors import UserError
from cl_jax.streams import order
from cl_jax.streams.arrays import groups, held_out


class Select(NamedTuple):
  """Which examples a stream is made of.

  Attributes:
    validation: fraction of every class held out of each task's training data; 0 holds out nothing.
    evaluate: 'test', or 'valid' for the held-out training data (hyperparameter selection).
    examples_per_class: at most so many training examples of a class in a task (None = all).
    examples_per_task: at most so many training examples in a task, drawn after the former.
    test_per_task: at most so many evaluation examples of a task.
    test_batch: batch size of the evaluation.
    seed: of the choices above.
  """

  validation: float = 0.0
  evaluate: str = 'test'
  examples_per_class: int | None = None
  examples_per_task: int | None = None
  test_per_task: int | None = None
  test_batch: int = 256
  seed: int = 0


ALL = Select()


def check_select(select: Select) -> None:
  """Raises UserError for values out of range."""
  if select.evaluate not in ('test', 'valid'):
    raise UserError(f"evaluate must be 'test' or 'valid'; got {select.evaluate!r}")
  if isinstance(select.validation, str) or not 0.0 <= select.validation < 1.0:
    raise UserError(f'validation must be a fraction in [0, 1); got {select.validation!r}')
  if select.evaluate == 'valid' and select.validation == 0.0:
    raise UserError("evaluate='valid' needs held-out data; set validation, for example to 0.1")
  for name in ('examples_per_class', 'examples_per_task', 'test_per_task', 'test_batch'):
    value = getattr(select, name)
    if name == 'test_batch' or value is not None:
      whole(value, name)
  whole(select.seed, 'seed', 0)


def whole(value, name: str, least: int = 1) -> int:
  """`value` if it is an integer of at least `least`, else a UserError."""
  if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
    raise UserError(f'{name} must be a whole number of at least {least}; got {value!r}')
  return int(value)


def choose(
  select: Select,
  y: np.ndarray,
  task: np.ndarray | None,
  train: Sequence[np.ndarray],
  test: Sequence[np.ndarray],
  names: Sequence[str],
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """The rows that each task learns from and is evaluated on.

  Args:
    y: i32[N], the training labels.
    task: [N], the task of every training example; None when all tasks share all examples, which
      are then cut once: an example held out for one task is not trained on in another.
    train, test: per task, ascending rows of the training and the test data.
    names: of the tasks, for messages.

  Returns:
    Ascending training rows per task, and rows of the test data, or of the training data when
    `select.evaluate` is 'valid'.
  """
  held = np.zeros(len(y), bool)
  if select.validation:
    held[held_out(y, select.validation, select.seed, 'validation', task)[1]] = True
  pools, tests = [], []
  other = 'use fewer tasks, other data or, by domain, domains that both splits have'
  for t, name in enumerate(names):
    where = f'task {t} ({name})'
    if not len(train[t]):
      raise UserError(f'{where} has no training examples: {other}')
    pools.append(_capped(select, y, train[t][~held[train[t]]], f'task {t}'))
    rows = test[t] if select.evaluate == 'test' else train[t][held[train[t]]]
    if not len(rows):
      raise UserError(f'{where} has no test examples: {other}')
    tests.append(_drawn(rows, select.test_per_task, select.seed, f'test of task {t}'))
  return pools, tests


def _capped(select: Select, y: np.ndarray, rows: np.ndarray, where: str) -> np.ndarray:
  if select.examples_per_class is not None:
    kept = [
      _drawn(rows[members], select.examples_per_class, select.seed, f'{where}, class {label}')
      for label, members in groups(y[rows])
    ]
    rows = np.sort(np.concatenate(kept))
  return _drawn(rows, select.examples_per_task, select.seed, f'{where}, examples')


def _drawn(rows: np.ndarray, most: int | None, seed: int, purpose: str) -> np.ndarray:
  if most is None or len(rows) <= most:
    return rows
  return np.sort(rows[order.shuffled(seed, purpose, len(rows))[:most]])
