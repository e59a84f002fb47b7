"""Small numerical pieces that several methods share."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_jax.types import Array


def weighted_mean(values: Array, w: Array) -> Array:
  """Sum of w * values over the sum of w, both f32[B]; 0 when nothing has weight (all padding)."""
  return jnp.sum(w * values) / jnp.maximum(jnp.sum(w), 1e-12)


def ridge(gram: Array, moment: Array, lam: Array | float) -> Array:
  """(G + lam I)^-1 C by Cholesky; G f32[M, M] symmetric, C f32[M, K]; NaN where G + lam I is not positive."""
  eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
  factor = jax.scipy.linalg.cho_factor(gram + lam * eye)
  return jax.scipy.linalg.cho_solve(factor, moment)
