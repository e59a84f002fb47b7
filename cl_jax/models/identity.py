"""No model at all: the inputs are features already, as when a frozen backbone's were cached."""

from __future__ import annotations

import jax.numpy as jnp

from cl_jax.models import layers
from cl_jax.types import Model, Out


def identity(classes: int) -> Model:
  """Features f32[B, D] pass through; logits are 0 until a closed-form method puts its own in their place.

  Parameters: none.
  """

  def apply(variables, batch, tap, train):
    return Out(jnp.zeros((batch.x.shape[0], classes)), tap('features', batch.x, 0), {})

  return Model(lambda key, batch: ({}, {}), apply, layers.softmax_cross_entropy)
