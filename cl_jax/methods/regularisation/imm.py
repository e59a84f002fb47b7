"""Incremental moment matching."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax import fisher
from cl_jax.masks import nest, paths
from cl_jax.types import Array, Method, Tree

# A frozen leaf of this name tells `wrap` to leave the trained parameters alone.
TRAINED = 'imm/trained'


class IMMState(NamedTuple):
  weighted: Tree  # {path: sum over finished tasks of F_t theta_t}; F_t = 1 for the mean
  total: Tree  # {path: sum over finished tasks of F_t}; empty for the mean
  tasks: Array  # i32[], finished


def imm(
  mode: str = 'mean', labels: str = 'sampled', damping: float = 1e-8, head: str = 'head/.*'
) -> Method:
  """Trains on from the last solution and predicts with a merger of the solutions of all finished tasks.

  'mean': theta = 1/T sum_t theta_t. 'mode': theta = sum_t F_t theta_t / sum_t F_t, with F_t the diagonal
  Fisher information of task t at theta_t.

  Lee et al., NeurIPS 2017, eq. 3-6, equal mixing ratios; official code btjhjeon/IMM_tensorflow. Chain it with
  `l2` ("L2-transfer") or start from the last solution alone ("weight-transfer"). The output layer is not
  merged: give every task its own outputs by a `task_head`. Deviations: the sums are kept instead of the T
  models, which gives the same merger in bytes that do not grow; norm statistics are the latest. Inside
  a task predictions come from what was merged at the last boundary.

  Args:
    mode: 'mean' or 'mode'.
    labels: of the Fisher information; see `cl_jax.fisher.diagonal`.
    damping: added to every F_t.
    head: pattern of the parameters that are not merged.

  Needs the boundary. State: 1 x parameters ('mode': 2 x) without the head + 4 bytes.
  """
  if mode not in ('mean', 'mode'):
    raise ValueError(f"imm mode {mode!r}: 'mean' or 'mode'")

  def merged_part(params):
    return {p: a for p, a in paths(params).items() if not re.fullmatch(head, p)}

  def init(key, params, batch, fwd):
    zeros = jax.tree.map(jnp.zeros_like, merged_part(params))
    return {}, IMMState(zeros, zeros if mode == 'mode' else {}, jnp.int32(0))

  def wrap(s, apply):
    def merged(variables, batch, tap, train):
      if train or TRAINED in variables:
        return apply({k: v for k, v in variables.items() if k != TRAINED}, batch, tap, train)
      leaves = paths(variables)
      for path, weighted in s.weighted.items():
        total = s.total[path] if mode == 'mode' else s.tasks
        mean = weighted / jnp.where(s.tasks > 0, total, 1)
        leaves[path] = jnp.where(s.tasks > 0, mean, leaves[path]).astype(leaves[path].dtype)
      return apply(nest(leaves), batch, tap, train)

    return merged

  def boundary(s, params, batches, fwd, key):
    now = merged_part(params)
    if mode == 'mean':
      weighted = jax.tree.map(jnp.add, s.weighted, now)
      return params, s._replace(weighted=weighted, tasks=s.tasks + 1)
    own = fwd._replace(frozen={**fwd.frozen, TRAINED: jnp.zeros(())})
    new = merged_part(fisher.diagonal(own, params, batches, key, labels))
    new = jax.tree.map(lambda f: f + damping, new)
    weighted = jax.tree.map(lambda w, f, p: w + f * p, s.weighted, new, now)
    total = jax.tree.map(jnp.add, s.total, new)
    return params, IMMState(weighted, total, s.tasks + 1)

  return Method(init=init, wrap=wrap, boundary=boundary, needs=('boundary',))
