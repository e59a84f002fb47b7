"""Importances from PER-EXAMPLE gradients, in one backward pass a batch where possible.

The square of a batch's mean gradient is not the mean of its squares (a mistake in many ports). For a dense
layer y = x w + b the sum over examples of the squared gradients has a closed form, (x^2)^T (d^2) and the
column sums of d^2, where d is the gradient with respect to y; so one backward pass over the batch does it,
with the cotangent of w replaced by that form. Absolute values do as well as squares. Where an example has
several rows (tokens), they add up before the square.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.methods.heads.task_head import MINUS_INF
from cl_jax.models import language
from cl_jax.types import Array, Batch, Forward, Tree

LABELS = ('exact', 'sampled', 'empirical', 'predicted')


@partial(jax.tree_util.register_dataclass, data_fields=['a'], meta_fields=['measure'])
@dataclasses.dataclass(frozen=True)
class PerExample:
  """A parameter whose cotangent is the sum over examples of `measure(per-example gradient)`.

  `measure` is elementwise and multiplicative: `jnp.square` or `jnp.abs`. The parameter knows three ways to
  enter a network, once: `x @ w`, `y + b` and `h * scale`, where the first axis of x, y and h is the example.
  Any other use is a TypeError. Stacked leaves are sliced by `scan` like arrays.
  """

  a: Array
  measure: Callable

  def __rmatmul__(self, x: Array) -> Array:
    return matmul(self.measure, x, self._with(2, x))

  def __radd__(self, y: Array) -> Array:
    return add(self.measure, y, self._with(1, y))

  def __rmul__(self, h: Array) -> Array:
    return scaled(self.measure, h, self._with(1, h))

  def _with(self, ndim: int, x: Array) -> Array:
    if self.a.ndim != ndim or x.ndim < 2:
      raise TypeError(f'no closed form for a parameter {self.a.shape} with {x.shape}')
    return self.a


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def matmul(measure, x, w):
  return x @ w


def _matmul_bwd(measure, saved, d):
  x, w = saved
  if x.ndim == 2:
    return d @ w.T, measure(x).T @ measure(d)

  def one(total, row):  # an outer product per example, one at a time
    return total + measure(jnp.matmul(row[0].T, row[1], preferred_element_type=total.dtype)), None

  # In f32: a sum over hundreds of examples has no room in the 8 bits of a bfloat16.
  start = jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32))
  total, _ = jax.lax.scan(one, start, (rows_of(x), rows_of(d)))
  return d @ w.T, total.astype(w.dtype)


matmul.defvjp(lambda measure, x, w: (x @ w, (x, w)), _matmul_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def add(measure, y, b):
  return y + b


add.defvjp(lambda measure, y, b: (y + b, None), lambda measure, _, d: (d, summed(measure, d)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def scaled(measure, h, scale):
  return h * scale


def _scaled_bwd(measure, saved, d):
  h, scale = saved
  return d * scale, summed(measure, d * h)


scaled.defvjp(lambda measure, h, scale: (h * scale, (h, scale)), _scaled_bwd)


def rows_of(a: Array) -> Array:
  """[B, ..., D] -> [B, rows, D]."""
  return a.reshape(a.shape[0], -1, a.shape[-1])


def summed(measure: Callable, d: Array) -> Array:
  """[B, ..., D] -> [D]: summed over the rows of an example, measured, summed over examples."""
  return measure(rows_of(d).sum(1)).sum(0)


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
  first = jax.tree.map(lambda a: a[0], batches)
  dense = is_dense(fwd, params, first)
  if jax.eval_shape(fwd, params, first).logits.ndim > 2:
    if labels != 'empirical':
      raise UserError(
        f'labels={labels!r} are those of a classifier; a language model has the tokens it learns from '
        "alone: labels='empirical'"
      )
    return _of_text(fwd, params, batches, key, dense)

  def value(out, batch, y, root):
    logp = jax.nn.log_softmax(out.logits)
    return root * jnp.take_along_axis(logp, y[:, None], 1)[:, 0]

  def one_batch(total, inputs):
    batch, key = inputs
    logp = lambda p: jax.nn.log_softmax(fwd(p, batch).logits)  # noqa: E731
    now = logp(params)

    def pass_for(y, weight):
      """Sum over rows of weight * (d log p(y) / d params)^2: the factor goes in as its root."""
      root = jnp.sqrt(weight * batch.w)
      return gradient_sizes(fwd, params, batch, value, jnp.square, dense, y, root)

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

  return mean_over_examples(one_batch, params, batches, key)


def moving(former: Tree, squares: Tree, steps: Array, alpha: float) -> Tree:
  """A running Fisher: (1 - alpha) F + alpha / steps * the sum of squared batch gradients of `steps` steps."""
  return jax.tree.map(lambda f, sq: (1 - alpha) * f + alpha * sq / steps, former, squares)


def _of_text(fwd: Forward, params: Tree, batches: Batch, key: Array, dense: bool) -> Tree:
  """The empirical one of a language model: log p of a row is the mean over its tokens, as its loss is."""

  def value(out, batch, root):
    return -root * language.loss(out, batch)

  def one_batch(total, inputs):
    batch = inputs[0]
    root = jnp.sqrt(batch.w)
    new = gradient_sizes(fwd, params, batch, value, jnp.square, dense, root)
    return jax.tree.map(jnp.add, total, new), None

  return mean_over_examples(one_batch, params, batches, key)


def sensitivity(fwd: Forward, params: Tree, batches: Batch) -> Tree:
  """E_x |d ||f(x)||^2 / d params| with f the logits, like `params`, in inference mode; labels are not used.

  Aljundi et al., ECCV 2018 (MAS), eq. 2-3; per example as in the paper (the official code takes the
  gradient of a batch). Outputs that a head leaves out do not count.
  """
  dense = is_dense(fwd, params, jax.tree.map(lambda a: a[0], batches))

  def value(out, batch):
    kept = jnp.where(out.logits > MINUS_INF / 2, out.logits, 0)
    return batch.w * jnp.sum(jnp.square(kept), axis=tuple(range(1, kept.ndim)))

  def one_batch(total, inputs):
    new = gradient_sizes(fwd, params, inputs[0], value, jnp.abs, dense)
    return jax.tree.map(jnp.add, total, new), None

  return mean_over_examples(one_batch, params, batches, jax.random.key(0))


def mean_over_examples(one_batch: Callable, params: Tree, batches: Batch, key: Array) -> Tree:
  """Scans `one_batch(total, (batch, key)) -> (total, None)` and divides by the number of examples."""
  zeros = jax.tree.map(jnp.zeros_like, params)
  keys = jax.random.split(key, batches.y.shape[0])
  total, _ = jax.lax.scan(one_batch, zeros, (batches, keys))
  count = jnp.maximum(batches.w.sum(), 1.0)
  return jax.tree.map(lambda a: a / count, total)


def is_dense(fwd: Forward, params: Tree, batch: Batch) -> bool:
  """Whether there is a closed form for every parameter (decided by tracing); see `PerExample`."""
  if any(a.ndim not in (1, 2, 3) for a in jax.tree.leaves(params)):
    return False  # convolutions
  try:
    jax.eval_shape(lambda p, b: fwd(wrapped(p, jnp.abs), b).logits, params, batch)
  except (TypeError, AttributeError, NotImplementedError, LookupError):
    return False  # a parameter is used in another way: the operator refused
  return True


def wrapped(params: Tree, measure: Callable) -> Tree:
  return jax.tree.map(lambda a: PerExample(a, measure), params)


def gradient_sizes(
  fwd: Forward,
  params: Tree,
  batch: Batch,
  value: Callable,
  measure: Callable,
  dense: bool,
  *extra: Array,
) -> Tree:
  """The sum over examples of measure(d value_i / d params).

  Args:
    value: (out, batch, *extra) -> f32[B], row by row.
    measure: `jnp.square` or `jnp.abs`.
    dense: what `is_dense` said: one backward pass for the batch instead of one for each row.
    extra: arrays [B, ...] that go to `value`.
  """
  if dense:
    return jax.grad(lambda p: value(fwd(wrapped(p, measure), batch), batch, *extra).sum())(params)

  def one(total, row):
    batch, *extra = jax.tree.map(lambda a: a[None], row)
    g = jax.grad(lambda p: value(fwd(p, batch), batch, *extra)[0])(params)
    return jax.tree.map(lambda t, g: t + measure(g), total, g), None

  zeros = jax.tree.map(jnp.zeros_like, params)
  return jax.lax.scan(one, zeros, (batch, *extra))[0]
