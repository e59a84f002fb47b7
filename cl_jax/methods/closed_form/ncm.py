"""Nearest class mean."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.methods.heads.task_head import MINUS_INF
from cl_jax.types import Array, Method


class NCMState(NamedTuple):
  total: Array  # f32[C, D]
  count: Array  # f32[C]


def ncm(classes: int, metric: str = 'cosine') -> Method:
  """Classifies by the nearest mean of the frozen features of each class.

  Mensink et al., TPAMI 2013; as the head of a pretrained model SimpleCIL (Zhou et al., IJCV 2024, eq. 4-5),
  which uses the cosine. Learns in one pass, any order gives the same result.

  Args:
    classes: size of the output layer.
    metric: 'cosine' or 'euclidean' (logits are minus half the squared distance).

  State: 4 C (D + 1) bytes. Freeze the model: a moving backbone would leave the means behind.
  """
  if metric not in ('cosine', 'euclidean'):
    raise ValueError(f'ncm metric {metric!r}: cosine or euclidean')

  def init(key, params, batch, fwd):
    width = jax.eval_shape(fwd, params, batch).features.shape[-1]
    return {}, NCMState(jnp.zeros((classes, width)), jnp.zeros(classes))

  def wrap(s, apply):
    def nearest(variables, batch, tap, train):
      out = apply(variables, batch, tap, train)
      f, mean = out.features, s.total / jnp.maximum(s.count, 1)[:, None]
      if metric == 'cosine':
        unit = lambda a: a / jnp.maximum(jnp.linalg.norm(a, axis=-1, keepdims=True), 1e-12)  # noqa: E731
        score = unit(f) @ unit(mean).T
      else:
        score = f @ mean.T - 0.5 * jnp.sum(mean**2, -1) - 0.5 * jnp.sum(f**2, -1, keepdims=True)
      return out._replace(logits=jnp.where(s.count > 0, score, MINUS_INF))

    return nearest

  def after(s, params, step, key):
    b = step.batch
    hot = b.w[:, None] * jax.nn.one_hot(b.y, classes)
    return params, NCMState(s.total + hot.T @ step.out.features, s.count + hot.sum(0))

  return Method(init=init, wrap=wrap, after=after)
