"""Low-rank adaptation in orthogonal subspaces."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_jax.lowrank import bounds, drawn, here, keep, operator, put, select, train_only
from cl_jax.masks import paths
from cl_jax.types import Method


def olora(
  tasks: int,
  rank: int = 8,
  alpha: float = 16.0,
  coef: float = 0.5,
  l2: float = 0.0,
  targets: str = '.*/(q|v)/w',
) -> Method:
  """Gives every task a low-rank update of its own, whose inputs are pushed to be orthogonal to earlier ones'.

  W_t = W + (alpha / r) sum_{i<=t} A_i B_i, of which A_t and B_t are trained on
  L = L_task + coef * sum_W sum_{i<t} sum |A_i^T A_t| + l2 * sum_W (|A_t|^2 + |B_t|^2)

  Wang et al., Findings of EMNLP 2023, eq. 5-8; official code cmnfriend/O-LoRA. The first penalty is the sum
  of the absolute entries, as in the official code (eq. 7 squares them). A ~ U(+-1/sqrt(d_in)), B = 0, so that
  later slots contribute nothing. The factors of other tasks are restored after the update, so they keep their
  exact bits under any optimiser. Deviations: all slots are allocated from the start; no dropout on the input
  of A; `l2` weighs squared norms (the official code's are not squared, its weight is 0 by default).

  Freeze the rest by `learner(frozen=...)`. After more than `tasks` boundaries no slot is trained. With `coef`
  and `l2` 0 it is the baseline without the paper's idea: a LoRA per task above the merger of all earlier
  ones, which are kept apart here; `lowrank.merged` gives the plain weights.

  Args:
    tasks: T, number of slots.
    rank: r.
    alpha: the update is multiplied by alpha / r.
    coef: lambda_1 of the official code.
    l2: its lambda_2.
    targets: regular expression, matched against the whole path of a weight, trained or frozen; stacked
      weights [layers, d_in, d_out] get factors per layer.

  Needs the boundary. State: 4 bytes (and parameters: T r (d_in + d_out) per adapted matrix).
  """

  def init(key, params, batch, fwd):
    def factors(key, stack, d_in, d_out):
      a = bounds(key, (tasks, *stack, d_in, rank))
      return {'a': a, 'b': jnp.zeros((tasks, *stack, rank, d_out))}

    return {'olora': drawn(key, select('olora', targets, params, fwd), factors)}, jnp.int32(0)

  def wrap(t, apply):
    def adapted(w, own):
      return operator(w, train_only(t, own['a']), train_only(t, own['b']), alpha / rank)

    def summed(variables, batch, tap, train):
      return apply(put(variables, 'olora', adapted), batch, tap, train)

    return summed

  def loss(t, params, batch, out, fwd):
    total = jnp.float32(0)
    for path, slots in paths(params['olora']).items():
      now = jnp.take(slots, t, axis=0, mode='fill', fill_value=0)
      total += l2 * jnp.sum(jnp.square(now))
      if path.endswith('/a'):
        overlap = jnp.einsum('t...ir,...is->t...rs', jax.lax.stop_gradient(slots), now)
        earlier = (jnp.arange(tasks) < t).reshape(-1, *[1] * (overlap.ndim - 1))
        total += coef * jnp.sum(jnp.where(earlier, jnp.abs(overlap), 0))
    return total

  def after(t, params, step, key):
    own = keep(step.params['olora'], params['olora'], lambda name, a: here(t, a))
    return {**params, 'olora': own}, t

  def boundary(t, params, batches, fwd, key):
    return params, t + 1

  return Method(
    init=init, wrap=wrap, loss=loss, after=after, boundary=boundary, needs=('boundary',)
  )
