"""LU, Cholesky and triangular systems in plain operations: IREE has none, and no library to call."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_jax.types import Array


def lu(a: Array) -> tuple[Array, Array, Array]:
  """a[permutation] = l u with partial pivoting, as XLA's LuDecomposition gives it.

  Args:
    a: f32[N, N].

  Returns:
    l below the diagonal and u, f32[N, N]; the row that row j was exchanged with, i32[N]; the permutation.
  """
  n = a.shape[0]
  at = jnp.arange(n, dtype=jnp.int32)

  def column(j, carry):
    a, pivots, order = carry
    best = jnp.argmax(jnp.where(at >= j, jnp.abs(a[:, j]), -1.0)).astype(jnp.int32)
    swapped = jnp.where(at == j, best, jnp.where(at == best, j, at))
    a, order = jnp.take(a, swapped, axis=0), jnp.take(order, swapped)
    below = at > j
    factor = jnp.where(below, a[:, j] / a[j, j], 0.0)
    right = jnp.where(at > j, a[j], 0.0)
    a = a - factor[:, None] * right
    a = jnp.where(below[:, None] & (at == j), factor[:, None], a)
    return a, jnp.where(at == j, best, pivots), order

  return jax.lax.fori_loop(0, n, column, (a, jnp.zeros(n, jnp.int32), at))


def cholesky(a: Array, lower: bool = True) -> Array:
  """l with l l^T = a (or u with u^T u = a), the other half zero; all NaN where a is not positive definite.

  Args:
    a: f32[N, N]; the half that is not asked for is not read.
  """
  a = a if lower else a.T
  n = a.shape[0]
  at = jnp.arange(n)

  def column(j, factor):
    row = jnp.where(at < j, factor[j], 0.0)
    rest = a[:, j] - (factor * row).sum(1)
    new = jnp.where(at >= j, rest / jnp.sqrt(rest[j]), 0.0)
    return jnp.where(at == j, new[:, None], factor)

  factor = jax.lax.fori_loop(0, n, column, jnp.zeros_like(a))
  factor = jnp.where(jnp.isfinite(factor).all(), factor, jnp.nan)
  return factor if lower else factor.T


def triangular(a: Array, b: Array, left: bool, lower: bool, unit: bool, transpose: bool) -> Array:
  """x with a x = b, or x a = b where not `left`; a is triangular, and read as a^T with `transpose`.

  Args:
    a: f32[N, N].
    b: f32[N, M], or f32[M, N] where not `left`.
  """
  if not left:
    return triangular(a, b.T, True, lower, unit, not transpose).T
  if transpose:
    a, lower = a.T, not lower
  n = a.shape[0]
  at = jnp.arange(n)

  def row(t, x):
    i = t if lower else n - 1 - t
    known = (at < i) if lower else (at > i)
    rest = b[i] - (jnp.where(known, a[i], 0.0)[:, None] * x).sum(0)
    return jnp.where((at == i)[:, None], rest if unit else rest / a[i, i], x)

  return jax.lax.fori_loop(0, n, row, jnp.zeros_like(b))
