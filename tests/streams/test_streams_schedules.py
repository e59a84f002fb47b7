import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_jax.errors import UserError
from cl_jax.streams import (
  Plan,
  blurry,
  cumulative,
  joint,
  online,
  permuted,
  reordered,
  split,
  task_free,
  tell,
)
from cl_jax.streams.check import check


def entries(legs):
  return [leg[leg >= 0].tolist() for leg in legs]


@pytest.fixture(scope='module')
def base(numbered):
  return split(numbered(6, 6), numbered(2, 6), 'class', (1, 2, 3), plan=Plan(4, ends_batch=5))


@pytest.fixture(scope='module')
def viewed(images):
  return permuted(images(20), images(10), 'class', 3, plan=Plan(4, ends_batch=8))


def test_joint_is_one_leg_with_every_example(base, viewed):
  stream = check(joint(base, Plan(4, epochs=2, ends_batch=7)))
  assert stream.index.shape == (1, 18, 4) and stream.steps is None and stream.scenario == 'joint'
  count = len(base.y)
  every = sorted(t * count + n for t, leg in enumerate(entries(base.ends)) for n in leg)
  assert sorted(entries(stream.index)[0]) == sorted(every * 2)
  assert sorted(entries(stream.ends)[0]) == every
  assert stream.test is base.test and stream.tasks == 3
  stream = check(joint(viewed, Plan(6)))
  assert sorted(entries(stream.index)[0]) == list(range(60))  # 20 examples as 3 tasks see them


def test_cumulative_adds_a_task_a_leg(base):
  stream = check(cumulative(base, Plan(4)))
  count, seen = len(base.y), []
  for t, (leg, ends) in enumerate(zip(entries(stream.index), entries(stream.ends), strict=True)):
    seen += [t * count + n for n in entries(base.ends)[t]]
    assert sorted(leg) == sorted(ends) == sorted(seen)
  assert stream.steps.tolist() == [2, 5, 9]
  assert check(cumulative(base, Plan(4, iterations=3))).index.shape == (3, 3, 4)


def test_schedules_depend_on_examples_and_seed_only(numbered):
  train, test = numbered(6, 6), numbered(2, 6)
  make = lambda s: split(train, test, 'class', 3, plan=Plan(3, seed=s))  # noqa: E731
  plan = Plan(4, seed=7)
  for schedule in (reordered, joint, cumulative, blurry):
    one, two = schedule(make(0), plan), schedule(make(1), plan)
    assert np.array_equal(one.index, two.index) and np.array_equal(one.ends, two.ends)
    other = schedule(make(0), plan._replace(seed=8))
    assert not np.array_equal(one.index, other.index)


def test_online_is_one_pass_and_tells_nothing(base):
  stream = check(online(base, Plan(batch=2)))
  for leg, pool in zip(entries(stream.index), entries(base.ends), strict=True):
    assert sorted(leg) == sorted(pool)
  assert stream.scenario == 'online' and stream.told == () and stream.index.shape[-1] == 2
  assert online(base).index.shape[-1] == 10
  with pytest.raises(UserError, match='one pass'):
    online(base, Plan(epochs=2))
  with pytest.raises(UserError, match="separate tasks; this one is 'joint'"):
    online(joint(base))


def test_tell_changes_the_tests_too(numbered):
  stream = split(numbered(2, 4), numbered(1, 4), 'task', 2)
  assert stream.test.task[:, 0, 0].tolist() == [0, 1]
  free = check(task_free(stream))
  assert free.told == () and (free.test.task == -1).all()
  assert np.array_equal(free.index, stream.index)
  again = tell(free, ('task_test',))
  assert np.array_equal(again.test.task, stream.test.task)
  assert (free.test.task == -1).all()  # the other stream is untouched


@given(
  epochs=st.integers(1, 3),
  segments=st.integers(1, 4),
  width=st.floats(0, 3),
  by=st.sampled_from(['task', 'class']),
  batch=st.integers(1, 8),
)
@settings(deadline=None, max_examples=30)
def test_blurry_keeps_every_example(base, epochs, segments, width, by, batch):
  plan = Plan(batch, epochs, ends_batch=4)
  stream = check(blurry(base, plan, segments, by, width))
  assert len(stream.index) == segments and stream.told == () and stream.scenario == 'blurry'
  count = len(base.y)
  every = sorted(t * count + n for t, leg in enumerate(entries(base.ends)) for n in leg)
  seen = [entry for leg in entries(stream.index) for entry in leg]
  assert sorted(seen) == sorted(every * epochs)
  for leg, ends in zip(entries(stream.index), entries(stream.ends), strict=True):
    assert sorted(set(leg)) == sorted(ends)
  assert (stream.test.task == -1).all()


def arrivals(stream, units):
  """Mean and spread of the place in the stream, 0 to 1, of each task's (or label's) examples."""
  flat = stream.index.reshape(-1)
  flat = flat[flat >= 0]
  unit = units(flat)
  place = np.arange(len(flat)) / len(flat)
  groups = [place[unit == u] for u in np.unique(unit)]
  return np.array([g.mean() for g in groups]), np.array([g.std() for g in groups])


def test_blurry_peaks_move_along_the_stream(numbered):
  base = split(numbered(200, 8), numbered(1, 8), 'class', 4, order_seed=2, plan=Plan(8))
  by_task = lambda entry: entry // len(base.y)  # noqa: E731
  means, narrow = arrivals(blurry(base, Plan(8), width=0.3), by_task)
  assert np.abs(means - [0.125, 0.375, 0.625, 0.875]).max() < 0.04
  _, wide = arrivals(blurry(base, Plan(8), width=1.0), by_task)
  assert (wide > 1.3 * narrow).all()
  # width 0: the tasks follow each other
  hard = blurry(base, Plan(8), width=0.0).index.reshape(-1)
  assert (np.diff(by_task(hard)) >= 0).all()
  # P(N(0, 1) < -0.5 / 0.3) = 4.8 % of task 1 comes before its half-way point from task 0, of 400
  flat = blurry(base, Plan(8), width=0.3).index.reshape(-1)
  early = by_task(flat[:400]) == 1
  assert abs(early.sum() / 400 - 0.048) < 0.043  # 4 standard deviations
  order = [c for classes in base.task_classes for c in classes]
  means, _ = arrivals(
    blurry(base, Plan(8), by='class', width=0.3),
    lambda e: np.argsort(order)[base.y[e % len(base.y)]],
  )
  assert np.abs(means - (np.arange(8) + 0.5) / 8).max() < 0.04


def test_blurry_by_class_of_permuted_tasks(viewed):
  stream = check(blurry(viewed, Plan(1), by='class', width=0.0))
  flat = stream.index[stream.index >= 0].reshape(-1)
  label = viewed.y[flat % 20] + viewed.offset[flat // 20]
  assert (np.diff(label) >= 0).all() and set(label.tolist()) == set(range(15))


def test_mistakes_are_named(base):
  for make, message in (
    (lambda: blurry(base, segments=0), 'segments must lie between 1 and'),
    (lambda: blurry(base, segments=100), 'segments must lie between 1 and'),
    (lambda: blurry(base, width=-1.0), 'width must be'),
    (lambda: blurry(base, width=float('nan')), 'width must be'),
    (lambda: blurry(base, by='label'), "by must be 'task' or 'class'"),
    (lambda: blurry(base, Plan(iterations=3)), 'counted in epochs'),
    (lambda: reordered(blurry(base, Plan(4))), 'cannot be reordered'),
    (lambda: joint(cumulative(base)), "this one is 'cumulative'"),
    (lambda: tell(base, ('boundaries',)), 'told must be'),
    (lambda: joint(base, Plan(batch=-1)), 'batch must be'),
  ):
    with pytest.raises(UserError) as error:
      make()
    assert message in str(error.value)


def test_reordering_a_joint_stream_keeps_it_joint(base):
  stream = check(reordered(joint(base, Plan(4)), Plan(3, iterations=5)))
  assert stream.scenario == 'joint' and stream.index.shape == (1, 5, 3)
  assert jax.tree.structure(stream) == jax.tree.structure(joint(base, Plan(4)))
