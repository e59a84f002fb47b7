"""The gradient of a batch a part at a time: activations of a part alone are kept."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.types import Batch, Out, Tree


def accumulated(grad_fn: Callable, n: int) -> Callable:
  """`grad_fn` over n micro-batches one after the other, their gradients added up.

  Micro-batch i has the rows i, i + n, ...: as many of the stream and of a memory as any other. Each counts by
  its share of the weights, so that the weighted mean over rows and what depends on the parameters
  alone (penalties) come out as from the whole batch, up to rounding. Not the same is what looks at a batch as
  a whole: `er_ace`, whose loss is among the classes of the batch and would be another one in every step
  (`experiments.rules` refuses it); norms with statistics of it (these are of a micro-batch, and the new
  running ones the mean of theirs); what counts the classes in it as seen (`seen_head`, `current_head`,
  `ease`), in steps that bring a class for the first time; a method's own mean over rows of unequal
  weights; what the rows of a batch vote for (`l2p`). What a method computes for rows of its own (`der`,
  `rehearsal`) is computed n times.

  Args:
    grad_fn: (params, batch) -> ((loss, Out), gradient).
    n: micro-batches; 1 is `grad_fn` itself.
  """
  if n == 1:
    return grad_fn

  def run(params: Tree, batch: Batch) -> tuple[tuple[jax.Array, Out], Tree]:
    uneven = {a.shape[0] for a in jax.tree.leaves(batch) if a.shape[0] % n}
    if uneven:
      raise UserError(
        f'micro_batches={n} must divide the rows of a batch and those rehearsed; there are {min(uneven)}'
      )
    parts = jax.tree.map(lambda a: a.reshape(-1, n, *a.shape[1:]).swapaxes(0, 1), batch)
    weights = parts.w.sum(1)
    total = weights.sum()
    share = jnp.where(total > 0, weights / jnp.maximum(total, 1e-12), 1 / n)

    def one(sums: tuple, part: tuple) -> tuple[tuple, Out]:
      share, batch = part
      (loss, out), g = grad_fn(params, batch)
      return jax.tree.map(lambda s, a: s + (share * a).astype(s.dtype), sums, (loss, g)), out

    zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    (loss, g), outs = jax.lax.scan(one, zeros, (share, parts))
    rows = jax.tree.map(
      lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:]), outs._replace(stats={})
    )
    stats = jax.tree.map(lambda a: jnp.tensordot(share, a, 1).astype(a.dtype), outs.stats)
    return (loss, rows._replace(stats=stats)), g

  return run
