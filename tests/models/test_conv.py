"""The convolution's own gradients against those that JAX derives, and pooling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cl_jax.models import conv
from tests.compiling import quick


def reference(x, w, stride):
  padding = [(k // 2, k // 2) for k in w.shape[:2]]
  return lax.conv_general_dilated(
    x, w, (stride, stride), padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


@pytest.mark.parametrize(
  'size, d_in, d_out, k, stride',
  [
    ((8, 8), 3, 4, 3, 1),
    ((8, 6), 4, 5, 3, 2),
    ((7, 7), 2, 3, 3, 2),
    ((7, 5), 1, 4, 1, 2),
    ((9, 8), 2, 2, 5, 3),
  ],
)
def test_conv_and_its_gradients_equal_those_of_lax(size, d_in, d_out, k, stride):
  x = jax.random.normal(jax.random.key(0), (3, *size, d_in))
  w = jax.random.normal(jax.random.key(1), (k, k, d_in, d_out))

  def both(f):
    def loss(x, w):
      y = f(x, w, stride)
      return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape))).sum(), y

    return quick(jax.grad(loss, (0, 1), has_aux=True))(x, w)

  (got_x, got_w), got = both(conv.conv)
  (want_x, want_w), want = both(reference)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(got_x, want_x, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(got_w, want_w, rtol=1e-5, atol=1e-5)
  # On other backends JAX's own gradient is taken: the forms used here must not depend on that.
  y, pull = jax.vjp(lambda x, w: reference(x, w, stride), x, w)
  want_x, want_w = pull(y)
  got_x = conv.input_gradient(y, w, stride, x.shape)
  got_w = conv.filter_gradient(x, y, stride, w.shape)
  np.testing.assert_allclose(got_x, want_x, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(got_w, want_w, rtol=1e-5, atol=1e-3)


def test_gradients_per_example_add_up():
  x = jax.random.normal(jax.random.key(0), (4, 6, 6, 2))
  w = jax.random.normal(jax.random.key(1), (3, 3, 2, 3))
  loss = lambda w, x: jnp.tanh(conv.conv(x, w, 2)).sum()  # noqa: E731
  each = jax.vmap(jax.grad(loss), (None, 0))(w, x[:, None])
  np.testing.assert_allclose(each.sum(0), jax.grad(loss)(w, x), rtol=1e-5, atol=1e-5)


def test_curvature_by_forward_over_reverse():
  x = jax.random.normal(jax.random.key(0), (2, 5, 5, 2))
  w = jax.random.normal(jax.random.key(1), (3, 3, 2, 2))

  def product(f):
    loss = lambda w: jnp.tanh(f(x, w, 1)).sum()  # noqa: E731
    return jax.jvp(jax.grad(loss), (w,), (jnp.ones_like(w),))[1]

  np.testing.assert_allclose(product(conv.conv), product(reference), rtol=1e-4, atol=1e-4)


def test_max_pool():
  x = jnp.arange(2 * 5 * 4, dtype=jnp.float32).reshape(2, 5, 4, 1)
  want = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), 'VALID')
  np.testing.assert_array_equal(conv.max_pool(x), want)
