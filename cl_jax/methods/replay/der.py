"""Dark experience replay."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_jax import memory
from cl_jax.linalg import cross_entropy, weighted_mean
from cl_jax.methods.heads.task_head import MINUS_INF
from cl_jax.types import Batch, Forward, Method, Out, Tree


def der(capacity: int = 500, draw: int = 32, alpha: float = 0.3) -> Method:
  """Replays what the network said, not what it should have said: it matches stored logits.

  L = L_task + alpha * mean over rows (x', z') from memory and outputs of (h(x') - z')^2

  Buzzega et al., NeurIPS 2020, eq. 6; official code aimagelab/mammoth, whose mean over the outputs is taken
  (the paper has the squared norm). z' are the logits of the step in which x' arrived; the memory is a
  reservoir. Outputs that a head left out then or leaves out now do not count, and the mean is over the others
  (the official code has no such heads). Deviation: replayed images are not augmented. Norm statistics are
  updated by the stream's rows alone.

  Args:
    capacity: slots.
    draw: memory rows per step, drawn without replacement.
    alpha: 0.1 to 1 in the paper.

  State: capacity + 1 + draw rows of the stream as stored, with their 4 C bytes of logits. One more forward
  and backward pass on `draw` rows per step.
  """

  def loss(s, params, batch, out, fwd):
    return alpha * distance(replayed(fwd, params, s.draw), s.draw)

  return dark(loss, capacity, draw, 1)


def dark(loss, capacity: int, draw: int, draws: int) -> Method:
  """A method that keeps logits in a reservoir, with `draws` independent draws of `draw` rows per step."""
  write = memory.reservoir(capacity)

  def init(key, params, batch, fwd):
    z = jax.eval_shape(fwd, params, batch).logits
    rows = with_logits(batch, jnp.zeros(z.shape, z.dtype))
    return {}, memory.create(write, rows, draw * draws)

  def after(s, params, step, key):
    rows = with_logits(step.batch, step.out.logits)
    return params, memory.write_then_draw(write, s, rows, key, draws=draws)

  return Method(init=init, loss=loss, after=after)


def with_logits(batch: Batch, z) -> Batch:
  return batch._replace(x={'x': batch.x, 'logits': z})


def replayed(fwd: Forward, params: Tree, rows: Batch) -> Out:
  return fwd(params, rows._replace(x=rows.x['x']), train=True)


def distance(out: Out, rows: Batch):
  """f32[]: the mean over rows and outputs of (h - z)^2."""
  h, z = out.logits, rows.x['logits']
  both = (h > MINUS_INF / 2) & (z > MINUS_INF / 2)
  squares = jnp.sum(jnp.where(both, jnp.square(h - z), 0), axis=-1)
  return weighted_mean(squares / jnp.maximum(jnp.sum(both, axis=-1), 1), rows.w)


def label_loss(out: Out, rows: Batch):
  """f32[]: the mean cross-entropy of the rows."""
  return weighted_mean(cross_entropy(out.logits, rows.y), rows.w)
