"""What the models share: initial weights, dense layers and their low-rank updates, norms, the loss.

A dense layer is `x @ p['w'] + p['b']`, nothing more, so a leaf `w` may be anything that defines
`__rmatmul__`: `LowRank` turns every model into its LoRA version without touching the model.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.linalg import cross_entropy
from cl_jax.models.quantised import dequantise, is_stored, operator
from cl_jax.types import Array, Batch, Out, Tree, Wire

INITS = ('he', 'lecun', 'glorot', 'torch', 'zeros')


class LowRank(NamedTuple):
  """A weight plus a low-rank update, in the place of a weight: x @ w + (x @ a) @ b * scale.

  Attributes:
    w: [..., d_in, d_out] the weight below: an array, quantised, or a `LowRank` again.
    a: [..., d_in, r] the down projection.
    b: [..., r, d_out] the up projection.
    scale: [] or [...] (one per layer of a stack), alpha / r in the notation of the paper.

  Source: Hu et al., LoRA, 2022, eq. 3 (their BA acts on columns: a = A^T, b = B^T).
  """

  w: Any
  a: Array
  b: Array
  scale: Array | float

  def __rmatmul__(self, x: Array) -> Array:
    return x @ operator(self.w) + (x @ self.a) @ self.b * self.scale

  def merge(self) -> Array:
    """The plain weight [..., d_in, d_out] that computes the same."""
    below: Any = self.w.merge() if isinstance(self.w, LowRank) else self.w
    below = dequantise(below) if is_stored(below) else below
    return below + jnp.expand_dims(jnp.asarray(self.scale), (-2, -1)) * (self.a @ self.b)


def weight(key: Array, shape: tuple[int, ...], init: str | float) -> Array:
  """Draws a weight f32[shape]; the last two axes are (in, out), those before them a window.

  Args:
    key: typed key.
    shape: (in, out) of a dense layer or (height, width, in, out) of a filter.
    init: 'he' N(0, 2/fan_in) (He et al. 2015), 'lecun' U(+-sqrt(3/fan_in)), 'glorot'
      U(+-sqrt(6/(fan_in + fan_out))), 'torch' U(+-1/sqrt(fan_in)) (what torch.nn.Linear does),
      'zeros', or a float: the standard deviation of a normal that is cut at two of them.
  """
  fan_in = math.prod(shape[:-1])
  fan_out = math.prod(shape[:-2]) * shape[-1]
  if isinstance(init, (int, float)):
    return init * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
  if init == 'he':
    return math.sqrt(2 / fan_in) * jax.random.normal(key, shape, jnp.float32)
  if init == 'zeros':
    return jnp.zeros(shape, jnp.float32)
  limits = {
    'lecun': math.sqrt(3 / fan_in),
    'glorot': math.sqrt(6 / (fan_in + fan_out)),
    'torch': math.sqrt(1 / fan_in),
  }
  if init not in limits:
    raise UserError(f'init={init!r} is not known: use one of {", ".join(INITS)} or a float')
  return jax.random.uniform(key, shape, jnp.float32, -limits[init], limits[init])


def dense_init(key: Array, d_in: int, d_out: int, init: str | float, bias: float = 0.0) -> Tree:
  """{'w': f32[d_in, d_out], 'b': f32[d_out]}; the biases are `bias`, drawn where init is 'torch'."""
  k_w, k_b = jax.random.split(key)
  limit = 1 / math.sqrt(d_in) if init == 'torch' else 0.0
  b = (
    jax.random.uniform(k_b, (d_out,), jnp.float32, -limit, limit)
    if limit
    else jnp.full(d_out, bias, jnp.float32)
  )
  return {'w': weight(k_w, (d_in, d_out), init), 'b': b}


def dense(p: Tree, x: Array) -> Array:
  """[..., d_in] -> [..., d_out]; a layer without 'b' has no bias."""
  y = x @ operator(p['w'])
  return y + p['b'] if 'b' in p else y


def pixels(x: Array, mean: Any = None, std: Any = None) -> Array:
  """Stored inputs as the network wants them.

  u8 images become f32 in [0, 1], then (x - mean) / std where these are given (per channel, on the
  scale of [0, 1]); what is floating point already is taken as it is.
  """
  if jnp.issubdtype(x.dtype, jnp.floating):
    return x
  x = x.astype(jnp.float32) / 255
  if mean is not None:
    x = x - jnp.asarray(mean, jnp.float32)
  if std is not None:
    x = x / jnp.asarray(std, jnp.float32)
  return x


def layer_norm(p: Tree, x: Array, eps: float) -> Array:
  """Normalises the last axis, in f32; the result has the dtype of x (Ba et al. 2016)."""
  h = x.astype(jnp.float32)
  h = h - h.mean(-1, keepdims=True)
  h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + eps)
  return (h * p['scale'] + p['bias']).astype(x.dtype)


def rms_norm(p: Tree, x: Array, eps: float) -> Array:
  """Divides the last axis by its root mean square, in f32 (Zhang & Sennrich 2019, eq. 4)."""
  h = x.astype(jnp.float32)
  h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + eps)
  return (h * p['scale']).astype(x.dtype)


def batch_norm(
  p: Tree,
  x: Array,
  w: Array,
  train: bool,
  momentum: float = 0.1,
  eps: float = 1e-5,
  renorm: tuple[float, ...] = (),
) -> tuple[Array, Tree]:
  """Normalises the last axis over all others; rows with w == 0 take no part in the statistics.

  With `renorm` the training pass normalises as inference would, as far as the bounds allow: from batches
  that are small or of few classes the two differ most.

  Args:
    p: 'scale', 'bias', and the running 'mean', 'var', each f32[C].
    x: f32[B, ..., C].
    w: f32[B]; only whether it is positive matters.
    train: use and return the statistics of this batch, else the running ones.
    momentum: share of the new statistics in the running ones, as torch means it.
    renorm: () or (r_max, d_max), the bounds of batch renormalisation.

  Returns:
    The normalised x, and the new {'mean', 'var'} ({} outside training). As in torch the running
    variance is the unbiased one; a batch without a valid row, such as one drawn from an empty memory, is
    normalised by the running ones and leaves both as they are.

  Source: Ioffe & Szegedy 2015, alg. 1; Ioffe 2017, alg. 1, for `renorm` (deviation: the running
  statistics are the mean and the unbiased variance, as without it).
  """
  if not train:
    return _affine(p, x, p['mean'], p['var'], eps), {}
  axes = tuple(range(x.ndim - 1))
  w = w[: x.shape[0]]  # rows that enter above this layer come last; see `cl_jax.cut`
  valid = jnp.reshape(w > 0, (-1,) + (1,) * (x.ndim - 1))
  n = (w > 0).sum() * math.prod(x.shape[1:-1])
  # `where`, not a product: padding may hold anything, and the moments stay those of the rest.
  mean = jnp.where(valid, x, 0).sum(axes) / jnp.maximum(n, 1)
  var = jnp.where(valid, jnp.square(x - mean), 0).sum(axes) / jnp.maximum(n, 1)
  # Through many layers a variance of 0 would grow any input to infinity, which no weight of 0 takes back.
  mean, var = jnp.where(n > 0, mean, p['mean']), jnp.where(n > 0, var, p['var'])
  rate = jnp.where(n > 0, momentum, 0.0)
  unbiased = var * (n / jnp.maximum(n - 1, 1))
  stats = {
    'mean': p['mean'] + rate * (mean - p['mean']),
    'var': p['var'] + rate * (unbiased - p['var']),
  }
  if renorm:
    r_max, d_max = renorm
    running = jnp.sqrt(p['var'] + eps)
    r = jnp.clip(jnp.sqrt(var + eps) / running, 1 / r_max, r_max)
    d = jnp.clip((mean - p['mean']) / running, -d_max, d_max)
    r, d = jax.lax.stop_gradient((r, d))
    p = {**p, 'scale': p['scale'] * r, 'bias': p['bias'] + p['scale'] * d}
  return _affine(p, x, mean, var, eps), jax.lax.stop_gradient(stats)


def _affine(p: Tree, x: Array, mean: Array, var: Array, eps: float) -> Array:
  return (x - mean) * (jax.lax.rsqrt(var + eps) * p['scale']) + p['bias']


def in_line(names: tuple[str, ...]) -> tuple[Wire, ...]:
  """The wires of hidden layers that follow each other, each with the tap of its own name, and of 'head'."""
  steps = zip((*names, 'head'), ('', *names), (*names, ''), strict=True)
  return tuple(Wire(*step) for step in steps)


def softmax_cross_entropy(out: Out, batch: Batch) -> Array:
  """-log softmax(logits)[y], f32[B] at least; logits may be -inf for classes that are ruled out."""
  return cross_entropy(out.logits, batch.y)
