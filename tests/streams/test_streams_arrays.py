import dataclasses

import numpy as np
import pytest

from cl_jax.errors import UserError
from cl_jax.streams import Plan, joint, permuted, split
from cl_jax.streams.arrays import arrays, check_pair, compact, held_out, hold_out
from cl_jax.streams.check import check


def says(message, function, *args, **kwargs):
  with pytest.raises(UserError) as error:
    function(*args, **kwargs)
  assert message in str(error.value), str(error.value)
  assert '\n' not in str(error.value)


def test_dtypes_are_the_stored_ones():
  data = arrays(
    {'a': np.zeros((2, 3)), 'b': np.zeros((2, 1), np.int64), 'c': np.zeros((2, 2, 2, 1), np.uint8),
     'd': np.zeros((2, 4), bool), 'e': np.zeros((2, 2), np.float16)},
    np.array([1, 0], np.uint8), [0, 1],
  )  # fmt: skip
  kinds = [str(data.x[k].dtype) for k in 'abcde']
  assert kinds == ['float32', 'int32', 'uint8', 'bool', 'float32']
  assert data.y.dtype == data.domain.dtype == np.int32
  assert data.names == data.domain_names == ('0', '1')


x = np.zeros((3, 2), np.float32)


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    ((x, [0.0, 1.0, 1.0]), 'labels must be integers of shape [N]; got float64[3]'),
    ((x, [[0], [1], [1]]), 'labels must be integers of shape [N]; got int64[3, 1]'),
    ((x, np.array([], int)), 'there are no examples'),
    ((x, [0, 1]), 'x has shape [3, 2] but there are 2 labels'),
    (({'t': x[:2]}, [0, 1, 1]), "x['t'] has shape [2, 2] but there are 3 labels"),
    (({}, [0, 1, 1]), 'x holds no array'),
    ((np.float32(1), [0]), 'x has shape [] but there are 1 labels'),
    ((np.zeros((3, 8, 8), np.uint8), [0, 1, 1]), 'images are [N, H, W, C]'),
    ((np.zeros((3, 0)), [0, 1, 1]), 'holds no values'),
    ((np.array(['a', 'b', 'c']), [0, 1, 1]), 'x has dtype <U1'),
    ((np.array([1j, 0, 0]), [0, 1, 1]), 'x has dtype complex128'),
    ((np.array([None, 1, 2], object), [0, 1, 1]), 'x has dtype object'),
    ((x, [0, -1, -1]), 'row 1 has label -1, outside 0 to 0 (2 such rows)'),
    ((x, [0, 1, 2], None, ('a', 'b')), 'row 2 has label 2, outside 0 to 1 (1 such rows)'),
    ((x, [0, 1, 2**40]), 'labels do not fit into 32 bits'),
    ((np.array([[2**40], [1], [1]]), [0, 1, 1]), 'x do not fit into 32 bits'),
    ((x, [0, 1, 1], [0, 1]), '2 domains for 3 labels'),
    ((x, [0, 1, 1], [0, 1, 5], (), ('a', 'b')), 'row 2 has domain 5, outside 0 to 1'),
    ((x, [0, 1, 1], None, (), ('a',)), 'domain names without domains'),
  ],
)
def test_wrong_arrays_are_named(args, message):
  says(message, arrays, *args, where='here')
  says('here: ', arrays, *args, where='here')


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf, 1e300])
def test_nan_and_infinity_are_named_with_their_row(bad):
  values = np.zeros((9, 2, 2))
  values[4, 1, 0] = values[7, 0, 0] = bad
  says("x['f'] has NaN or infinity in row 4 (2 such rows)", arrays, {'f': values}, np.arange(9) % 2)


def test_pairs_must_fit(numbered, images):
  says('1 of 3 classes have no training example (the first is 1, \'b\')', check_pair,
       arrays(x, [0, 2, 2], None, 'abc'), arrays(x, [0, 1, 2], None, 'abc'))  # fmt: skip
  says('train has 3 label names and test 2', check_pair, arrays(x, [0, 1, 2]), arrays(x, [0, 1, 1]))
  says('x is float32(2,) an example in train but float32(3,) in test', check_pair,
       arrays(x, [0, 1, 1]), arrays(np.zeros((3, 3)), [0, 1, 1]))  # fmt: skip
  says('different structures', check_pair, arrays(x, [0, 1, 1]), arrays({'a': x}, [0, 1, 1]))


def test_compact_renumbers_what_occurs():
  train = arrays(np.arange(4.0)[:, None], [5, 2, 5, 2], [3, 3, 1, 1], 'abcdef', 'wxyz')
  test = arrays(np.arange(3.0)[:, None], [2, 0, 5], [1, 3, 0], 'abcdef', 'wxyz')
  first, second = compact(train, test)
  assert first.names == second.names == ('c', 'f') and first.domain_names == ('x', 'z')
  assert first.y.tolist() == [1, 0, 1, 0] and first.domain.tolist() == [1, 1, 0, 0]
  # class 'a' and domain 'w' are not in the training data
  assert second.x[:, 0].tolist() == [0.0] and second.y.tolist() == [0]
  check_pair(first, second)


def test_hold_out_cuts_every_class_once(numbered):
  data = numbered(10, 4)
  rest, held = hold_out(data, 0.2, 0, 'test')
  assert np.bincount(held.y).tolist() == [2] * 4 and np.bincount(rest.y).tolist() == [8] * 4
  assert not set(rest.x[:, 0]) & set(held.x[:, 0])
  again, other = hold_out(data, 0.2, 0, 'test')[1], hold_out(data, 0.2, 1, 'test')[1]
  assert np.array_equal(again.x, held.x) and not np.array_equal(other.x, held.x)
  says('class 1 has one example only', held_out, np.array([0, 0, 1]), 0.5, 0, 'validation')
  says('must lie between 0 and 1; got 0', held_out, np.array([0, 0]), 0, 0, 'validation')


def test_check_names_what_is_wrong(numbered, images):
  stream = split(numbered(4, 4), numbered(2, 4), 'class', 2, plan=Plan(4))
  check(stream)
  put = dataclasses.replace

  def table(value, name='index'):
    changed = np.array(getattr(stream, name))
    changed[1, 0, 0] = value
    return put(stream, **{name: changed})

  nan = np.array(stream.x)
  nan[3] = np.nan
  twice = np.array(stream.ends)
  twice[0, 0, 1] = twice[0, 0, 0]
  empty = np.array(stream.index)
  empty[1] = -1
  late = put(stream, steps=np.array([1, 2], np.int32))
  for changed, message in (
    (table(16), 'index[1, 0, 0] lies outside -1 to 15'),
    (table(-2), 'index[1, 0, 0] lies outside -1 to 15'),
    (table(99, 'ends'), 'ends[1, 0, 0] lies outside'),
    (
      put(stream, index=stream.index.astype(np.int64)),
      'index must be int32 [legs, S, B]; got int64',
    ),
    (put(stream, index=stream.index[0]), 'index must be int32 [legs, S, B]'),
    (put(stream, index=stream.index[:1]), 'index has 1 legs and ends 2'),
    (put(stream, index=empty), 'index has no examples in leg 1'),
    (put(stream, ends=twice), 'ends repeats an example in leg 0'),
    (late, 'index has examples after step 1, the last of leg 0'),
    (put(stream, steps=np.array([3, 2], np.int32)), 'steps must be 2 numbers from 1 to 2'),
    (put(stream, x=nan), 'x has NaN or infinity in row 3'),
    (put(stream, x=stream.x[1:]), 'its leading axis must be 16'),
    (put(stream, y=stream.y + 1), 'y goes from 1 to 4, outside the 4 outputs'),
    (put(stream, y=stream.y.astype(np.int64)), 'y must be int32'),
    (put(stream, scenario='clas'), "got 'clas'"),
    (put(stream, told=('everything',)), 'told must be'),
    (put(stream, task_names=()), 'task_names is empty'),
    (put(stream, task_classes=((0, 1),)), 'task_classes has 1 entries for 2 tasks'),
    (put(stream, task_classes=((0, 1), (2, 4))), 'exceed the 4 outputs'),
    (put(stream, task_classes=([0, 1], [2, 3])), 'must be tuples'),
    (put(stream, test=stream.test._replace(w=stream.test.w * 0)), 'leaves a task without examples'),
    (put(stream, test=stream.test._replace(x=stream.test.x[..., :0])), 'test.x is float32'),
    (
      put(stream, test=stream.test._replace(x={'a': stream.test.x})),
      'test.x has another structure',
    ),
    (put(stream, test=stream.test._replace(y=stream.test.y[:1])), 'test.y must be [2, E, B]'),
    (put(stream, view=lambda x, v: x, views=np.zeros(2)), 'must be a function of a module'),
    (put(stream, views=np.zeros(2)), 'view and views must be given together'),
  ):
    says(message, check, changed)
  viewed = permuted(images(10), images(10), 'class', 2, plan=Plan(5))
  says('views has 1 entries for 2 tasks', check, put(viewed, views=viewed.views[:1]))
  says('offset must have 2 entries', check, put(viewed, offset=viewed.offset[:1]))
  says('outside the 9 outputs', check, put(viewed, classes=9))
  one = joint(stream)
  says('index has 1 legs for 2 tasks', check, put(one, scenario='class', index=stream.index[:1],
                                                 ends=stream.ends[:1]))  # fmt: skip
