"""Riemannian walk."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.fisher import moving
from cl_jax.linalg import normalised, quadratic
from cl_jax.types import Array, Method, Tree


class RWalkState(NamedTuple):
  anchor: Tree  # theta at the last boundary
  importance: Tree  # normalised Fisher + normalised score, as of the last boundary
  fisher: Tree  # running Fisher
  score: Tree  # of finished tasks
  run: Tree  # score of the current task
  squares: Tree  # squared gradients since the last refresh
  descent: Tree  # -gradient * step since the last refresh
  old: Tree  # theta at the last refresh
  steps: Array  # i32[], since the last refresh
  tasks: Array  # i32[], finished


def rwalk(
  coef: float = 1.0, alpha: float = 0.9, every: int = 10, xi: float = 1e-3, add: bool = False
) -> Method:
  """EWC's online Fisher and SI's path, measured in the Riemannian metric and both normalised.

  L = L_task + coef * sum_i (F_i + S_i) (theta_i - theta*_i)^2

  After every `every` steps, with g the task gradient of a batch (this method's penalty left out):
  s_i <- s_i + max(0, -sum g_i dtheta_i / (F_i (theta_i - theta_old,i)^2 + xi)), then
  F_i <- (1 - alpha) F_i + alpha * mean of g_i^2 over these steps. At a boundary the score is averaged with
  the former one, and F and the score are scaled to [0, 1] by their least and largest entries.

  Chaudhry, Dokania, Ajanthan & Torr, ECCV 2018, eq. 6-10 and section 4.3; official code
  facebookresearch/agem. Deviations: the paper's half in the denominator's KL distance is left out, as in the
  official code; the Fisher is refreshed at a boundary as well, so that a task shorter than `every` counts.

  Args:
    coef: lambda.
    alpha: weight of the new Fisher; 0.9 in the official code.
    every: steps between refreshes; 10 in the official code.
    xi: damping; 1e-3 in the official code.
    add: add the average to the former score instead of replacing it, as the official code does; the paper
      replaces it.

  Needs the boundary. State: 8 x parameters + 8 bytes.
  """

  def init(key, params, batch, fwd):
    zeros = jax.tree.map(jnp.zeros_like, params)
    none = jnp.int32(0)
    return {}, RWalkState(params, zeros, zeros, zeros, zeros, zeros, zeros, params, none, none)

  def loss(s, params, batch, out, fwd):
    return coef * quadratic(s.importance, params, s.anchor)

  def refresh(s, params):
    """`s` with what has gathered since the last refresh put into the score and the Fisher."""

    def scored(run, fisher, descent, p, old):
      return run + jnp.maximum(descent / (fisher * jnp.square(p - old) + xi), 0)

    run = jax.tree.map(scored, s.run, s.fisher, s.descent, params, s.old)
    fisher = moving(s.fisher, s.squares, s.steps, alpha)
    zeros = jax.tree.map(jnp.zeros_like, params)
    return s._replace(
      run=run, fisher=fisher, squares=zeros, descent=zeros, old=params, steps=jnp.int32(0)
    )

  def after(s, params, step, key):
    s = jax.lax.cond(s.steps == every, lambda: refresh(s, step.params), lambda: s)
    own = jax.tree.map(lambda w, p, a: 2 * coef * w * (p - a), s.importance, step.params, s.anchor)
    g = jax.tree.map(jnp.subtract, step.grads, own)
    squares = jax.tree.map(lambda sq, g: sq + jnp.square(g), s.squares, g)
    descent = jax.tree.map(
      lambda d, g, new, old: d - g * (new - old), s.descent, g, params, step.params
    )
    return params, s._replace(squares=squares, descent=descent, steps=s.steps + 1)

  def boundary(s, params, batches, fwd, key):
    s = jax.lax.cond(s.steps > 0, lambda: refresh(s, params), lambda: s)

    def joined(former, run):
      mean = jnp.where(s.tasks == 0, run, (former + run) / 2)
      return former + mean if add else mean

    score = jax.tree.map(joined, s.score, s.run)
    importance = jax.tree.map(jnp.add, normalised(s.fisher), normalised(score))
    zeros = jax.tree.map(jnp.zeros_like, params)
    return params, s._replace(
      anchor=params, importance=importance, score=score, run=zeros, old=params, tasks=s.tasks + 1
    )

  return Method(init=init, loss=loss, after=after, boundary=boundary, needs=('boundary',))
