"""Synaptic intelligence."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.linalg import quadratic
from cl_jax.masks import path_name, paths
from cl_jax.types import Method, Tree


class SIState(NamedTuple):
  anchor: Tree  # theta at the last boundary
  importance: Tree  # Omega
  path: Tree  # omega, what each parameter has contributed to the current task's descent


def si(
  coef: float = 0.1, xi: float = 0.1, path: str = 'task', clip: bool = True, skip: str = ''
) -> Method:
  """A quadratic penalty weighted by how much each parameter has lowered the loss along its path.

  L = L_task + coef * sum_i Omega_i (theta_i - theta*_i)^2

  omega_i <- omega_i - g_i * (step of theta_i) in every step, and at a boundary
  Omega_i <- Omega_i + max(0, omega_i) / ((theta_i - theta*_i)^2 + xi); omega <- 0, theta* <- theta.

  Zenke, Poole & Ganguli, ICML 2017, eq. 3-5; official code ganguli-lab/pathint. Deviation: none known.

  Args:
    coef: c. 0.1 in the paper; van de Ven & Tolias 2019 use 10 to 5e4 on Split MNIST.
    xi: damping; 0.1 in the paper.
    path: which gradient g is: 'task' without this method's own penalty (the official code), 'total' with
      it (GMvandeVen/continual-learning).
    clip: the max(0, omega) of the official code, which the paper and GMvandeVen/continual-learning leave
      out.
    skip: regular expression, matched against whole paths: parameters without importance, as AR1 leaves its
      output layer and the norms (vlomonaco/ar1-pytorch); '' for none.

  Needs the boundary. State: 3 x parameters.
  """
  if path not in ('task', 'total'):
    raise ValueError(f"si path {path!r}: 'task' or 'total'")

  def init(key, params, batch, fwd):
    if skip and not any(re.fullmatch(skip, p) for p in paths(params)):
      raise UserError(f'si skip {skip!r} matches no parameter that is trained')
    zeros = jax.tree.map(jnp.zeros_like, params)
    return {}, SIState(params, zeros, zeros)

  def loss(s, params, batch, out, fwd):
    return coef * quadratic(s.importance, params, s.anchor)

  def after(s, params, step, key):
    def add(path_, g, omega, anchor, old, new):
      own = 2 * coef * omega * (old - anchor) if path == 'task' else 0.0
      return path_ - (g - own) * (new - old)

    walked = jax.tree.map(add, s.path, step.grads, s.importance, s.anchor, step.params, params)
    return params, s._replace(path=walked)

  def boundary(s, params, batches, fwd, key):
    def add(where, omega, path_, anchor, p):
      if skip and re.fullmatch(skip, path_name(where)):
        return omega
      gain = jnp.maximum(path_, 0) if clip else path_
      return omega + gain / (jnp.square(p - anchor) + xi)

    importance = jax.tree.map_with_path(add, s.importance, s.path, s.anchor, params)
    return params, SIState(params, importance, jax.tree.map(jnp.zeros_like, s.path))

  return Method(init=init, loss=loss, after=after, boundary=boundary, needs=('boundary',))
