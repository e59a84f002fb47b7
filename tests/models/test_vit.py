"""What only the Vision Transformer has: patches, prompts, and images that do not fit."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax.errors import UserError
from cl_jax.models import layers, transformer, vit
from cl_jax.types import Batch, no_tap

SMALL = vit.Config(8, 4, 1, 8, 2, 2, 12)
BATCH = Batch(
  jax.random.uniform(jax.random.key(1), (3, 8, 8, 1)),
  jnp.arange(3),
  jnp.ones(3),
  jnp.zeros(3, jnp.int32),
)
PARAMS, _ = jax.jit(vit.vit(SMALL, 4, init=0.5).init)(jax.random.key(0), BATCH)


@partial(jax.jit, static_argnames=('tap', 'remat', 'unroll', 'dtype'))
def features(params=PARAMS, x=BATCH.x, tap=no_tap, **options) -> jax.Array:
  return vit.vit(SMALL, 4, **options).apply(params, BATCH._replace(x=x), tap).features


def test_patches_are_rows_of_pixels():
  x = jnp.arange(64.0).reshape(1, 8, 8, 1)
  rows = vit.patches(SMALL, x)
  assert rows.shape == (1, 4, 16)
  np.testing.assert_array_equal(rows[0, 1].reshape(4, 4), x[0, :4, 4:, 0])
  np.testing.assert_array_equal(rows[0, 2].reshape(4, 4), x[0, 4:, :4, 0])
  np.testing.assert_array_equal(vit.patches(SMALL, x[..., 0]), rows)


def test_scan_equals_a_loop_over_layers():
  @jax.jit
  def loop(p):
    h = layers.dense(p['patch'], vit.patches(SMALL, BATCH.x))
    h = jnp.concatenate([jnp.tile(p['cls'], (3, 1, 1)), h], 1) + p['positions']
    for i in range(SMALL.depth):
      q = jax.tree.map(lambda a, i=i: a[i], p['layers'])
      n = layers.layer_norm(q['norm1'], h, 1e-12)
      h = h + transformer.attention(q, n, None, 2, no_tap, jnp.int32(i))
      m = layers.dense(q['up'], layers.layer_norm(q['norm2'], h, 1e-12))
      h = h + layers.dense(q['down'], jax.nn.gelu(m, approximate=False))
    return layers.layer_norm(p['norm'], h[:, 0], 1e-12)

  want = loop(PARAMS['backbone'])
  np.testing.assert_allclose(features(), want, atol=1e-5)
  np.testing.assert_allclose(features(unroll=True), want, atol=1e-5)


def test_remat_and_bfloat16():
  grad = lambda **o: jax.jit(jax.grad(lambda p: jnp.square(features(p, **o)).sum()))(PARAMS)  # noqa: E731
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
  jax.tree.map(close, grad(remat=True), grad())
  low = features(dtype=jnp.bfloat16)
  assert low.dtype == jnp.float32
  assert 0 < jnp.abs(low - features()).max() < 0.2


def test_prompts_before_the_class_token():
  def prompt(name, h, layer=0):
    return jnp.concatenate([jnp.full((3, 2, 8), 0.7), h], 1) if name == 'embed' else h

  got = features(tap=prompt)
  assert got.shape == (3, 8) and jnp.abs(got - features()).max() > 1e-3


def test_wrong_shapes_are_refused():
  with pytest.raises(UserError, match=r'images are \(9, 9, 1\), this ViT takes \(8, 8, 1\)'):
    features(x=jnp.zeros((3, 9, 9, 1)))
  with pytest.raises(UserError, match='patches of 3 pixels do not divide'):
    vit.patches(SMALL._replace(patch=3), BATCH.x)
  with pytest.raises(UserError, match='3 attention heads do not divide 8'):
    jax.eval_shape(lambda p: vit.encode(SMALL._replace(heads=3), p, BATCH.x), PARAMS['backbone'])


@pytest.mark.parametrize('config, millions', [(vit.BASE, 85.8), (vit.TINY, 2.7)])
def test_named_shapes(config, millions):
  batch = BATCH._replace(x=jax.ShapeDtypeStruct((1, config.image, config.image, 3), jnp.uint8))
  params, _ = jax.eval_shape(vit.vit(config, 10).init, jax.random.key(0), batch)
  count = sum(a.size for a in jax.tree.leaves(params['backbone']))
  assert count / 1e6 == pytest.approx(millions, abs=0.05)
