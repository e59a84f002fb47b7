"""Experience replay with an asymmetric cross-entropy."""

from __future__ import annotations

import jax.numpy as jnp

from cl_jax import memory
from cl_jax.linalg import cross_entropy, weighted_mean
from cl_jax.methods.heads.task_head import MINUS_INF
from cl_jax.types import Method

ABSENT = MINUS_INF / 2  # as little as what a head leaves out, and told apart from it


def er_ace(capacity: int = 500, draw: int = 10, coef: float = 1.0) -> Method:
  """Lets new examples compete among the classes of their own batch only, and old ones among all.

  L = CE(stream; classes in the batch) + coef * CE(memory; all classes)

  Caccia et al., ICLR 2022, eq. 4: new classes do not push the old ones' representations around. All classes
  are those that the head lets compete: with `seen_head` the paper's, old and current; without a head every
  output, as in the official code, pclucas14/AML, which has no other. aimagelab/mammoth begins with the second
  task, which has no task-free form. Reservoir memory; train, then write. Norm statistics are updated by the
  stream's rows alone. For a plain cross-entropy, and beside no method that reads logits of a training step,
  which hold the batch's classes alone.

  Args:
    capacity: slots.
    draw: memory rows per step, drawn without replacement.
    coef: weight of the memory's loss; 1 in the paper.

  State: capacity + 1 + draw rows of the stream, as stored. One more forward and backward pass on `draw` rows
  per step.
  """
  write = memory.reservoir(capacity)

  def init(key, params, batch, fwd):
    return {}, memory.create(write, batch, draw)

  def wrap(s, apply):
    def asymmetric(variables, batch, tap, train):
      out = apply(variables, batch, tap, train)
      if not train:
        return out
      present = jnp.zeros(out.logits.shape[-1], bool).at[batch.y].max(batch.w > 0)
      logits = jnp.where(present, out.logits, ABSENT)
      return out._replace(logits=logits, aux={**out.aux, 'er_ace': out.logits})

    return asymmetric

  def loss(s, params, batch, out, fwd):
    out = fwd(params, s.draw, train=True)
    left_out = out.logits < (MINUS_INF + ABSENT) / 2  # by the head
    z = jnp.where(left_out, MINUS_INF, out.aux['er_ace'])
    return coef * weighted_mean(cross_entropy(z, s.draw.y), s.draw.w)

  def after(s, params, step, key):
    return params, memory.write_then_draw(write, s, step.batch, key)

  return Method(init=init, wrap=wrap, loss=loss, after=after)
