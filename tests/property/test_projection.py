"""Structured random features: the matrix that a seed stands for, and RanPAC above it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax.budget import tree_bytes
from cl_jax.errors import UserError
from cl_jax.learner import learner
from cl_jax.methods.closed_form.ranpac import ranpac
from cl_jax.models.identity import identity
from cl_jax.projection import signs, structured
from cl_jax.types import Batch
from tests.compiling import quick

MASK = 2**32 - 1


def bits(seed: int, n: int) -> np.ndarray:
  """The signs in Python's integers."""
  found = []
  for k in range(1, n + 1):
    i = (seed + 0x9E3779B9 * k) & MASK
    i = ((i ^ i >> 16) * 0x85EBCA6B) & MASK
    i = ((i ^ i >> 13) * 0xC2B2AE35) & MASK
    found.append(-1.0 if (i ^ i >> 16) >> 31 else 1.0)
  return np.array(found)


def matrix(seed: int, d: int, width: int) -> np.ndarray:
  """W [d, width] in float64, from the definition."""
  n = 2
  while n < d:
    n *= 2
  h = np.array([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)]) / np.sqrt(n)
  blocks = -(-width // n)
  D = bits(seed, 3 * blocks * n).reshape(3, blocks, n)
  made = [np.sqrt(n) * (h * D[0, b]) @ (h * D[1, b]) @ (h * D[2, b]) for b in range(blocks)]
  return np.concatenate([m.T for m in made], axis=1)[:d, :width]


def examples(classes: int, d: int, rows: int, seed: int = 0) -> Batch:
  """Two clouds a class on opposite sides of 0, which no linear classifier tells apart."""
  rng = np.random.default_rng(seed)
  centres = 2 * np.random.default_rng(1).normal(size=(classes, d))
  y = np.arange(rows) % classes
  side = rng.choice([-1.0, 1.0], (rows, 1))
  x = jnp.asarray(side * centres[y] + rng.normal(size=(rows, d)), jnp.float32)
  return Batch(x, jnp.asarray(y, jnp.int32), jnp.ones(rows), jnp.zeros(rows, jnp.int32))


def fitted(batch: Batch, classes: int, *args):
  """(learner, state) after one batch and its boundary."""
  learn = learner(identity(classes), optax.identity(), ranpac(classes, *args))
  state, _ = quick(learn.step)(quick(learn.init)(jax.random.key(3), batch), batch)
  return learn, quick(learn.boundary)(state, jax.tree.map(lambda a: a[None], batch))


@pytest.mark.parametrize(('d', 'width'), [(6, 20), (1, 3)])
def test_the_matrix_is_the_defined_one(d, width):
  x = np.random.default_rng(0).normal(size=(3, d)).astype(np.float32)
  made = quick(lambda x, seed: (structured(x, seed, width), signs(seed, 40)))
  for seed in (0, 7, 2**32 - 1):
    got, drawn = made(x, np.uint32(seed))
    np.testing.assert_array_equal(drawn, bits(seed, 40))
    np.testing.assert_allclose(got, x @ matrix(seed, d, width), rtol=1e-5, atol=1e-5)


def test_columns_are_orthogonal_and_entries_like_a_gaussian():
  """Within a block exactly; moments of all entries as N(0, 1) has them, seeds and blocks apart."""
  made = quick(lambda seed: structured(jnp.eye(64), seed, 256))
  W = np.concatenate([made(np.uint32(s)) for s in range(8)], axis=1, dtype=np.float64)
  gram = W.T @ W / 64
  for at in range(0, len(gram), 64):
    np.testing.assert_allclose(gram[at : at + 64, at : at + 64], np.eye(64), atol=1e-5)
  across = gram[:64, 64:]
  assert across.std() == pytest.approx(1 / 8, rel=0.05)
  assert abs(W.mean()) < 0.01 and W.var() == pytest.approx(1.0, rel=1e-5)
  assert (W**4).mean() == pytest.approx(3.0, rel=0.1)


def test_ranpac_equals_numpy():
  """Sums, head and scores in float64 from the definition."""
  batch = examples(4, 6, 40)
  learn, state = fitted(batch, 4, 20, 1.0, 'step', 'structured')
  seed, x = int(state.method.projection), np.asarray(batch.x, np.float64)
  h = np.maximum(x @ matrix(seed, 6, 20), 0)
  Y = np.eye(4)[np.asarray(batch.y)]
  head = np.linalg.solve(h.T @ h + np.eye(20), h.T @ Y)
  np.testing.assert_allclose(state.method.gram, h.T @ h, rtol=1e-5, atol=1e-3)
  np.testing.assert_allclose(state.method.head, head, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(quick(learn.predict)(state, batch), h @ head, rtol=1e-3, atol=1e-3)


def test_accuracy_is_that_of_gaussian_features_for_fewer_bytes():
  """On what needs nonlinear features: within three points of a stored W, well above a linear head."""
  train, test = examples(6, 12, 600), examples(6, 12, 600, seed=5)
  found, held = {}, {}
  for kind in ('gaussian', 'structured'):
    learn, state = fitted(train, 6, 96, 1.0, 'step', kind)
    guessed = np.asarray(quick(learn.predict)(state, test)).argmax(-1)
    found[kind] = float((guessed == np.asarray(test.y)).mean())
    held[kind] = tree_bytes(state.method)
  assert min(found.values()) > 0.85 and abs(found['structured'] - found['gaussian']) < 0.03
  assert held['gaussian'] == 4 * (12 * 96 + 96**2 + 2 * 96 * 6 + 1)
  assert held['structured'] == 4 * (1 + 96**2 + 2 * 96 * 6 + 1)


def test_another_word_is_refused():
  with pytest.raises(UserError, match="ranpac features='fourier': choose gaussian or structured"):
    ranpac(4, features='fourier')
