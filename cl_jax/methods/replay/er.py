"""Experience replay with a tiny episodic memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_jax import memory, writers
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
    writer: 'reservoir', 'ring', 'class_balanced', 'greedy', 'largest', 'mof' or 'kmeans'; see
      `cl_jax.writers`.
    coef: weight of a memory row relative to a stream row.
    classes, tasks: for the writers that keep classes apart; tasks > 1 keeps those of each task apart too
      (ring, mof, kmeans).

  State: capacity + 1 + draw rows of the stream, as stored, and the writer's.
  """
  write = writers.writer(writer, capacity, classes, tasks)

  def init(key, params, batch, fwd):
    d = jax.eval_shape(fwd, params, batch).features.shape[-1]
    return {}, memory.create(write, batch, draw, d)

  def mix(s, batch):
    old = s.draw._replace(w=coef * s.draw.w)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch, old)

  def after(s, params, step, key):
    f = step.out.features
    return params, memory.write_then_draw(write, s, step.batch, key, features=f)

  needs = ('task_train',) if tasks > 1 else ()
  return Method(init=init, mix=mix, after=after, needs=needs)
