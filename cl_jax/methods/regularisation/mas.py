"""Memory aware synapses."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax import fisher
from cl_jax.linalg import quadratic
from cl_jax.types import Method, Tree


class MASState(NamedTuple):
  anchor: Tree  # theta at the last boundary
  importance: Tree  # Omega


def mas(coef: float = 1.0) -> Method:
  """A quadratic penalty weighted by how strongly each parameter moves the outputs; it needs no labels.

  L = L_task + coef * sum_i Omega_i (theta_i - theta*_i)^2, and at a boundary, over the finished task's
  inputs, Omega_i <- Omega_i + mean_x |d ||f(x)||^2 / d theta_i|, theta* <- theta

  Aljundi et al., ECCV 2018, eq. 2-4; official code rahafaljundi/MAS-Memory-Aware-Synapses. f are the logits.
  Deviation: the gradient is per example as in the paper; the official code takes absolute values of
  gradients summed over a batch, which is smaller by cancellation.

  Args:
    coef: lambda. 1 in the paper; the survey of De Lange et al. 2022 starts its search at 3.

  Needs the boundary. State: 2 x parameters.
  """

  def init(key, params, batch, fwd):
    return {}, MASState(params, jax.tree.map(jnp.zeros_like, params))

  def loss(s, params, batch, out, fwd):
    return coef * quadratic(s.importance, params, s.anchor)

  def boundary(s, params, batches, fwd, key):
    new = fisher.sensitivity(fwd, params, batches)
    return params, MASState(params, jax.tree.map(jnp.add, s.importance, new))

  return Method(init=init, loss=loss, boundary=boundary, needs=('boundary',))
