"""From row numbers to the batch a learner sees: every batch is made here, wherever its examples lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax.errors import UserError
from cl_jax.streams.records import in_files
from cl_jax.types import Array, Batch, Stream, Tree

MIXED = ('joint', 'cumulative', 'blurry')  # scenarios whose legs hold examples of several tasks


def take(stream: Stream, rows: Array, t: Array | int) -> Batch:
  """The examples `rows` as leg `t` of the stream shows them. Traceable in `rows` and `t`.

  Pass the stream as an argument of the jitted function (or `put` it on the device before): closed
  over, its data would be compiled into the program.

  Args:
    stream: see `Stream`.
    rows: i32[B], entries of `index` or `ends`. In the scenarios `MIXED` an entry is k*N + n,
      example n of `x` as task k sees it (N rows in `x`); elsewhere it is n, as task `t` sees it.
    t: the leg.

  Returns:
    Batch with leading axis B: x viewed, y with its task's offset, w 1 (0 where rows is -1; such a
    row repeats entry 0), task as told, or -1.
  """
  y = jnp.asarray(stream.y)
  n = places(stream, jnp.asarray(rows), len(y))
  x = jax.tree.map(lambda leaf: jnp.asarray(leaf)[n], stream.x)
  return show(stream, x, y[n], rows, t, len(y))


def places(stream: Stream, rows: Any, count: int) -> Any:
  """Where entries of `index` or `ends` lie in the `count` rows of `stream.x`; -1 lies at 0."""
  row = rows * (rows >= 0)
  return row % count if stream.scenario in MIXED else row


def show(stream: Stream, x: Tree, y: Array, rows: Array, t: Array | int, count: int) -> Batch:
  """`take` where the examples are there already: nothing is read of the stream's own data.

  Args:
    x, y: of the stream's data, at the `places` of the rows.
    rows, t: as for `take`.
    count: N, the examples that the stream has.
  """
  rows = jnp.asarray(rows)
  real = rows >= 0
  row = jnp.where(real, rows, 0)
  mixed = stream.scenario in MIXED
  task = row // count if mixed else jnp.full(row.shape, t, jnp.int32)
  if stream.view is not None:
    view, views = stream.view, jax.tree.map(jnp.asarray, stream.views)
    if mixed:
      # One example at a time, each with the parameters of its own task.
      x = jax.tree.map(lambda a: a[:, None], x)
      x = jax.vmap(view)(x, jax.tree.map(lambda v: v[task], views))
      x = jax.tree.map(lambda a: a[:, 0], x)
    else:
      x = view(x, jax.tree.map(lambda v: v[t], views))
  if stream.offset is not None:
    y = y + jnp.asarray(stream.offset)[task]
  told = task if 'task_train' in stream.told else jnp.full_like(task, -1)
  return Batch(x, y, real.astype(jnp.float32), told)


def without_data(stream: Stream) -> Stream:
  """The stream without its training data, for programs that get their batches handed in."""
  return dataclasses.replace(stream, x=None, y=None)


def shown(stream: Stream) -> Callable[[Tree, np.ndarray, int], Batch]:
  """(x, rows, t) -> Batch with the axes of `rows` before each leaf: `show` for data on the host.

  `x` holds the examples at the `places` of the flat rows.
  """
  y: Any = np.asarray(stream.y)
  bare = dataclasses.replace(without_data(stream), index=None, ends=None, test=None, steps=None)
  program = jax.jit(lambda stream, x, y, rows, t: show(stream, x, y, rows, t, count))
  count = len(y)

  def batch(x: Tree, rows: np.ndarray, t: int) -> Batch:
    flat: Any = rows.reshape(-1)
    made = program(bare, x, y[places(stream, flat, count)], flat, t)
    return jax.tree.map(lambda a: a.reshape(*rows.shape, *a.shape[1:]), made)

  return batch


def put(stream: Stream, device=None) -> Stream:
  """Moves all arrays of the stream to the device (the default one), once.

  Raises:
    UserError: its examples stay in files.
  """
  if in_files(stream.x):
    raise UserError(
      "the stream's examples stay in files and are not put on a device: learn it by "
      'run_chunks(..., feed=streams.grain_feed(stream))'
    )
  return jax.device_put(stream, device)
