"""L2 transfer: stay near the last solution."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.linalg import quadratic
from cl_jax.types import Array, Method, Tree


class L2State(NamedTuple):
  anchor: Tree  # theta at the last boundary
  on: Array  # f32[], 0 in the first task


def l2(coef: float = 0.01) -> Method:
  """A quadratic penalty around the last task's solution, the same for all parameters.

  L = L_task + coef / 2 * ||theta - theta*||^2 from the second task on

  The baseline of Kirkpatrick et al., PNAS 2017 (figure 2, "L2"), and the training of IMM's "L2-transfer" (Lee
  et al., NeurIPS 2017, section 4.2). Deviation: none known; no official code.

  Args:
    coef: lambda; 0.02 where De Lange et al. 2022 train IMM (0.01 in their code, without the 1/2).

  Needs the boundary. State: 1 x parameters + 4 bytes.
  """

  def init(key, params, batch, fwd):
    return {}, L2State(params, jnp.float32(0))

  def loss(s, params, batch, out, fwd):
    ones = jax.tree.map(jnp.ones_like, params)
    return 0.5 * coef * s.on * quadratic(ones, params, s.anchor)

  def boundary(s, params, batches, fwd, key):
    return params, L2State(params, jnp.float32(1))

  return Method(init=init, loss=loss, boundary=boundary, needs=('boundary',))
