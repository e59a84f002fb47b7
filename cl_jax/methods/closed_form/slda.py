"""Streaming linear discriminant analysis."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.methods.heads.task_head import MINUS_INF
from cl_jax.types import Array, Method


class SLDAState(NamedTuple):
  mean: Array  # f32[C, D]
  count: Array  # f32[C]
  cov: Array  # f32[D, D], shared
  seen: Array  # f32[], examples


def slda(
  classes: int, shrinkage: float = 1e-4, centre_first: bool = True, when: str = 'step'
) -> Method:
  """A Gaussian per class with one covariance for all, updated example by example.

  Hayes & Kanan, CVPR Workshops 2020, "Lifelong machine learning with deep streaming linear
  discriminant analysis", eq. 1-4; official code tyler-hayes/Deep_SLDA. For the t-th example x of class y,
  with d = x - mu_y:
  Sigma <- (t Sigma + t / (t + 1) d d^T) / (t + 1), then mu_y <- mu_y + d / (n_y + 1). Scores are
  x^T L mu_c - mu_c^T L mu_c / 2 with L = ((1 - e) Sigma + e I)^-1. The recursion is computed a batch at a
  time, exactly in the order of the rows.

  Args:
    classes: size of the output layer.
    shrinkage: e.
    centre_first: leave out the first example of a class, for which d = x is not centred. The official code
      adds its outer product; False does the same.
    when: 'step' learns from every batch. 'boundary' learns from the examples of the finished task, each
      once whatever the number of epochs, with the features of the network as it is then (see `ncm`).

  Needs the boundary where `when` says so. State: 4 (C D + D^2 + C + 1) bytes. Freeze the model.
  """
  if when not in ('step', 'boundary'):
    raise UserError(f'slda when={when!r}: choose step or boundary')

  def init(key, params, batch, fwd):
    d = jax.eval_shape(fwd, params, batch).features.shape[-1]
    zero = jnp.zeros(())
    return {}, SLDAState(jnp.zeros((classes, d)), jnp.zeros(classes), jnp.zeros((d, d)), zero)

  def wrap(s, apply):
    def discriminant(variables, batch, tap, train):
      out = apply(variables, batch, tap, train)
      if train:  # learning needs the features only; the solve is for predictions
        return out
      shrunk = (1 - shrinkage) * s.cov + shrinkage * jnp.eye(s.cov.shape[0])
      w = jnp.linalg.solve(shrunk, s.mean.T)  # f32[D, C]
      score = out.features @ w - 0.5 * jnp.sum(s.mean.T * w, axis=0)
      return out._replace(logits=jnp.where(s.count > 0, score, MINUS_INF))

    return discriminant

  def absorb(s, x, b):
    valid = (b.w > 0).astype(x.dtype)
    hot = valid[:, None] * jax.nn.one_hot(b.y, classes)
    earlier = jnp.tril(hot @ hot.T, k=-1)  # [i, j] = 1: j came before i and has its class
    n = s.count[b.y] + earlier.sum(1)  # of its class, before row i
    mean = (s.count[b.y][:, None] * s.mean[b.y] + earlier @ x) / jnp.maximum(n, 1)[:, None]
    d = x - mean
    t = s.seen + jnp.cumsum(valid) - valid
    use = valid * jnp.where(n > 0, 1.0, 0.0 if centre_first else 1.0)
    # (t Sigma_t) grows by t / (t + 1) d d^T and is divided once, at the end.
    scatter = (d * (use * t / (t + 1))[:, None]).T @ d
    total = s.seen + valid.sum()
    cov = (s.seen * s.cov + scatter) / jnp.maximum(total, 1)
    count = s.count + hot.sum(0)
    sums = s.count[:, None] * s.mean + hot.T @ x
    return SLDAState(sums / jnp.maximum(count, 1)[:, None], count, cov, total)

  def after(s, params, step, key):
    return params, absorb(s, step.out.features, step.batch)

  def boundary(s, params, batches, fwd, key):
    one = lambda s, b: (absorb(s, fwd(params, b).features, b), None)  # noqa: E731
    return params, jax.lax.scan(one, s, batches)[0]

  if when == 'step':
    return Method(init=init, wrap=wrap, after=after)
  return Method(init=init, wrap=wrap, boundary=boundary, needs=('boundary',))
