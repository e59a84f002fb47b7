"""Only the classes of the task at hand compete in training, and all classes seen so far at test."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from cl_jax.methods.heads.task_head import MINUS_INF
from cl_jax.types import Array, Method


class CurrentHeadState(NamedTuple):
  seen: Array  # bool[C], classes of which an example has been trained on
  now: Array  # bool[C], those since the last boundary


def current_head(classes: int) -> Method:
  """Masks the logits of earlier and later classes in training, those of unseen classes at test.

  What the methods with prompts and adapters train with ("local cross-entropy"): old outputs are not pushed
  down by new examples. Wang et al., L2P, CVPR 2022, section 4.1; Smith et al., CODA-Prompt, CVPR 2023,
  section 4.3. A task's classes are those of its examples so far, the batch at hand included.

  Args:
    classes: size of the output layer.

  Needs the boundary. State: two bytes per class.
  """

  def init(key, params, batch, fwd):
    none = jnp.zeros(classes, bool)
    return {}, CurrentHeadState(none, none)

  def wrap(s, apply):
    def headed(variables, batch, tap, train):
      out = apply(variables, batch, tap, train)
      active = mark(s.now, batch) if train else s.seen
      return out._replace(logits=jnp.where(active, out.logits, MINUS_INF))

    return headed

  def mark(among, batch):
    return among.at[batch.y].max(batch.w > 0)

  def after(s, params, step, key):
    return params, CurrentHeadState(mark(s.seen, step.batch), mark(s.now, step.batch))

  def boundary(s, params, batches, fwd, key):
    return params, s._replace(now=jnp.zeros_like(s.now))

  return Method(init=init, wrap=wrap, after=after, boundary=boundary, needs=('boundary',))
