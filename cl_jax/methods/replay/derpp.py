"""Dark experience replay with labels."""

from __future__ import annotations

import jax

from cl_jax.methods.replay.der import dark, distance, label_loss, replayed
from cl_jax.types import Method


def derpp(capacity: int = 500, draw: int = 32, alpha: float = 0.5, beta: float = 0.5) -> Method:
  """Dark experience replay that also learns from the stored labels.

  L = L_task + alpha * mean (h(x') - z')^2 + beta * CE(h(x''), y'') on two independent draws from memory

  Buzzega et al., NeurIPS 2020, eq. 7 (DER++); official code aimagelab/mammoth. See `der` for what is common.

  Args:
    capacity: slots.
    draw: rows of each of the two draws.
    alpha, beta: 0.1 to 1 each in the paper; 0.5 and 0.5 do not diverge.

  State: capacity + 1 + 2 draw rows of the stream as stored, with their 4 C bytes of logits. One more forward
  and backward pass on 2 `draw` rows per step.
  """

  def loss(s, params, batch, out, fwd):
    first = jax.tree.map(lambda a: a[:draw], s.draw)
    second = jax.tree.map(lambda a: a[draw:], s.draw)
    out = replayed(fwd, params, s.draw)._replace(stats={}, aux={})
    one = jax.tree.map(lambda a: a[:draw], out)
    two = jax.tree.map(lambda a: a[draw:], out)
    return alpha * distance(one, first) + beta * label_loss(two, second)

  return dark(loss, capacity, draw, 2)
