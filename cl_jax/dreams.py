"""Inputs that a network made, for methods that keep no data."""

from __future__ import annotations

import jax.numpy as jnp

from cl_jax.cut import Joined
from cl_jax.errors import UserError
from cl_jax.types import Array, Batch


def scaled(x: Array | Joined) -> Array:
  """Inputs flat and in [0, 1], f32[B, inputs]; what is not uint8 must lie there already."""
  if isinstance(x, Joined):
    raise UserError(
      'what makes inputs of its own does not go with a memory of activations (latent, remind): take one of '
      'the two'
    )
  flat = x.reshape(len(x), -1)
  return flat.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else flat


def stored(flat: Array, like: Array) -> Array:
  """Flat inputs in [0, 1] in the dtype of the stream's inputs `like`, and the shape of one of them."""
  x = jnp.round(255 * flat) if like.dtype == jnp.uint8 else flat
  return x.astype(like.dtype).reshape(len(flat), *like.shape[1:])


NO_CLASS = jnp.iinfo(jnp.int32).max  # beyond every output: what counts classes leaves it out


def unlabelled(x: Array) -> Batch:
  """Rows that all count, of no class and of no task."""
  n = len(x)
  return Batch(x, jnp.full(n, NO_CLASS), jnp.ones(n), jnp.full(n, -1, jnp.int32))
