"""Only classes seen so far compete: the class-incremental head that grows with the stream."""

from __future__ import annotations

import jax.numpy as jnp

from cl_jax.methods.heads.task_head import MINUS_INF
from cl_jax.types import Method


def seen_head(classes: int) -> Method:
  """Masks the logits of classes of which no example has been trained on.

  In training the labels of the batch at hand count as seen. Source: the active units of van de Ven &
  Tolias 2019, section 3 ("Class-IL"), who switch a task's classes on at its beginning; here a class
  is switched on by its first example, so that no boundary is needed.

  Args:
    classes: size of the output layer.

  State: one byte per class.
  """

  def init(key, params, batch, fwd):
    return {}, jnp.zeros(classes, bool)

  def wrap(seen, apply):
    def headed(variables, batch, tap, train):
      out = apply(variables, batch, tap, train)
      active = mark(seen, batch) if train else seen
      return out._replace(logits=jnp.where(active, out.logits, MINUS_INF))

    return headed

  def mark(seen, batch):
    return seen.at[batch.y].max(batch.w > 0)

  def after(seen, params, step, key):
    return params, mark(seen, step.batch)

  return Method(init=init, wrap=wrap, after=after)
