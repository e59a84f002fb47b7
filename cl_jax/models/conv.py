"""Convolution and pooling over [B, H, W, C] that are as fast inside a loop as outside.

On CPUs the gradients that JAX derives from `lax.conv` cost up to 70 times a forward pass, so they
are written out here in forms that its kernels are good at; elsewhere JAX's own gradients are used.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from cl_jax.models.sliced import Sliced
from cl_jax.types import Array


def conv(x: Array, w: Array | Sliced, stride: int = 1) -> Array:
  """Cross-correlates with a window of odd size k, zero-padded by (k - 1) / 2 as torch does.

  Reverse mode only: `jax.jvp` of it is refused (`jax.jvp` of a gradient works).

  Args:
    x: [B, H, W, in].
    w: [k, k, in, out], or one of which some channels are trained.
    stride: of the window.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), out].
  """
  if isinstance(w, Sliced):
    return w.product(lambda x, w: filtered(x, w, stride), x)
  return filtered(x, w, stride)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def filtered(x: Array, w: Array, stride: int) -> Array:
  """`conv` with the gradients of this file."""
  return _conv(x, w, stride)


def _conv(x: Array, w: Array, stride: int, padding=None, spread: int = 1) -> Array:
  if jax.default_backend() == 'cpu' and w.shape[2] % 2 and w.shape[2] > 1:
    # XLA's fast CPU kernel takes even numbers of channels only; RGB as it is costs 12 times more.
    x, w = (jnp.pad(a, [(0, int(i == axis)) for i in range(4)]) for a, axis in ((x, 3), (w, 2)))
  if padding is None:
    padding = [((k - 1) // 2, (k - 1) // 2) for k in w.shape[:2]]
  axes = ('NHWC', 'HWIO', 'NHWC')
  return lax.conv_general_dilated(
    x, w, (stride,) * 2, padding, lhs_dilation=(spread,) * 2, dimension_numbers=axes
  )


def _forward(x: Array, w: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
  return _conv(x, w, stride), (x, w)


def _backward(stride: int, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
  x, w = saved
  if jax.default_backend() != 'cpu':
    return jax.vjp(lambda x, w: _conv(x, w, stride), x, w)[1](g)
  return input_gradient(g, w, stride, x.shape), filter_gradient(x, g, stride, w.shape)


filtered.defvjp(_forward, _backward)


def input_gradient(g: Array, w: Array, stride: int, shape: tuple[int, ...]) -> Array:
  """d(loss)/dx of that shape: a plain convolution of g, spread by the stride, with w turned round.

  What JAX derives says the same by naming the axes of w otherwise; that is what has no fast kernel.
  """
  padding = []
  for size, out, k in zip(shape[1:3], g.shape[1:3], w.shape[:2], strict=True):
    p = (k - 1) // 2
    padding.append((k - 1 - p, size - 1 + p - (out - 1) * stride))
  return _conv(g, jnp.flip(w, (0, 1)).swapaxes(2, 3), 1, padding, stride)


def filter_gradient(x: Array, g: Array, stride: int, shape: tuple[int, ...]) -> Array:
  """d(loss)/dw of that shape: one product of shifted inputs with g for each place."""
  (k_h, k_w, d_in, d_out), (b, h, w, _) = shape, g.shape
  p_h, p_w = (k_h - 1) // 2, (k_w - 1) // 2
  x = jnp.pad(x, ((0, 0), (p_h, p_h), (p_w, p_w), (0, 0)))
  reach = (b, (h - 1) * stride + 1, (w - 1) * stride + 1, d_in)
  rows = g.reshape(-1, d_out)

  def place(_: None, at: Array) -> tuple[None, Array]:
    shifted = lax.dynamic_slice(x, (0, at // k_w, at % k_w, 0), reach)[:, ::stride, ::stride]
    return None, shifted.reshape(-1, d_in).T @ rows

  # A loop runs as fast as k * k products in a row, and compiles in a fraction of the time.
  return lax.scan(place, None, jnp.arange(k_h * k_w))[1].reshape(shape)


def max_pool(x: Array, k: int = 2) -> Array:
  """The maximum of disjoint k by k windows, [B, H // k, W // k, C]; what is left over is dropped.

  Where several units of a window are equal, they share the gradient (torch gives it to the first).
  """
  b, h, w, c = x.shape
  x = x[:, : h // k * k, : w // k * k]
  return x.reshape(b, h // k, k, w // k, k, c).max((2, 4))
