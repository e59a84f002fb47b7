"""From row numbers to the batch a learner sees: the only place that reads a stream's data."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_jax.types import Array, Batch, Stream

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
  rows = jnp.asarray(rows)
  real = rows >= 0
  row = jnp.where(real, rows, 0)
  y = jnp.asarray(stream.y)
  mixed = stream.scenario in MIXED
  task = row // len(y) if mixed else jnp.full(row.shape, t, jnp.int32)
  n = row % len(y) if mixed else row
  x = jax.tree.map(lambda leaf: jnp.asarray(leaf)[n], stream.x)
  if stream.view is not None:
    view, views = stream.view, jax.tree.map(jnp.asarray, stream.views)
    if mixed:
      # One example at a time, each with the parameters of its own task.
      x = jax.tree.map(lambda a: a[:, None], x)
      x = jax.vmap(view)(x, jax.tree.map(lambda v: v[task], views))
      x = jax.tree.map(lambda a: a[:, 0], x)
    else:
      x = view(x, jax.tree.map(lambda v: v[t], views))
  y = y[n]
  if stream.offset is not None:
    y = y + jnp.asarray(stream.offset)[task]
  told = task if 'task_train' in stream.told else jnp.full_like(task, -1)
  return Batch(x, y, real.astype(jnp.float32), told)


def put(stream: Stream, device=None) -> Stream:
  """Moves all arrays of the stream to the device (the default one), once."""
  return jax.device_put(stream, device)
