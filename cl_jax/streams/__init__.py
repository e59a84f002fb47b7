"""Sequences of tasks as index tables over data that stays on the device.

A dataset is found (`dataset`) or built (`arrays.arrays`), cut into tasks (`split`, `permuted`,
`rotated`), and perhaps scheduled in another way (`joint`, `cumulative`, `online`, `task_free`,
`blurry`). `take.take` turns row numbers into a batch; `check.check` validates a stream.
"""

from cl_jax.streams.arrays import Arrays
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

__all__ = [
  'Arrays',
  'Plan',
  'Select',
  'blurry',
  'cumulative',
  'dataset',
  'joint',
  'online',
  'permuted',
  'reordered',
  'rotated',
  'split',
  'task_free',
  'tell',
]
