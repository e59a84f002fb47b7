"""Maximally interfered retrieval."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_jax import memory
from cl_jax.linalg import cross_entropy
from cl_jax.types import Method


def mir(
  capacity: int = 500, draw: int = 10, candidates: int = 50, lr: float = 0.1, coef: float = 1.0
) -> Method:
  """Rehearses the stored examples that the coming update would hurt most.

  With theta_v = theta - lr * g, g the gradient on the stream's batch: of `candidates` random rows, the `draw`
  with the largest CE(theta_v) - CE(theta) are learnt from together with the batch: g + coef * g_chosen.

  Aljundi et al., NeurIPS 2019, section 3.1 (ER-MIR, algorithm 1); official code
  optimass/Maximally_Interfered_Retrieval. Reservoir memory; train, then write. Deviation: the paper's MI-2,
  with each stored example's least loss so far, is not offered. Penalties of other methods count in both
  gradients.

  Args:
    capacity: slots.
    draw: rows that are rehearsed.
    candidates: rows that are compared; 50 in the paper.
    lr: of the virtual step; give the optimiser's.
    coef: weight of the chosen rows' gradient.

  State: capacity + 1 + candidates rows of the stream, as stored. Two more forward passes on `candidates`
  rows, one more forward and backward pass on `draw` rows per step.
  """
  if draw > candidates:
    raise ValueError(f'mir draws {draw} of {candidates} candidates: give at least as many')
  write = memory.reservoir(capacity)

  def init(key, params, batch, fwd):
    return {}, memory.create(write, batch, candidates)

  def grads(s, g, params, batch, grad_fn):
    rows = s.draw

    def losses(at):
      (_, out), _ = grad_fn(at, rows)  # the unused gradient is dropped by the compiler
      return cross_entropy(out.logits, rows.y)

    ahead = jax.tree.map(lambda p, d: p - lr * d, params, g)
    harm = jnp.where(rows.w > 0, losses(ahead) - losses(params), -jnp.inf)
    chosen = jax.lax.top_k(harm, draw)[1]
    extra = grad_fn(params, jax.tree.map(lambda a: a[chosen], rows))[1]
    some = coef * (rows.w.sum() > 0)
    return jax.tree.map(lambda a, b: a + some * b, g, extra), s

  def after(s, params, step, key):
    return params, memory.write_then_draw(write, s, step.batch, key)

  return Method(init=init, grads=grads, after=after)
