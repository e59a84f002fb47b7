"""Sequences of tasks as index tables over data that stays on the device.

`dataset` finds data, `split`, `permuted` and `rotated` cut it into tasks, `joint`, `cumulative`,
`online`, `blurry` and `task_free` change the order and what is told, `put` moves it to the device.
`grain_feed` reads the examples of `dataset(name, in_files=True)` from their files, ahead of the steps.
"""

from __future__ import annotations

from cl_jax.streams.feed import grain_feed
from cl_jax.streams.load import dataset
from cl_jax.streams.records import Records
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
  'Records',
  'Select',
  'blurry',
  'cumulative',
  'dataset',
  'grain_feed',
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
