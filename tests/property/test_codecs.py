"""Codecs: the error that is stated, the bytes that are stated, for random arrays."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_jax import budget, codecs
from cl_jax.errors import UserError

pytestmark = pytest.mark.usefixtures('quickly')

SHAPES = ((), (7,), (4, 3, 1))


def floats(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
  """Heavy-tailed, rows of very different sizes, one of zeros, one of a single value."""
  rng = np.random.default_rng(seed)
  x = rng.standard_t(2, size=(5, *shape)) * 10.0 ** rng.integers(-6, 6, (5, *[1] * len(shape)))
  x[1], x[2] = 0, scale
  return (scale * x).astype(np.float32)


def row_bound(codec: str, x: np.ndarray) -> np.ndarray:
  """Of each number, from the row alone; rounding of the arithmetic itself comes on top."""
  axes = tuple(range(1, x.ndim))
  most = np.abs(x).max(axes, keepdims=True) if axes else np.abs(x)
  span = (x.max(axes, keepdims=True) - x.min(axes, keepdims=True)) if axes else 0 * x
  tiny = 4e-6 * most
  return {
    'float32': 0 * x,
    'bfloat16': np.abs(x) / 256,
    'uint8': span / 510 + tiny,
    'int8': most / 254 + tiny,
    'int4': most / 14 + tiny,
  }[codec]


@pytest.mark.parametrize('codec', codecs.ROWS)
@settings(max_examples=8)
@given(seed=st.integers(0, 10_000), shape=st.sampled_from(SHAPES))
def test_rows_keep_the_stated_error_and_bytes(codec, seed, shape):
  x = floats(seed, shape)
  made = codecs.encode(codec, x)
  back = np.asarray(codecs.decode(made))
  assert back.dtype == x.dtype and back.shape == x.shape
  assert (np.abs(back.astype(np.float64) - x) <= row_bound(codec, x)).all()
  n = math.prod(shape)
  sizes = {'float32': 4 * n, 'bfloat16': 2 * n, 'uint8': n + 8, 'int8': n + 4}
  assert budget.tree_bytes(made) == 5 * sizes.get(codec, -(-n // 2) + 4)
  assert all(a.shape[0] == 5 for a in jax.tree.leaves(made))
  one = codecs.encode(codec, x[3:4])  # a row stands alone
  np.testing.assert_array_equal(codecs.decode(one)[0], back[3])


@pytest.mark.parametrize('codec', codecs.ROWS)
@settings(max_examples=8)
@given(seed=st.integers(0, 10_000), shape=st.sampled_from(SHAPES))
def test_images_are_lossless_but_in_four_bits(codec, seed, shape):
  x = np.random.default_rng(seed).integers(0, 256, (5, *shape)).astype(np.uint8)
  made = codecs.encode(codec, x)
  back = np.asarray(codecs.decode(made))
  assert back.dtype == np.uint8
  off = np.abs(back.astype(int) - x)
  assert off.max() <= 8 if codec == 'int4' else not off.any()
  n = math.prod(shape)
  sizes = {'float32': 4 * n, 'bfloat16': 2 * n, 'int4': -(-n // 2)}
  assert budget.tree_bytes(made) == 5 * sizes.get(codec, n)


def test_every_grey_value_goes_to_the_nearest_of_sixteen():
  x = np.arange(256, dtype=np.uint8)[:, None]
  nearest = 17 * np.rint(x / 17.0).astype(int)
  np.testing.assert_array_equal(codecs.decode(codecs.encode('int4', x)), nearest)


def test_ties_go_to_the_even_level():
  """Levels are 1 apart here: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2."""
  x = jnp.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
  assert codecs.encode('int8', x).codes.tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize('codec', codecs.TENSORS)
@settings(max_examples=8)
@given(seed=st.integers(0, 10_000), n=st.sampled_from((255, 600)))
def test_tensors_keep_the_stated_error_and_bytes(codec, seed, n):
  x = np.random.default_rng(seed).standard_t(2, size=n).astype(np.float32)
  x[::5] = 0
  x = np.abs(x) if codec == 'udynamic8' else x
  made = codecs.pack(codec, jnp.asarray(x))
  back = np.asarray(codecs.unpack(made))
  blocks = -(-n // codecs.BLOCK)
  assert budget.tree_bytes(made) == (2 * n if codec == 'bfloat16' else n + 4 * blocks)
  most = np.repeat([np.abs(b).max() for b in np.split(x, range(256, n, 256))], 256)[:n]
  bound = {'bfloat16': np.abs(x) / 256, 'dynamic8': 0.0071 * most, 'udynamic8': 0.0036 * most}
  assert (np.abs(back - x) <= bound[codec]).all()
  assert ((back == 0) == (x == 0)).all() and (back * x >= 0).all()
  if codec != 'bfloat16':
    top = np.abs(x) == most
    np.testing.assert_array_equal(back[top & (x > 0)][:1], x[top & (x > 0)][:1])
    middle = np.abs(x) > 1e-3 * most  # four decades down a level is still near
    assert (np.abs(back - x) <= 0.35 * np.abs(x))[middle].all()
  again = codecs.pack(codec, jnp.asarray(back))
  for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_negative_extreme_is_exact_too():
  x = jnp.linspace(-3.0, 1.0, 256)
  assert codecs.unpack(codecs.pack('dynamic8', x))[0] == -3.0


def test_a_negative_number_is_0_where_none_is_meant():
  """Even where it is the farthest from 0 in its block, whose other numbers keep their levels."""
  x = jnp.linspace(0.0, 1.0, 600).at[jnp.array([0, 300, 599])].set(jnp.array([-2.0, -0.1, -5.0]))
  back = codecs.unpack(codecs.pack('udynamic8', x))
  np.testing.assert_array_equal(back, codecs.unpack(codecs.pack('udynamic8', jnp.maximum(x, 0))))
  assert back[jnp.array([0, 300, 599])].tolist() == [0, 0, 0] and back[598] > 0.9
  assert not codecs.unpack(codecs.pack('udynamic8', -x - 6)).any()


def test_the_dynamic_map_is_that_of_the_paper():
  """7 decades of 1, 2, ..., 64 levels on either side (Dettmers et al. 2022, section 2.2), 0 and 1."""
  for codec, sides in (('dynamic8', 2), ('udynamic8', 1)):
    levels = codecs.dynamic_map(codec)
    assert len(levels) == 256 == len(np.unique(levels)) and (np.diff(levels) > 0).all()
    inside = [((levels > 10.0 ** -(k + 1)) & (levels < 10.0**-k)).sum() for k in range(7)]
    assert inside == [128 // sides // 2**k for k in range(7)]
    assert {0.0, 1.0} <= set(levels.tolist())


def test_mapped_and_compiled_alike():
  """Over a leading axis by vmap, as runs of several seeds and the batches of a boundary are."""
  x = jnp.asarray(np.stack([floats(s, (7,)) for s in range(3)]))
  for codec in codecs.ROWS:
    many = jax.jit(jax.vmap(lambda a, c=codec: codecs.decode(codecs.encode(c, a))))(x)
    for one, a in zip(many, x, strict=True):
      again = np.asarray(codecs.decode(codecs.encode(codec, a)))
      most = np.abs(again).max(1, keepdims=True)  # a compiled product may be fused with its sum
      assert (np.abs(one - again) <= 1e-6 * most).all()


def test_what_cannot_be_encoded_says_so():
  with pytest.raises(UserError, match='one of float32, bfloat16, uint8, int8, int4'):
    codecs.encode('int3', jnp.zeros((1, 2)))
  with pytest.raises(UserError, match='one of bfloat16, dynamic8, udynamic8'):
    codecs.pack('int8', jnp.zeros(300))
  with pytest.raises(TypeError, match='rows of int32 cannot be encoded'):
    codecs.encode('int4', jnp.zeros((1, 2), jnp.int32))
  text = {'tokens': jnp.arange(6).reshape(2, 3), 'f': jnp.ones((2, 3))}
  made = codecs.encode_tree('int4', text)
  assert made['tokens'] is text['tokens'] and isinstance(made['f'], codecs.Rows)
