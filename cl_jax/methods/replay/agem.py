"""Averaged gradient episodic memory."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cl_jax import memory
from cl_jax.types import Method, Tree


class AGEMState(NamedTuple):
  memory: memory.Memory
  finished: Tree  # the writer's state at the last boundary: which rows belong to finished tasks


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
    tasks: > 1 keeps a ring per task and class (domain-incremental streams).

  Needs the boundary (and the task in training where tasks > 1). State: capacity + 1 + draw rows as stored, 8
  bytes per ring. One more forward and backward pass on `draw` rows per step.
  """
  write = memory.ring(capacity, classes, tasks)

  def init(key, params, batch, fwd):
    return {}, AGEMState(memory.create(write, batch, draw), write.init(0))

  def grads(s, g, params, batch, grad_fn):
    ref = grad_fn(params, s.memory.draw)[1]
    dot, norm = jnp.asarray(optax.tree.vdot(g, ref)), jnp.asarray(optax.tree.vdot(ref, ref))
    some = s.memory.draw.w.sum() > 0
    scale = jnp.where(some & (dot < 0), dot / jnp.where(norm > 0, norm, 1.0), 0.0)
    return jax.tree.map(lambda a, r: a - scale * r, g, ref), s

  def after(s, params, step, key):
    new = memory.write_then_draw(write, s.memory, step.batch, key, among=s.finished)
    return params, s._replace(memory=new)

  def boundary(s, params, batches, fwd, key):
    done = s.memory.aux
    return params, AGEMState(memory.draw_again(write, s.memory, key, done), done)

  needs = ('boundary', 'task_train') if tasks > 1 else ('boundary',)
  return Method(init=init, grads=grads, after=after, boundary=boundary, needs=needs)
