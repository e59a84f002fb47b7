"""A covariance per class of frozen features."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.linalg import Moments, gather, no_moments
from cl_jax.methods.heads.task_head import MINUS_INF
from cl_jax.types import Array, Method


class FeCAMState(NamedTuple):
  moments: Moments  # of the transformed features; scatter f32[K, D, D], K = C or 1
  precision: Array  # f32[K, D, D], inverses of the normalised covariances


def fecam(
  classes: int,
  tukey: float = 0.5,
  diagonal: float = 1.0,
  off_diagonal: float = 1.0,
  per_class: bool = True,
) -> Method:
  """Classifies by the Mahalanobis distance to class means, with a covariance per class.

  Goswami et al., NeurIPS 2023, eq. 4-9; official code dipamgoswami/FeCAM. With x = sign(f) |f|^tukey, mean
  mu_c and unbiased covariance S_c of the class's x, V1 and V2 the means of the entries of S_c on and off the
  diagonal: S <- S + diagonal * V1 * I + off_diagonal * V2 * (1 - I), then S_ij / sqrt(S_ii S_jj).
  logit_c = -(u(x) - u(mu_c))^T S_c^-1 (u(x) - u(mu_c)) with u(a) = a / |a|.

  Learns at the boundary, from each example of the finished task once, with the features of the network as it
  is then; in training the model's own logits stay. Any order gives the same result, also where classes come
  back. Deviations: signed powers, since features need not be positive; the mean is of the transformed
  features (official code: the transformed mean); V2 counts entries that are 0; the first task is classified
  like the others (official code: Euclidean); a class of one example has the unit matrix.

  Args:
    classes: size of the output layer.
    tukey: exponent.
    diagonal, off_diagonal: gamma_1, gamma_2 of the shrinkage.
    per_class: False has one covariance for all classes: the scatter within classes over the number of
      examples less that of classes (for classes of equal size the mean of theirs), shrunk and normalised
      alike (official code: neither class means are subtracted nor is it normalised).

  Needs the boundary. State: 4 (C (D + 1) + 2 K D^2) bytes, K = C or, with one covariance, 1. Freeze the
  model, or train it in the first session only.
  """

  def transform(f):
    return jnp.sign(f) * jnp.abs(f) ** tukey

  def unit(a):
    return a / jnp.maximum(jnp.linalg.norm(a, axis=-1, keepdims=True), 1e-12)

  def init(key, params, batch, fwd):
    d = jax.eval_shape(fwd, params, batch).features.shape[-1]
    moments = no_moments(classes, d, per_class)
    return {}, FeCAMState(moments, jnp.zeros_like(moments.scatter))

  def wrap(s, apply):
    def nearest(variables, batch, tap, train):
      out = apply(variables, batch, tap, train)
      if train:
        return out
      x, mean = unit(transform(out.features)), unit(s.moments.mean)

      def distance(mean, precision):
        d = x - mean
        return jnp.sum((d @ precision) * d, axis=-1)

      if per_class:
        far = jax.lax.map(lambda a: distance(*a), (mean, s.precision))
      else:
        far = jax.lax.map(lambda m: distance(m, s.precision[0]), mean)
      return out._replace(logits=jnp.where(s.moments.count > 0, -far.T, MINUS_INF))

    return nearest

  def inverse(cov):
    d = cov.shape[0]
    eye = jnp.eye(d, dtype=cov.dtype)
    v1 = jnp.trace(cov) / d
    v2 = (cov.sum() - jnp.trace(cov)) / max(d * (d - 1), 1)
    cov = cov + diagonal * v1 * eye + off_diagonal * v2 * (1 - eye)
    sd = jnp.sqrt(jnp.maximum(jnp.diagonal(cov), 0))
    size = jnp.outer(sd, sd)
    cov = jnp.where(size > 0, cov / jnp.where(size > 0, size, 1), eye)
    # Without shrinkage few examples leave it singular; the default tolerance would cut into it with it.
    return jnp.linalg.pinv(cov, rtol=d * jnp.finfo(cov.dtype).eps, hermitian=True)

  def boundary(s, params, batches, fwd, key):
    x = jax.lax.map(lambda b: transform(fwd(params, b).features), batches)
    m = gather(s.moments, x.reshape(-1, x.shape[-1]), batches.y.reshape(-1), batches.w.reshape(-1))
    if per_class:
      new, free = m.count > s.moments.count, m.count - 1
    else:
      new, free = jnp.array([True]), (m.count.sum() - (m.count > 0).sum())[None]

    def one(args):
      new, scatter, free, old = args
      return jax.lax.cond(new, lambda: inverse(scatter / jnp.maximum(free, 1)), lambda: old)

    precision = jax.lax.map(one, (new, m.scatter, free, s.precision))
    return params, FeCAMState(m, precision)

  return Method(init=init, wrap=wrap, boundary=boundary, needs=('boundary',))
