"""Gradient episodic memory."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.linalg import nonnegative_quadratic
from cl_jax.memory import arrivals, last_wins
from cl_jax.types import Array, Batch, Method


class GEMState(NamedTuple):
  rows: Batch  # [tasks * m + 1, ...]: m slots a task, the newest of it; the last row takes what is not kept
  counts: Array  # i32[tasks], rows written
  task: Array  # i32[], finished tasks


def gem(tasks: int, capacity: int = 500, margin: float = 0.5, eps: float = 1e-3) -> Method:
  """Projects the gradient so that it raises the loss on no finished task's memory.

  With G f32[T, P] the gradients on the memories of the finished tasks: if <g, G_k> < 0 for any k,
  g <- g + G^T v,  v = argmin over v >= margin of 1/2 v^T (G G^T + eps I) v + (G g)^T v.

  Lopez-Paz & Ranzato, NeurIPS 2017, eq. 11; official code facebookresearch/GradientEpisodicMemory, whose eps
  and margin these are. The quadratic program is solved inside the compiled step. A task's memory are its
  last capacity // tasks rows; the gradient is over all of them. Deviation: none known.

  Args:
    tasks: number of tasks, the last one included.
    capacity: slots in all.
    margin: lower bound of v: pushes past orthogonality, towards backward transfer; 0.5 in the paper.
    eps: added to the diagonal.

  Needs the boundary. State: capacity + 1 rows as stored, 4 bytes per task, 4 bytes. One more forward and
  backward pass over a task's memory for each finished task per step; what is counted is the last task's step.
  """
  m = capacity // tasks
  if m < 1:
    raise ValueError(f'gem memory of {capacity} slots for {tasks} tasks: give at least {tasks}')

  def init(key, params, batch, fwd):
    blank = lambda a: jnp.zeros((tasks * m + 1, *a.shape[1:]), a.dtype)  # noqa: E731
    return {}, GEMState(jax.tree.map(blank, batch), jnp.zeros(tasks, jnp.int32), jnp.int32(0))

  def grads(s, g, params, batch, grad_fn):
    def one(k, G):
      rows = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, k * m, m), s.rows)
      rows = rows._replace(w=rows.w * (jnp.arange(m) < s.counts[k]))
      return jax.tree.map(lambda all, new: all.at[k].set(new), G, grad_fn(params, rows)[1])

    G = jax.tree.map(lambda a: jnp.zeros((tasks, *a.shape), a.dtype), g)
    # As many rounds as tasks can be finished in training; those of unfinished ones do nothing. So the time of
    # a step can be stated.
    G = jax.lax.fori_loop(
      0, tasks - 1, lambda k, G: jax.lax.cond(k < s.task, one, lambda k, G: G, k, G), G
    )
    flat = [a.reshape(tasks, -1) for a in jax.tree.leaves(G)]
    gram = sum(a @ a.T for a in flat) + eps * jnp.eye(tasks, dtype=flat[0].dtype)
    dots = jnp.asarray(
      sum(a @ b.reshape(-1) for a, b in zip(flat, jax.tree.leaves(g), strict=True))
    )
    past = jnp.arange(tasks) < jnp.minimum(s.task, tasks - 1)
    v = nonnegative_quadratic(gram, dots, margin, past)
    v = jnp.where(jnp.any(past & (dots < 0)), v, 0)
    return jax.tree.map(lambda a, b: a + jnp.tensordot(v, b, 1), g, G), s

  def after(s, params, step, key):
    valid, rank = arrivals(step.batch)
    t = jnp.minimum(s.task, tasks - 1)
    slots = jnp.where(valid, t * m + (s.counts[t] + rank) % m, tasks * m)
    slots = last_wins(slots, tasks * m)
    rows = jax.tree.map(
      lambda d, a: d.at[slots].set(a.astype(d.dtype), mode='promise_in_bounds'), s.rows, step.batch
    )
    return params, s._replace(rows=rows, counts=s.counts.at[t].add(valid.sum(dtype=jnp.int32)))

  def boundary(s, params, batches, fwd, key):
    return params, s._replace(task=s.task + 1)

  return Method(init=init, grads=grads, after=after, boundary=boundary, needs=('boundary',))
