"""EWC++: elastic weight consolidation with a running Fisher."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.fisher import moving
from cl_jax.linalg import normalised, quadratic
from cl_jax.types import Array, Method, Tree


class EWCPPState(NamedTuple):
  anchor: Tree  # theta at the last boundary
  importance: Tree  # normalised Fisher, as of the last boundary
  fisher: Tree  # running Fisher
  squares: Tree  # squared gradients since the last refresh
  steps: Array  # i32[], since the last refresh


def ewcpp(coef: float = 1.0, alpha: float = 0.9, every: int = 10) -> Method:
  """EWC whose Fisher is a moving average over training, so that no pass over a task's data is needed.

  L = L_task + coef * sum_i F_i (theta_i - theta*_i)^2

  With g the task gradient of a batch (this method's penalty left out), after every `every` steps
  F_i <- (1 - alpha) F_i + alpha * mean of g_i^2 over these steps. At a boundary the anchor becomes theta, and
  F, scaled to [0, 1] by its least and largest entries, becomes the weight of the penalty.

  Squares of BATCH gradients: near a solution they are far smaller than the per-example Fisher of `ewc`, and
  with alpha 0.9 almost only the last `every` batches count. This is what the EWC rows of Chaudhry et al. 2019
  (arXiv:1902.10486) were made with.

  Chaudhry, Dokania, Ajanthan & Torr, ECCV 2018, section 4.1; official code facebookresearch/agem (method
  EWC). Deviation: the Fisher is refreshed at a boundary as well, so that a task shorter than `every` counts.

  Args:
    coef: lambda; there is no 1/2, as in the official code.
    alpha: weight of the new Fisher; 0.9 in the official code.
    every: steps between refreshes; 10 in the official code.

  Needs the boundary. State: 4 x parameters + 4 bytes.
  """

  def init(key, params, batch, fwd):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return {}, EWCPPState(params, zeros, zeros, zeros, jnp.int32(0))

  def loss(s, params, batch, out, fwd):
    return coef * quadratic(s.importance, params, s.anchor)

  def refresh(s):
    fisher = moving(s.fisher, s.squares, s.steps, alpha)
    return s._replace(
      fisher=fisher, squares=jax.tree.map(jnp.zeros_like, fisher), steps=jnp.int32(0)
    )

  def after(s, params, step, key):
    s = jax.lax.cond(s.steps == every, refresh, lambda s: s, s)

    def add(squares, g, weight, p, anchor):
      return squares + jnp.square(g - 2 * coef * weight * (p - anchor))

    squares = jax.tree.map(add, s.squares, step.grads, s.importance, step.params, s.anchor)
    return params, s._replace(squares=squares, steps=s.steps + 1)

  def boundary(s, params, batches, fwd, key):
    s = jax.lax.cond(s.steps > 0, refresh, lambda s: s, s)
    return params, s._replace(anchor=params, importance=normalised(s.fisher))

  return Method(init=init, loss=loss, after=after, boundary=boundary, needs=('boundary',))
