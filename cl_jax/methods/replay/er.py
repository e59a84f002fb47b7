"""Experience replay with a tiny episodic memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_jax import memory
from cl_jax.types import Method


def er(
  capacity: int = 500,
  draw: int = 10,
  writer: str = 'reservoir',
  coef: float = 1.0,
  classes: int = 10,
  tasks: int = 1,
) -> Method:
  """Trains on the stream's batch and a batch from memory together, then stores the stream's batch.

  Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning", algorithm 1: one step on the
  concatenation of both (the mean over all rows). Deviation: none known; the official code
  (facebookresearch/agem) draws the reservoir slot from [0, n) where Vitter's algorithm has [0, n].

  Args:
    capacity: slots in all.
    draw: memory rows per step, drawn without replacement.
    writer: 'reservoir', 'ring' or 'class_balanced'; see `cl_jax.memory`.
    coef: weight of a memory row relative to a stream row.
    classes, tasks: for 'ring' and 'class_balanced'; tasks > 1 keeps a ring per task and class.

  State: capacity + 1 + draw rows of the stream, as stored.
  """
  write = memory.writer(writer, capacity, classes, tasks)

  def init(key, params, batch, fwd):
    return {}, memory.create(write, batch, draw)

  def mix(s, batch):
    old = s.draw._replace(w=coef * s.draw.w)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch, old)

  def after(s, params, step, key):
    return params, memory.write_then_draw(write, s, step.batch, key)

  needs = ('task_train',) if tasks > 1 else ()
  return Method(init=init, mix=mix, after=after, needs=needs)
