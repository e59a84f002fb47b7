"""Averaged gradient episodic memory."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cl_jax import memory
from cl_jax.types import Array, Method, Tree


class AGEMState(NamedTuple):
  memory: memory.Memory
  finished: Tree  # the writer's state at the last boundary: which rows belong to finished tasks
  task: Array | None = None  # i32[], finished tasks, where each has a ring of its own


def agem(capacity: int = 500, draw: int = 256, classes: int = 10, tasks: int = 1) -> Method:
  """Removes from the gradient what would increase the loss on a batch from memory.

  g <- g - (g . r / r . r) r  where g . r < 0, with r the gradient on a random batch of past tasks

  Chaudhry et al., ICLR 2019, "Efficient Lifelong Learning with A-GEM", eq. 11; official code
  facebookresearch/agem. The memory is a ring per class; rows of the current task are written but not drawn
  before its boundary.

  Args:
    capacity: slots in all.
    draw: rows of the reference batch.
    classes: number of classes.
    tasks: > 1 keeps a ring per task and class, counted by boundaries: where labels come again, rows of the
      current task would take the places of those that may be drawn.

  Needs the boundary. State: capacity + 1 + draw rows as stored, 8 bytes per ring, with `tasks` 4 bytes. One
  more forward and backward pass on `draw` rows per step.
  """
  write = memory.ring(capacity, classes, tasks)

  def init(key, params, batch, fwd):
    task = jnp.int32(0) if tasks > 1 else None
    return {}, AGEMState(memory.create(write, batch, draw), write.init(0), task)

  def grads(s, g, params, batch, grad_fn):
    ref = grad_fn(params, s.memory.draw)[1]
    dot, norm = jnp.asarray(optax.tree.vdot(g, ref)), jnp.asarray(optax.tree.vdot(ref, ref))
    some = s.memory.draw.w.sum() > 0
    scale = jnp.where(some & (dot < 0), dot / jnp.where(norm > 0, norm, 1.0), 0.0)
    return jax.tree.map(lambda a, r: a - scale * r, g, ref), s

  def after(s, params, step, key):
    batch = step.batch
    if s.task is not None:
      batch = batch._replace(task=jnp.full_like(batch.task, jnp.minimum(s.task, tasks - 1)))
    new = memory.write_then_draw(write, s.memory, batch, key, among=s.finished)
    return params, s._replace(memory=new)

  def boundary(s, params, batches, fwd, key):
    done = s.memory.aux
    task = None if s.task is None else s.task + 1
    return params, AGEMState(memory.draw_again(write, s.memory, key, done), done, task)

  return Method(init=init, grads=grads, after=after, boundary=boundary, needs=('boundary',))
