import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_jax.errors import UserError
from cl_jax.streams import Plan, Select, permuted, rotated, split
from cl_jax.streams.arrays import arrays
from cl_jax.streams.check import check
from cl_jax.streams.load import dataset


def learnt(stream):
  """The numbers of the training examples of every leg, from `index`."""
  return [stream.x[leg[leg >= 0], 0].tolist() for leg in stream.index]


def numbers_of_test(stream):
  return [x[w > 0][:, 0].tolist() for x, w in zip(stream.test.x, stream.test.w, strict=True)]


def same_bytes(a, b):
  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in leaves)


@given(
  per_class=st.integers(2, 7),
  classes=st.integers(2, 7),
  tasks=st.integers(1, 7),
  batch=st.integers(1, 9),
  epochs=st.integers(1, 3),
  scenario=st.sampled_from(['task', 'class', 'domain']),
  seed=st.integers(0, 5),
  order_seed=st.none() | st.integers(0, 5),
  validation=st.sampled_from([0.0, 0.3]),
  evaluate=st.sampled_from(['test', 'valid']),
)
@settings(deadline=None, max_examples=80)
def test_split(
  numbered,
  per_class,
  classes,
  tasks,
  batch,
  epochs,
  scenario,
  seed,
  order_seed,
  validation,
  evaluate,
):
  tasks, evaluate = min(tasks, classes), evaluate if validation else 'test'
  train, test = numbered(per_class, classes), numbered(3, classes, first=1000)
  stream = check(
    split(
      train, test, scenario, tasks, order_seed=order_seed,
      plan=Plan(batch, epochs, ends_batch=4, seed=seed),
      select=Select(validation=validation, evaluate=evaluate, test_batch=4, seed=seed),
    )
  )  # fmt: skip
  legs, tests = learnt(stream), numbers_of_test(stream)
  held = min(max(1, round(validation * per_class)), per_class - 1) if validation else 0
  # every example exactly once per epoch, and nothing of a test anywhere in training
  for leg in legs:
    assert sorted(leg) == sorted(list(set(leg)) * epochs)
  trained = [number for leg in legs for number in set(leg)]
  assert len(trained) == len(set(trained)) == classes * (per_class - held)
  evaluated = [number for rows in tests for number in rows]
  assert len(evaluated) == len(set(evaluated))
  assert not set(trained) & set(evaluated)
  assert len(evaluated) == classes * (held if evaluate == 'valid' else 3)
  assert all((number >= 1000) == (evaluate == 'test') for number in evaluated)
  # held-out examples do not even reach the device
  assert len(stream.y) == len(trained)
  # each task's classes, in training and in its test
  sizes = [classes // tasks + (t < classes % tasks) for t in range(tasks)]
  parts = np.split(np.arange(classes), np.cumsum(sizes)[:-1])
  for t in range(tasks):
    original = {int(number) % classes for number in legs[t]}
    assert original == {int(number) % classes if number < 1000 else int(number - 1000) % classes
                        for number in tests[t]}  # fmt: skip
    rows = stream.index[t][stream.index[t] >= 0]
    labels = set(stream.y[rows].tolist())
    assert labels == set(stream.task_classes[t])
    assert labels == (set(range(sizes[t])) if scenario == 'domain' else original)
    if order_seed is None:
      assert original == set(parts[t].tolist())
    ends = stream.ends[t][stream.ends[t] >= 0]
    assert sorted(ends) == sorted(set(rows.tolist()))
  assert stream.classes == (max(sizes) if scenario == 'domain' else classes)
  told = (
    ('boundary', 'task_train', 'task_test') if scenario == 'task' else ('boundary', 'task_train')
  )
  assert stream.told == told
  expected = np.arange(tasks) if scenario == 'task' else np.full(tasks, -1)
  assert (stream.test.task == expected[:, None, None]).all()


def test_ragged_tasks_have_steps(numbered):
  stream = split(numbered(4, 5), numbered(1, 5), 'class', (1, 3, 1), plan=Plan(batch=2))
  assert stream.steps.tolist() == [2, 6, 2] and stream.index.shape == (3, 6, 2)
  assert (stream.index[0, 2:] == -1).all() and (stream.index[1] >= 0).all()
  assert split(numbered(4, 6), numbered(1, 6), 'class', 3, plan=Plan(2)).steps is None


def test_seeds_decide_the_bytes(numbered):
  train, test = numbered(9, 6), numbered(2, 6)

  def make(seed=0, order_seed=1, choice=0):
    select = Select(validation=0.25, examples_per_task=5, seed=choice)
    return split(
      train, test, 'class', 3, order_seed=order_seed, plan=Plan(4, seed=seed), select=select
    )

  base = make()
  assert same_bytes(base, make())
  other = make(seed=1)
  assert not np.array_equal(base.index, other.index)
  assert np.array_equal(base.x, other.x) and same_bytes(base.test, other.test)
  assert make(order_seed=2).task_classes != base.task_classes
  assert not np.array_equal(make(choice=1).x, base.x)


def test_caps(numbered):
  train, test = numbered(9, 6), numbered(5, 6)
  select = Select(examples_per_class=4, examples_per_task=7, test_per_task=3)
  stream = split(train, test, 'class', 3, plan=Plan(3), select=select)
  for leg, rows in zip(learnt(stream), numbers_of_test(stream), strict=True):
    assert len(leg) == 7 and len(rows) == 3
    assert max(np.bincount(np.array(leg, int) % 6)) <= 4
  loose = Select(examples_per_class=100, examples_per_task=1000)  # a cap is a maximum
  assert all(len(leg) == 18 for leg in learnt(split(train, test, 'class', 3, select=loose)))


def test_split_by_domain_with_classes_of_their_own(numbered):
  train, test = numbered(3, 6, domains=2), numbered(1, 6, domains=2)  # domain 0: classes 0, 2, 4
  stream = check(split(train, test, 'class', by='domain', plan=Plan(3)))
  assert stream.task_classes == ((0, 2, 4), (1, 3, 5)) and stream.classes == 6
  assert stream.task_names == ('0', '1')
  stream = check(split(train, test, 'domain', by='domain', order_seed=3, plan=Plan(3)))
  assert stream.task_classes == ((0, 1, 2), (0, 1, 2)) and stream.classes == 3


def test_split_by_domain_with_shared_classes():
  y = np.array([0, 1, 2, 0, 1, 2, 1, 2])
  domain = np.array([0, 0, 0, 1, 1, 1, 2, 2])  # class 0 is missing in domain 2
  data = arrays(np.arange(8, dtype=np.float32)[:, None], y, domain)
  stream = check(split(data, data, 'domain', by='domain', plan=Plan(4)))
  assert stream.task_classes == ((0, 1, 2), (0, 1, 2), (1, 2)) and stream.classes == 3
  assert np.array_equal(stream.y, y)  # label 1 means the same in every domain


def test_a_test_example_needs_an_output_of_its_own():
  """With labels or heads by domain a class that the domain lacks in training would get another's."""
  x = np.zeros((4, 2), np.float32)
  train = arrays(x, np.arange(4), np.array([0, 0, 1, 1]), tuple('abcd'), ('p', 'q'))
  test = arrays(x, np.array([0, 1, 2, 2]), np.array([0, 0, 1, 0]), tuple('abcd'), ('p', 'q'))
  for scenario in ('domain', 'task'):
    with pytest.raises(UserError, match="1 test examples of 'p' have classes"):
      split(train, test, scenario, by='domain')
  split(train, test, 'class', by='domain')


@pytest.mark.parametrize('scenario', ['task', 'class', 'domain'])
def test_views_share_examples_and_hold_out_once(images, scenario):
  train, test = images(40), images(10, seed=1)
  select = Select(validation=0.25, evaluate='valid')
  stream = check(permuted(train, test, scenario, 3, plan=Plan(8), select=select, view_seed=4))
  assert len(stream.y) == 30 and stream.test.w.sum() == 3 * 10
  assert stream.x.dtype == stream.test.x.dtype == np.uint8
  for leg in stream.index:
    assert sorted(leg[leg >= 0]) == list(range(30))
  kept = {image.tobytes() for image in stream.x}
  whole = {image.tobytes() for image in train.x}
  assert len(kept) == 30 and kept < whole
  for t in range(3):  # undo the permutation: the held-out images, in every task the same
    real = stream.test.w[t] > 0
    inverse = np.argsort(stream.views[t])
    plain = stream.test.x[t][real].reshape(10, 36)[:, inverse]
    assert {image.tobytes() for image in plain} == whole - kept
    labels = stream.test.y[t][real]
    first = 0 if scenario == 'domain' else 5 * t
    assert set(labels.tolist()) == set(range(first, first + 5)) == set(stream.task_classes[t])
  assert stream.classes == (5 if scenario == 'domain' else 15)


def test_view_seeds(images):
  data = images(10)
  make = lambda **k: permuted(data, data, 'domain', 2, plan=Plan(5), **k).views  # noqa: E731
  assert np.array_equal(make(view_seed=1), make(view_seed=1))
  assert not np.array_equal(make(view_seed=1), make(view_seed=2))


def test_split_mnist_has_the_protocol_counts(data_dir, decoded, monkeypatch):
  monkeypatch.setenv('CL_JAX_CACHE', str(decoded))
  train, test = dataset('mnist', data_dir)
  # Split MNIST of van de Ven & Tolias 2019: digits 0/1, 2/3, ... of the official 60,000 / 10,000.
  sizes = [12665, 12089, 11263, 12183, 11800]
  test_sizes = [2115, 2042, 1874, 1986, 1983]
  stream = check(split(train, test, 'class', 5, plan=Plan(128, iterations=2000)))
  assert stream.index.shape == (5, 2000, 128) and stream.steps is None
  assert [(e >= 0).sum() for e in stream.ends] == sizes
  assert stream.test.w.sum(axis=(1, 2)).tolist() == test_sizes
  assert stream.task_classes == ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
  domain = split(train, test, 'domain', 5, plan=Plan(128, iterations=2000))
  assert domain.classes == 2 and np.array_equal(domain.y, train.y % 2)
  # Permuted MNIST, tiny episodic memories: 1,000 examples a task, one pass, batch 10.
  one = permuted(
    train, test, 'domain', 3, plan=Plan(10),
    select=Select(examples_per_task=1000, test_per_task=100),
  )  # fmt: skip
  assert one.index.shape == (3, 100, 10) and (one.index >= 0).all()
  assert one.test.w.sum() == 300 and len(one.y) <= 3000


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(scenario='klass'), "scenario must be one of task, class, domain; got 'klass'"),
    (dict(tasks=7), '7 tasks need at least as many classes; the dataset has 6'),
    (dict(tasks=0), 'tasks must be a whole number of at least 1; got 0'),
    (dict(tasks=(2, 2)), 'must be positive and sum to 6'),
    (dict(by='topic'), "by must be 'label' or 'domain'"),
    (dict(by='domain'), 'the dataset has no domains'),
    (dict(order_seed=-1), 'order_seed must be a whole number of at least 0; got -1'),
    (dict(told=('labels',)), 'told must be a tuple with any of boundary, task_train, task_test'),
    (dict(told='boundary'), 'told must be a tuple'),
    (dict(plan=Plan(batch=0)), 'batch must be a whole number of at least 1; got 0'),
    (dict(plan=Plan(epochs=1.5)), 'epochs must be a whole number'),
    (dict(plan=Plan(iterations=0)), 'iterations must be a whole number'),
    (dict(plan=Plan(batch=99, drop_last=True)), 'drop_last leaves no batch'),
    (dict(select=Select(validation=1.0)), 'validation must be a fraction in [0, 1); got 1.0'),
    (dict(select=Select(validation=float('nan'))), 'validation must be a fraction'),
    (dict(select=Select(evaluate='valid')), "evaluate='valid' needs held-out data"),
    (dict(select=Select(evaluate='train')), "evaluate must be 'test' or 'valid'; got 'train'"),
    (dict(select=Select(examples_per_class=0)), 'examples_per_class must be a whole number'),
    (dict(select=Select(seed=-3)), 'seed must be a whole number of at least 0; got -3'),
  ],
)
def test_mistakes_are_named(numbered, change, message):
  arguments = dict(scenario='class', tasks=3) | change
  with pytest.raises(UserError) as error:
    split(numbered(4, 6), numbered(1, 6), **arguments)
  assert message in str(error.value) and '\n' not in str(error.value)


def test_mistakes_of_views_are_named(numbered, images):
  data, features = images(10), numbered(4, 5)
  for make, message in (
    (lambda: rotated(features, features, 'domain', 2), 'inputs must be uint8 images [N, H, W, C]'),
    (lambda: rotated(data, data, 'domain', 2, degrees=(1.0,)), 'one per task'),
    (lambda: rotated(data, data, 'domain', degrees=(float('nan'),)), 'finite numbers'),
    (lambda: rotated(data, data, 'domain'), 'tasks must be a whole number'),
    (lambda: permuted(features, features, 'domain', 2, pad=2), 'needs images [N, H, W, C]'),
    (lambda: permuted(data, data, 'domain', 2, pad=-1), 'pad must be a whole number of at least 0'),
    (lambda: split(data, without_class_4(data), 'class', 5), 'task 4 (4) has no test examples'),
  ):
    with pytest.raises(UserError, match='.') as error:
      make()
    assert message in str(error.value)


def without_class_4(data):
  """The same data without class 4."""
  keep = data.y < 4
  return data._replace(x=data.x[keep], y=data.y[keep])


def test_static_fields_are_hashable_and_do_not_recompile(images):
  data = images(20)
  traces = []

  @jax.jit
  def f(stream):
    traces.append(1)
    return stream.index.sum()

  for seed in range(3):
    f(permuted(data, data, 'class', 2, view_seed=seed, plan=Plan(5, seed=seed)))
  assert len(traces) == 1
