"""Sequences of tasks as index tables over data that stays on the device.

`dataset` finds data, `split`, `permuted` and `rotated` cut it into tasks, `joint`, `cumulative`,
`online`, `blurry` and `task_free` change the order and what is told, `put` moves it to the device.
"""

from __future__ import annotations

from cl_jax.streams.load import dataset
from cl_jax.streams.schedules import (
  Plan,
  blurry,
  cumulative,
  joint,
  online,
  reordered,
  task_free,
  tell,
)
from cl_jax.streams.select import Select
from cl_jax.streams.splits import permuted, rotated, split
from cl_jax.streams.take import put

__all__ = [
  'Plan',
  'Select',
  'blurry',
  'cumulative',
  'dataset',
  'joint',
  'online',
  'permuted',
  'put',
  'reordered',
  'rotated',
  'split',
  'task_free',
  'tell',
]
