"""The parts that models share: low-rank weights, initial weights, norms with padding, the loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax.errors import UserError
from cl_jax.models import layers
from cl_jax.types import Batch, Out

pytestmark = pytest.mark.usefixtures('quickly')


def normal(seed: int, *shape: int) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape)


def test_low_rank_equals_merged():
  x, w, a, b = normal(0, 5, 4), normal(1, 4, 6), normal(2, 4, 2), normal(3, 2, 6)
  low = layers.LowRank(w, a, b, 0.5)
  np.testing.assert_allclose(x @ low, x @ low.merge(), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(low.merge(), w + 0.5 * a @ b, rtol=1e-6)
  twice = layers.LowRank(low, -a, b, 0.5)  # the second update takes the first back
  np.testing.assert_allclose(twice.merge(), w, atol=1e-5)


def test_low_rank_in_a_scan_over_stacked_layers():
  x, w, a, b = normal(0, 5, 4), normal(1, 3, 4, 4), normal(2, 3, 4, 2), normal(3, 3, 2, 4)
  low = layers.LowRank(w, a, b, jnp.array([0.5, 1.0, 2.0]))
  scan = jax.jit(lambda p: jax.lax.scan(lambda h, q: (jnp.tanh(h @ q), None), x, p)[0])
  np.testing.assert_allclose(scan(low), scan(low.merge()), atol=1e-5)
  grads = jax.grad(lambda p: scan(p).sum())(low)
  assert isinstance(grads, layers.LowRank)
  assert all(jnp.abs(g).max() > 0 for g in grads)


@pytest.mark.parametrize(
  'init, std, limit',
  [
    ('he', np.sqrt(2 / 400), np.inf),
    ('lecun', np.sqrt(1 / 400), np.sqrt(3 / 400)),
    ('glorot', np.sqrt(2 / 700), np.sqrt(6 / 700)),
    ('torch', np.sqrt(1 / 1200), np.sqrt(1 / 400)),
    ('zeros', 0.0, 0.0),
    (0.02, 0.02 * 0.8796, 0.04),
  ],
)
def test_initial_weights(init, std, limit):
  p = layers.dense_init(jax.random.key(0), 400, 300, init)
  assert p['w'].shape == (400, 300) and p['b'].shape == (300,)
  assert np.std(p['w']) == pytest.approx(std, rel=0.02)
  assert np.abs(p['w']).max() <= limit
  assert (np.abs(p['b']).max() > 0) == (init == 'torch')


def test_fan_of_a_filter_counts_its_window():
  w = layers.weight(jax.random.key(0), (3, 3, 64, 128), 'he')
  assert np.std(w) == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.02)


def test_unknown_init_is_refused():
  with pytest.raises(UserError, match='kaiming'):
    layers.weight(jax.random.key(0), (2, 2), 'kaiming')


def test_pixels():
  image = jnp.array([0, 51, 255], jnp.uint8)
  np.testing.assert_allclose(layers.pixels(image), [0, 0.2, 1], atol=1e-7)
  np.testing.assert_allclose(layers.pixels(image, 0.2, 0.5), [-0.4, 0, 1.6], atol=1e-6)
  features = normal(0, 3, 2)
  assert layers.pixels(features, 0.2, 0.5) is features


def test_batch_norm_ignores_rows_without_weight():
  p = {'scale': normal(0, 3), 'bias': normal(1, 3), 'mean': normal(2, 3), 'var': jnp.ones(3)}
  x = normal(3, 4, 5, 5, 3)
  padded = jnp.concatenate([x, jnp.full((2, 5, 5, 3), jnp.nan)])
  w = jnp.array([0.5, 1, 2, 1, 0, 0])
  want, stats = layers.batch_norm(p, x, jnp.ones(4), True)
  got, got_stats = layers.batch_norm(p, padded, w, True)
  np.testing.assert_allclose(got[:4], want, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got_stats, stats)
  alike = jnp.ones((4, 5, 5, 3))  # without variance: an empty memory's rows are all the same
  none, kept = layers.batch_norm(p, alike, jnp.zeros(4), True)
  np.testing.assert_array_equal(none, layers.batch_norm(p, alike, jnp.zeros(4), False)[0])
  np.testing.assert_array_equal(kept['mean'], p['mean'])
  np.testing.assert_array_equal(kept['var'], p['var'])


def test_cross_entropy_and_its_gradient():
  logits, y = normal(0, 4, 5), jnp.array([0, 4, 2, 2])
  masked = logits.at[:, 1].set(-jnp.inf)  # a class that nobody has
  batch = Batch(jnp.zeros((4, 1)), y, jnp.ones(4), jnp.zeros(4, jnp.int32))

  def loss(z):
    return layers.softmax_cross_entropy(Out(z, z, {}), batch)

  want = -jax.nn.log_softmax(masked)[jnp.arange(4), y]
  np.testing.assert_allclose(loss(masked), want, rtol=1e-6)
  grad = jax.grad(lambda z: loss(z).sum())(masked)
  np.testing.assert_allclose(grad, jax.nn.softmax(masked) - jax.nn.one_hot(y, 5), atol=1e-6)
