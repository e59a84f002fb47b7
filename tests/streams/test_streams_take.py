import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax.streams import Plan, cumulative, joint, permuted, rotated, split, task_free
from cl_jax.streams.arrays import arrays
from cl_jax.streams.take import put, take

fast = jax.jit(take)


def test_rows_padding_and_labels(numbered):
  train = numbered(2, 4)
  stream = split(train, numbered(1, 4), 'task', 2)
  batch = fast(put(stream), jnp.array([5, -1, 0, -1], jnp.int32), 1)
  assert batch.w.tolist() == [1, 0, 1, 0] and batch.w.dtype == jnp.float32
  assert batch.x[:, 0].tolist() == [train.x[5, 0], train.x[0, 0], train.x[0, 0], train.x[0, 0]]
  assert batch.y.tolist() == [train.y[5], train.y[0], train.y[0], train.y[0]]
  assert batch.y.dtype == batch.task.dtype == jnp.int32
  assert batch.task.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize('scenario', ['task', 'class', 'domain'])
def test_told_or_untold(numbered, scenario):
  stream = split(numbered(2, 4), numbered(1, 4), scenario, 2)
  for t in range(2):
    assert set(fast(put(stream), stream.index[t, 0], t).task.tolist()) == {t}
    assert set(fast(put(task_free(stream)), stream.index[t, 0], t).task.tolist()) == {-1}


def test_trees_of_inputs():
  tokens = np.arange(12, dtype=np.int32).reshape(4, 3)
  data = arrays({'tokens': tokens, 'mask': tokens % 2 == 0}, [0, 1, 0, 1])
  stream = put(split(data, data, 'class', 2))
  batch = fast(stream, jnp.array([2, -1], jnp.int32), 0)
  assert batch.x['tokens'].tolist() == [tokens[2].tolist(), tokens[0].tolist()]
  assert batch.x['mask'].dtype == bool and batch.x['tokens'].dtype == jnp.int32


@pytest.mark.parametrize('schedule', [joint, cumulative])
@pytest.mark.parametrize('build', [permuted, rotated])
def test_mixed_batches_see_each_example_as_its_own_task_does(images, schedule, build):
  data = images(10)
  stream = build(data, data, 'task', 3, plan=Plan(4))
  mixed = put(schedule(stream, Plan(8)))
  rows = np.asarray(mixed.ends[-1]).ravel()
  batch = fast(mixed, rows, 0)
  assert sorted(rows[rows >= 0]) == list(range(30))
  for i, row in enumerate(rows):
    task, n = max(row, 0) // 10, max(row, 0) % 10
    alone = fast(put(stream), jnp.array([n], jnp.int32), task)
    assert np.array_equal(batch.x[i], alone.x[0]) and batch.y[i] == alone.y[0]
    assert batch.task[i] == alone.task[0] == task and batch.w[i] == (row >= 0)


def test_joint_of_a_split_tells_the_task_of_every_example(numbered):
  stream = split(numbered(3, 6), numbered(1, 6), 'task', 3)
  together = put(joint(stream, Plan(18)))
  batch = fast(together, together.index[0, 0], 0)
  assert batch.task.tolist() == (batch.y // 2).tolist() and set(batch.task.tolist()) == {0, 1, 2}


def test_it_is_traceable_and_compiles_once(images):
  data = images(10)
  stream = put(permuted(data, data, 'class', 3, plan=Plan(5)))

  @jax.jit
  def whole(stream):
    def leg(t):
      batches = jax.vmap(lambda rows: take(stream, rows, t))(stream.index[t])
      return batches.x.astype(jnp.int32).sum(), batches.y

    return jax.lax.map(leg, jnp.arange(3))

  total, labels = whole(stream)
  assert (total == int(data.x.sum())).all()
  assert [sorted(row.ravel().tolist()) for row in labels] == [
    sorted((data.y + 5 * t).tolist()) for t in range(3)
  ]
  before = fast._cache_size()
  for t in range(3):
    fast(stream, stream.index[t, 0], jnp.int32(t))
  assert fast._cache_size() - before == 1


def test_numpy_streams_need_no_put(images):
  data = images(10)
  stream = permuted(data, data, 'class', 2, plan=Plan(5))
  batch = jax.jit(lambda rows, t: take(stream, rows, t))(stream.index[1, 0], 1)
  assert np.array_equal(batch.x, fast(put(stream), stream.index[1, 0], 1).x)
