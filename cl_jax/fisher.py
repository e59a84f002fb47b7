"""The diagonal Fisher information from PER-EXAMPLE gradients, in one backward pass a batch where possible.

The square of a batch's mean gradient is not the mean of its squares (a mistake in many ports). For a dense
layer y = x w + b the sum over examples of the squared gradients has a closed form, (x^2)^T (d^2) and the
column sums of d^2, where d is the gradient with respect to y; so one backward pass over the batch does it,
with the cotangent of w replaced by that form. Where an example has several rows (tokens), they add up
before the square.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from cl_jax.types import Array, Batch, Forward, Tree

LABELS = ('exact', 'sampled', 'empirical', 'predicted')


@partial(jax.tree_util.register_dataclass, data_fields=['a'], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Squared:
  """A parameter whose cotangent is the sum over examples of its squared per-example gradients.

  It knows three ways to enter a network, once: `x @ w`, `y + b` and `h * scale`, where the first axis of x,
  y and h is the example. Any other use is a TypeError. Stacked leaves are sliced by `scan` like arrays.
  """

  a: Array

  def __rmatmul__(self, x: Array) -> Array:
    return squared_matmul(x, self._with(2, x))

  def __radd__(self, y: Array) -> Array:
    return squared_add(y, self._with(1, y))

  def __rmul__(self, h: Array) -> Array:
    return squared_scale(h, self._with(1, h))

  def _with(self, ndim: int, x: Array) -> Array:
    if self.a.ndim != ndim or x.ndim < 2:
      raise TypeError(f'no closed form for a parameter {self.a.shape} with {x.shape}')
    return self.a


@jax.custom_vjp
def squared_matmul(x, w):
  return x @ w


def _matmul_bwd(saved, d):
  x, w = saved
  if x.ndim == 2:
    return d @ w.T, jnp.square(x).T @ jnp.square(d)

  def add(total, row):  # an outer product per example, one at a time
    return total + jnp.square(row[0].T @ row[1]), None

  total, _ = jax.lax.scan(add, jnp.zeros_like(w), (rows_of(x), rows_of(d)))
  return d @ w.T, total


squared_matmul.defvjp(lambda x, w: (x @ w, (x, w)), _matmul_bwd)


@jax.custom_vjp
def squared_add(y, b):
  return y + b


squared_add.defvjp(lambda y, b: (y + b, None), lambda _, d: (d, sum_of_squares(d)))


@jax.custom_vjp
def squared_scale(h, scale):
  return h * scale


def _scale_bwd(saved, d):
  h, scale = saved
  return d * scale, sum_of_squares(d * h)


squared_scale.defvjp(lambda h, scale: (h * scale, (h, scale)), _scale_bwd)


def rows_of(a: Array) -> Array:
  """[B, ..., D] -> [B, rows, D]."""
  return a.reshape(a.shape[0], -1, a.shape[-1])


def sum_of_squares(d: Array) -> Array:
  """[B, ..., D] -> [D]: summed over the rows of an example, squared, summed over examples."""
  return jnp.square(rows_of(d).sum(1)).sum(0)


def diagonal(
  fwd: Forward,
  params: Tree,
  batches: Batch,
  key: Array,
  labels: str = 'exact',
) -> Tree:
  """E_x E_y [(d log p(y|x) / d params)^2], like `params`, in inference mode.

  Args:
    fwd: the forward pass.
    params: where; nested dicts.
    batches: leaves [S, B, ...]; padding (w = 0) does not count.
    key: for the sampled labels.
    labels: 'exact' weights every label by its predicted probability (C backward passes), 'sampled' draws one
      from it, 'empirical' takes the true one, 'predicted' the most probable one (not a Fisher information;
      van de Ven & Tolias 2019 use it, and their values of lambda belong to it).

  Returns:
    The mean over examples. Uses the closed form where every parameter enters once, as `x @ w`, `y + b` or
    `h * scale`, and one gradient per example otherwise; the results are equal.
  """
  if labels not in LABELS:
    raise ValueError(f'fisher labels {labels!r}: one of {LABELS}')
  dense = is_dense(fwd, params, jax.tree.map(lambda a: a[0], batches))
  squares = dense_squares if dense else row_squares

  def one_batch(total, inputs):
    batch, key = inputs
    logp = lambda p: jax.nn.log_softmax(fwd(p, batch).logits)  # noqa: E731
    now = logp(params)

    def pass_for(y, weight):
      """Sum over rows of weight * (d log p(y) / d params)^2: the factor goes in as its root."""
      return squares(fwd, params, batch, y, jnp.sqrt(weight * batch.w))

    if labels == 'empirical':
      new = pass_for(batch.y, jnp.ones_like(batch.w))
    elif labels == 'predicted':
      new = pass_for(now.argmax(-1), jnp.ones_like(batch.w))
    elif labels == 'sampled':
      new = pass_for(jax.random.categorical(key, now), jnp.ones_like(batch.w))
    else:
      classes = now.shape[-1]

      def add(total, c):
        part = pass_for(jnp.full_like(batch.y, c), jnp.exp(now[:, c]))
        return jax.tree.map(jnp.add, total, part), None

      new, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), jnp.arange(classes))
    return jax.tree.map(jnp.add, total, new), None

  steps = batches.y.shape[0]
  zeros = jax.tree.map(jnp.zeros_like, params)
  total, _ = jax.lax.scan(one_batch, zeros, (batches, jax.random.split(key, steps)))
  count = jnp.maximum(batches.w.sum(), 1.0)
  return jax.tree.map(lambda a: a / count, total)


def is_dense(fwd: Forward, params: Tree, batch: Batch) -> bool:
  """Whether there is a closed form for every parameter (decided by tracing); see `Squared`."""
  if any(a.ndim not in (1, 2, 3) for a in jax.tree.leaves(params)):
    return False  # convolutions
  try:
    jax.eval_shape(lambda p, b: fwd(squared(p), b).logits, params, batch)
  except (TypeError, AttributeError, NotImplementedError, LookupError):
    return False  # a parameter is used in another way: the operator refused
  return True


def squared(params: Tree) -> Tree:
  return jax.tree.map(Squared, params)


def dense_squares(fwd: Forward, params: Tree, batch: Batch, y: Array, root: Array) -> Tree:
  def total(p):
    logp = jax.nn.log_softmax(fwd(squared(p), batch).logits)
    return jnp.sum(root * jnp.take_along_axis(logp, y[:, None], 1)[:, 0])

  return jax.grad(total)(params)


def row_squares(fwd: Forward, params: Tree, batch: Batch, y: Array, root: Array) -> Tree:
  def one(total, inputs):
    row, y, root = inputs
    single = jax.tree.map(lambda a: a[None], row)
    nll: Callable = lambda p: root * jax.nn.log_softmax(fwd(p, single).logits)[0, y]  # noqa: E731
    return jax.tree.map(lambda t, g: t + jnp.square(g), total, jax.grad(nll)(params)), None

  zeros = jax.tree.map(jnp.zeros_like, params)
  return jax.lax.scan(one, zeros, (batch, y, root))[0]
