import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_jax.streams import Plan, permuted, rotated, views
from cl_jax.streams.take import put, take


@given(st.integers(1, 80), st.integers(1, 4), st.integers(0, 99), st.booleans())
@settings(deadline=None, max_examples=40)
def test_permutations_are_bijections(pixels, tasks, seed, first_plain):
  table = views.permutations(pixels, tasks, seed, first_plain)
  assert table.shape == (tasks, pixels) and table.dtype == np.int32
  assert (np.sort(table, axis=1) == np.arange(pixels)).all()
  if first_plain:
    assert (table[0] == np.arange(pixels)).all()


def test_permute_keeps_channels_together():
  x = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3), np.uint8)
  perm = views.permutations(25, 1, 0, False)[0]
  out = views.permute(x, perm)
  assert out.shape == x.shape and out.dtype == np.uint8
  assert np.array_equal(out.reshape(4, 25, 3), x.reshape(4, 25, 3)[:, perm])
  features = np.arange(12.0, dtype=np.float32).reshape(2, 6)
  order = np.array([5, 0, 1, 2, 3, 4])
  assert np.array_equal(views.permute(features, order), features[:, order])


def turned(x, degrees):
  table = views.rotation_table(x.shape[1], x.shape[2], [degrees])
  return views.rotate(x, {name: value[0] for name, value in table.items()})


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_rotation_by_0_and_360_is_the_identity(height, width, seed):
  x = np.random.default_rng(seed).integers(0, 256, (2, height, width, 2), np.uint8)
  assert np.array_equal(turned(x, 0.0), x)
  assert np.array_equal(turned(x, 360.0), x)


@pytest.mark.parametrize('size', [6, 7])
@pytest.mark.parametrize('quarters', [1, 2, 3, -1])
def test_quarter_turns_are_exact_and_counter_clockwise(size, quarters):
  x = np.random.default_rng(1).integers(0, 256, (3, size, size, 1), np.uint8)
  assert np.array_equal(turned(x, 90.0 * quarters), np.rot90(x, quarters, axes=(1, 2)))


@pytest.mark.parametrize('degrees', [10.0, 45.0, 133.7])
def test_rotation_agrees_with_scipy(degrees):
  ndimage = pytest.importorskip('scipy.ndimage')
  # Zero border: scipy treats samples beyond the edge in another way.
  x = np.zeros((2, 20, 20, 1), np.uint8)
  x[:, 6:14, 6:14] = np.random.default_rng(2).integers(0, 256, (2, 8, 8, 1), np.uint8)
  theirs = [
    ndimage.rotate(x.astype(np.float64), sign * degrees, axes=(2, 1), reshape=False, order=1)
    for sign in (1, -1)
  ]
  ours = turned(x, degrees).astype(np.float64)
  distance = [np.abs(ours - other).max() for other in theirs]
  assert distance[0] <= 1.0  # a grey level: weights in 1/4096, rounding
  assert distance[1] > 30.0


@pytest.mark.parametrize('make', ['permuted', 'rotated'])
@pytest.mark.parametrize('scenario', ['class', 'domain'])
def test_training_and_test_views_are_the_same_bytes(images, make, scenario):
  data = images(12)
  build = {'permuted': permuted, 'rotated': rotated}[make]
  stream = build(data, data, scenario, 3, plan=Plan(4))
  on_device, f = put(stream), jax.jit(take)
  for t in range(3):
    batch = f(on_device, jnp.arange(12, dtype=jnp.int32), jnp.int32(t))
    real = stream.test.w[t] > 0
    assert batch.x.dtype == jnp.uint8
    assert np.array_equal(batch.x, stream.test.x[t][real])
    assert np.array_equal(batch.y, stream.test.y[t][real])
  assert not np.array_equal(stream.test.x[0], stream.test.x[1])


def test_first_plain_and_pad(images):
  data = images(10)
  stream = permuted(data, data, 'domain', 2, first_plain=True, pad=2, plan=Plan(5))
  assert stream.x.shape == (10, 10, 10, 1) and stream.views.shape == (2, 100)
  first = stream.test.x[0][stream.test.w[0] > 0]
  assert np.array_equal(first[:, 2:-2, 2:-2], data.x) and first.sum() == data.x.sum()
  second = stream.test.x[1][stream.test.w[1] > 0]
  assert not np.array_equal(second, first)
  assert np.array_equal(np.sort(second.reshape(10, -1)), np.sort(first.reshape(10, -1)))


def test_rotated_angles(images):
  data = images(10)
  even = rotated(data, data, 'domain', 3, plan=Plan(5))
  given_ = rotated(data, data, 'domain', degrees=(0.0, 60.0, 120.0), plan=Plan(5))
  assert all(map(np.array_equal, jax.tree.leaves(even), jax.tree.leaves(given_)))
  assert even.task_names == ('0 degrees', '60 degrees', '120 degrees')
  assert np.array_equal(even.test.x[0][even.test.w[0] > 0], data.x)
