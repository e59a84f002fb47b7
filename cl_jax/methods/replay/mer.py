"""Meta-experience replay."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax import memory
from cl_jax.compose import named_key
from cl_jax.rng import plain, unrolled
from cl_jax.types import Array, Batch, Method


class MERState(NamedTuple):
  rows: Batch  # [capacity + 1, ...]: a reservoir; the last row takes what is not kept
  seen: Array  # i32[]
  words: Array  # u32[2], the key of the next step's draws


def mer(
  capacity: int = 500,
  draw: int = 9,
  batches: int = 10,
  lr: float = 0.03,
  beta: float = 0.03,
  gamma: float = 1.0,
) -> Method:
  """Learns from examples one by one, and moves only part of the way: that aligns gradients across examples.

  For every example of the stream's batch, `batches` times: `draw` rows from memory and then the example, a
  step of SGD at rate lr for each of them, theta <- theta_0 + beta (theta - theta_0) (Reptile within the
  batch). After them theta <- theta_A + gamma (theta - theta_A) (across batches), and the example is stored.
  Algorithm 6 of the paper ("one big batch", gamma alone) is batches=1, beta=1.

  Riemer et al., ICLR 2019, algorithm 1; official code mattriemer/MER. The run's optimiser is not used: its
  update is replaced. Deviation: the current example comes last as in the paper (first in the code), memory
  rows are distinct.

  Args:
    capacity: slots.
    draw: k - 1, memory rows of a batch.
    batches: s; 10 in the paper.
    lr: alpha; 0.03 in the paper on permuted digits.
    beta: within a batch; 0.03 there.
    gamma: across batches; 1 there.

  State: capacity + 1 rows of the stream, as stored, and 12 bytes. For each example of a step `batches` times
  (draw + 1) forward and backward passes on one row.
  """
  write = memory.reservoir(capacity)

  def init(key, params, batch, fwd):
    blank = lambda a: jnp.zeros((capacity + 1, *a.shape[1:]), a.dtype)  # noqa: E731
    return {}, MERState(jax.tree.map(blank, batch), jnp.int32(0), jax.random.key_data(plain(key)))

  def grads(s, g, params, batch, grad_fn):
    key = unrolled(jax.random.wrap_key_data(s.words))
    slots, seen = write.place(s.seen, batch, named_key(key, 'place'), None)
    valid, rank = memory.arrivals(batch)
    row = lambda tree, i: jax.tree.map(lambda a: a[i][None], tree)  # noqa: E731

    def sgd(theta, one):
      return jax.tree.map(lambda p, d: p - lr * one.w[0] * d, theta, grad_fn(theta, one)[1])

    def example(r, carry):
      start, stored = carry
      own = jax.random.fold_in(key, r)

      def once(i, begin):
        at, w = chosen(write, s.seen + rank[r], jax.random.fold_in(own, i), draw, (r, i))

        def old(j, theta):
          one = row(stored, at[j])
          return sgd(theta, one._replace(w=w[j][None].astype(one.w.dtype)))

        end = sgd(jax.lax.fori_loop(0, draw, old, begin), row(batch, r))
        return jax.tree.map(lambda a, b: a + beta * (b - a), begin, end)

      end = jax.lax.fori_loop(0, batches, once, start)
      end = jax.tree.map(lambda a, b: a + gamma * jnp.where(valid[r], b - a, 0), start, end)
      put = lambda d, a: d.at[slots[r]].set(a[r].astype(d.dtype))  # noqa: E731
      return end, jax.tree.map(put, stored, batch)

    end, stored = jax.lax.fori_loop(0, batch.y.shape[0], example, (params, s.rows))
    return jax.tree.map(jnp.subtract, params, end), s._replace(rows=stored, seen=seen)

  def after(s, params, step, key):
    s = s._replace(words=jax.random.key_data(plain(key)))
    return jax.tree.map(jnp.subtract, step.params, step.grads), s

  return Method(init=init, grads=grads, after=after)


def chosen(write, seen, key, n: int, where):
  """(slots, weights) of the memory rows of one batch; `where` is its (example, number)."""
  del where
  return write.pick(seen, key, n)
