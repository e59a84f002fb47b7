"""Replay memory: what is kept and drawn, for random streams."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_jax import memory, writers
from cl_jax.types import Batch
from tests.compiling import quick

pytestmark = pytest.mark.usefixtures('quickly')


def batch_of(ids, classes, valid=None):
  ids = jnp.asarray(ids, jnp.int32)
  w = jnp.ones(ids.shape) if valid is None else jnp.asarray(valid, jnp.float32)
  return Batch(ids[:, None].astype(jnp.uint8), ids % classes, w, jnp.full(ids.shape, -1, jnp.int32))


def filling(writer, draw=4):
  """(batches, key) -> the memory after writing all batches; compiled once for any number of calls."""
  features = lambda b: jnp.stack([b.x[:, 0] % 17, b.x[:, 0] % 5], axis=1).astype(jnp.float32)  # noqa: E731
  create = quick(lambda b: memory.create(writer, b, draw, 2))

  @quick
  def step(m, b, key, i):
    return memory.write_then_draw(writer, m, b, jax.random.fold_in(key, i), features=features(b))

  def fill(batches, key):
    m = create(batches[0])
    for i, b in enumerate(batches):
      m = step(m, b, key, i)
    return m

  return fill


def fill(writer, batches, key):
  return filling(writer)(batches, key)


@cache
def named(name: str, capacity: int, classes: int):
  """`filling` with the writer of that name, kept over the examples that hypothesis tries."""
  return filling(writers.writer(name, capacity, classes))


@pytest.mark.parametrize('name', writers.NAMES)
@given(seed=st.integers(0, 2**31 - 1), padding=st.integers(0, 4))
def test_memory_holds_only_what_was_shown(name, seed, padding):
  """Never over capacity, no example twice, no padding, draws come from what is stored, bytes as stored."""
  classes, capacity, B = 3, 9, 5
  rng = np.random.default_rng(seed)
  ids = rng.permutation(200)[:40].reshape(8, B)
  valid = np.ones((8, B))
  valid[:, B - padding :] = 0
  batches = [batch_of(i, classes, v) for i, v in zip(ids, valid, strict=True)]
  m = named(name, capacity, classes)(batches, jax.random.key(seed % 1000))
  kept = np.asarray(m.rows.w)[:capacity] > 0
  held = np.asarray(m.rows.x)[:capacity, 0][kept]
  assert m.rows.x.dtype == jnp.uint8 and m.rows.x.shape[0] == capacity + 1
  assert len(set(held)) == len(held)
  assert set(held) <= set(ids[valid > 0])
  drawn = np.asarray(m.draw.w) > 0
  assert set(np.asarray(m.draw.x)[drawn, 0]) <= set(held)
  assert len(set(np.asarray(m.draw.x)[drawn, 0])) == drawn.sum() == min(4, kept.sum())


def test_reservoir_keeps_all_with_equal_probability():
  """Every one of 60 examples is in a memory of 12 with probability 0.2 (two-sided, 4.5 sigma)."""
  runs, n, capacity = 4000, 60, 12
  writer = memory.reservoir(capacity)
  ids = jnp.arange(n, dtype=jnp.int32).reshape(12, 5)

  def one(key):
    first = batch_of(ids[0], 10)
    m = memory.create(writer, first, 1)

    def step(m, inputs):
      i, key = inputs
      return memory.write_then_draw(writer, m, batch_of(i, 10), key), None

    m, _ = jax.lax.scan(step, m, (ids, jax.random.split(key, 12)))
    return m.rows.x[:capacity, 0]

  kept = np.asarray(quick(jax.vmap(one))(jax.random.split(jax.random.key(0), runs)))
  share = np.bincount(kept.ravel(), minlength=n) / runs
  spread = np.sqrt(0.2 * 0.8 / runs)
  assert np.all(np.abs(share - 0.2) < 4.5 * spread)
  assert share.std() > 0.3 * spread  # it is random


def test_ring_keeps_the_last_of_each_class():
  ids = np.arange(60).reshape(12, 5)
  m = fill(memory.ring(9, 3), [batch_of(i, 3) for i in ids], jax.random.key(0))
  assert sorted(np.asarray(m.rows.x)[:9, 0]) == list(range(51, 60))


def test_ring_per_task_does_not_touch_other_tasks():
  writer = memory.ring(12, 3, tasks=2)
  first = [
    batch_of(i, 3)._replace(task=jnp.zeros(5, jnp.int32)) for i in np.arange(30).reshape(6, 5)
  ]
  second = [b._replace(x=b.x + 100, task=jnp.ones(5, jnp.int32)) for b in first]
  before = fill(writer, first, jax.random.key(0))
  after = fill(writer, first + second, jax.random.key(0))
  np.testing.assert_array_equal(before.rows.x[:6], after.rows.x[:6])
  assert (np.asarray(after.rows.x)[6:12] >= 100).all()


def test_class_balanced_evens_out_an_uneven_stream():
  """A class with 5 % of the stream keeps about a third of the memory; the reservoir gives it 5 %."""
  rng = np.random.default_rng(0)
  labels = rng.choice(3, size=(60, 5), p=[0.8, 0.15, 0.05])
  batches = [batch_of(np.arange(5), 3)._replace(y=jnp.asarray(row, jnp.int32)) for row in labels]
  share = {}
  for name in ('class_balanced', 'greedy', 'reservoir'):
    m = fill(writers.writer(name, 24, 3), batches, jax.random.key(1))
    share[name] = np.bincount(np.asarray(m.rows.y)[:24], minlength=3)
  assert share['class_balanced'].min() >= 7 and share['greedy'].min() >= 7
  assert share['reservoir'][2] <= 5


@pytest.mark.long
@given(total=st.integers(0, 40), n=st.integers(1, 12), seed=st.integers(0, 10_000))
def test_distinct(total, n, seed):
  i, w = memory.distinct(jax.random.key(seed), n, jnp.int32(total))
  real = np.asarray(i)[np.asarray(w) > 0]
  assert len(real) == min(n, total) == len(set(real.tolist()))
  assert ((real >= 0) & (real < max(total, 1))).all()


def test_equal_slots_are_written_once():
  slots = memory.last_wins(jnp.array([3, 1, 3, 9, 1, 9]), 9)
  assert slots.tolist() == [9, 9, 3, 9, 1, 9]


def test_too_small_a_ring_is_refused():
  with pytest.raises(ValueError, match='at least 20'):
    memory.ring(19, 10, 2)
  with pytest.raises(ValueError, match='one of reservoir, ring, class_balanced'):
    writers.writer('resevoir', 10, 2)
