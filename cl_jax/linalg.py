"""Small numerical pieces that several methods share."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.types import Array, Tree


def weighted_mean(values: Array, w: Array) -> Array:
  """Sum of w * values over the sum of w, both f32[B]; 0 when nothing has weight (all padding).

  Raises:
    ValueError: they are not one number a row: of a language model's tokens rows would weigh positions.
  """
  if jnp.shape(values) not in ((), jnp.shape(w)):
    raise ValueError(f'values {jnp.shape(values)} and weights {jnp.shape(w)} are not one a row')
  return jnp.sum(w * values) / jnp.maximum(jnp.sum(w), 1e-12)


def of_task(count: int | tuple[int, ...], task: Array) -> int | Array:
  """A number that is the same for all tasks, or that of task i32[] where there is one for each."""
  return jnp.asarray(count)[task] if isinstance(count, tuple) else count


def ridge(gram: Array, moment: Array, lam: Array | float) -> Array:
  """(G + lam I)^-1 C by Cholesky; G f32[M, M] symmetric, C f32[M, K]; NaN where G + lam I is not positive."""
  eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
  factor = jax.scipy.linalg.cho_factor(gram + lam * eye)
  return jax.scipy.linalg.cho_solve(factor, moment)


def quadratic(weights: Tree, params: Tree, anchor: Tree) -> Array:
  """f32[]: the sum over all parameters of weight * (parameter - anchor)^2."""
  parts = jax.tree.map(lambda w, p, a: jnp.sum(w * jnp.square(p - a)), weights, params, anchor)
  return jnp.asarray(sum(jax.tree.leaves(parts)))


def normalised(tree: Tree) -> Tree:
  """All entries together scaled to [0, 1]; all 0 where they are equal."""
  leaves = jax.tree.leaves(tree)
  low = jnp.stack([a.min() for a in leaves]).min()
  span = jnp.stack([a.max() for a in leaves]).max() - low
  return jax.tree.map(lambda a: (a - low) / jnp.where(span > 0, span, 1), tree)


def cross_entropy(logits: Array, y: Array) -> Array:
  """-log softmax(logits)[y] of [B, C] and i32[B], f32[B] at least; logits may be -inf for other classes.

  Raises:
    ValueError: there is not one label a row of outputs, as with the tokens of a language model.
  """
  if jnp.ndim(logits) != 2:
    raise ValueError(
      f'one label a row is needed, as of a classifier; the logits are {jnp.shape(logits)}'
    )
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  # A comparison, not a gather: the gradient needs no scatter, and -inf elsewhere does no harm.
  label = y[:, None] == jnp.arange(logits.shape[-1])
  return jax.nn.logsumexp(logits, -1) - jnp.where(label, logits, 0).sum(-1)


def nonnegative_quadratic(P: Array, q: Array, lower: Array | float, on: Array) -> Array:
  """argmin over v >= lower of 1/2 v^T P v + q^T v, for a small positive definite P f32[n, n].

  Coordinate descent (Hildreth 1957) until no coordinate moves by more than rounding, 10,000 sweeps at most.

  Args:
    on: bool[n]; the other coordinates stay 0 and take no part.
  """
  n, tiny = q.shape[0], 8 * jnp.finfo(q.dtype).eps

  def sweep(carry):
    v, _, count = carry

    def one(i, carry):
      v, most = carry
      best = jnp.maximum(v[i] - (P[i] @ v + q[i]) / P[i, i], lower)
      best = jnp.where(on[i], best, 0)
      return v.at[i].set(best), jnp.maximum(most, jnp.abs(best - v[i]))

    v, most = jax.lax.fori_loop(0, n, one, (v, jnp.zeros((), q.dtype)))
    return v, most, count + 1

  def more(carry):
    v, most, count = carry
    return (most > tiny * (1 + jnp.abs(v).max())) & (count < 10_000)

  start = (jnp.where(on, lower, 0).astype(q.dtype), jnp.array(jnp.inf, q.dtype), 0)
  return jax.lax.while_loop(more, sweep, start)[0]


class Moments(NamedTuple):
  """Counts, means and scatter of the features of each class; see `gather`."""

  count: Array  # f32[C]
  mean: Array  # f32[C, D]
  scatter: Array  # f32[C, D, D] or f32[1, D, D] of all classes: sum of (f - mean_y) (f - mean_y)^T


def no_moments(classes: int, width: int, per_class: bool = True) -> Moments:
  """Of no examples."""
  scatter = jnp.zeros((classes if per_class else 1, width, width))
  return Moments(jnp.zeros(classes), jnp.zeros((classes, width)), scatter)


def gather(m: Moments, f: Array, y: Array, w: Array) -> Moments:
  """The moments with more examples, f[N, D] of labels y i32[N]; rows with w = 0 may hold anything.

  Exact for a class that had examples before (Chan, Golub & LeVeque 1983, eq. 2.1).
  """
  on = w > 0
  f = jnp.where(on[:, None], f, 0)
  hot = on[:, None] * jax.nn.one_hot(y, m.count.size, dtype=f.dtype)
  n, count = hot.sum(0), m.count + hot.sum(0)
  own = hot.T @ f / jnp.maximum(n, 1)[:, None]
  shift = own - m.mean
  centred = jnp.where(on[:, None], f - own[y], 0)
  between = m.count * n / jnp.maximum(count, 1)

  def one(args):
    scatter, rows, n, shift, between = args

    def more():
      within = (centred * rows[:, None]).T @ centred
      return scatter + within + between * jnp.outer(shift, shift)

    return jax.lax.cond(n > 0, more, lambda: scatter)  # most classes are not of the task

  if m.scatter.shape[0] == m.count.size:
    scatter = jax.lax.map(one, (m.scatter, hot.T, n, shift, between))
  else:
    scatter = m.scatter + centred.T @ centred + (between[:, None] * shift).T @ shift
  return Moments(count, m.mean + shift * (n / jnp.maximum(count, 1))[:, None], scatter)
