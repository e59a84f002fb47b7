"""What is learnt: two streams, the same for every contestant, and where their bytes lie for the others.

W1, permuted pixels: `tasks` permutations of 1,000 digits, one epoch in batches of 10 beside 10 replayed
ones, memory 100, SGD 0.1, a perceptron 784-h-h-10; every task evaluated on 1,000 images at the start and
after every task. W2, split images: 32x32x3, 5 tasks of 2 classes and 1,600 images, batches of 16 beside 16.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cl_jax.errors import UserError
from cl_jax.streams import arrays
from cl_jax.streams.load import dataset
from cl_jax.streams.schedules import Plan
from cl_jax.streams.splits import Select, permuted, split
from cl_jax.types import Stream

MEMORY, RATE = 100, 0.1
DRAW = {'w1': 10, 'w2': 16}


class Size(NamedTuple):
  """How much of a workload is done; the defaults are W1 and W2."""

  tasks: int = 10
  examples: int = 1000
  test: int = 1000


W1, W2 = Size(), Size(5, 1600, 200)
QUICK1, QUICK2 = Size(2, 100, 100), Size(2, 64, 50)


def first(data: arrays.Arrays, n: int) -> arrays.Arrays:
  return arrays.rows(data, np.arange(min(n, len(data.y))))


def source(name: str):
  """(train, test, name): the real data where it can be found, else Fashion-MNIST, which ships."""
  try:
    return (*dataset(name), name)
  except UserError:
    return (*dataset('fashion_mnist_small'), 'fashion_mnist_small')


def w1(size: Size = W1) -> tuple[Stream, dict]:
  """(stream, {'data': its name, 'raw': the test images before any permutation})."""
  train, test, name = source('mnist')
  test = first(test, size.test)
  stream = permuted(
    first(train, size.examples),
    test,
    'domain',
    size.tasks,
    plan=Plan(batch=10, ends_batch=250),
    select=Select(test_batch=min(size.test, 500)),
  )
  return stream, {'data': name, 'raw': test.x.reshape(len(test.y), -1)}


def w2(size: Size = W2) -> tuple[Stream, dict]:
  """(stream, {'data': its name}); grey images are padded to 32x32 and repeated in three channels."""
  train, test, name = source('cifar10')
  if name != 'cifar10':
    wide = lambda x: np.repeat(np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0))), 3, axis=3)  # noqa: E731
    train, test = (d._replace(x=wide(d.x)) for d in (train, test))
  stream = split(
    train,
    test,
    'class',
    5,
    plan=Plan(batch=16),
    select=Select(
      examples_per_class=size.examples // 2, test_per_task=size.test, test_batch=min(size.test, 200)
    ),
  )
  return stream, {'data': name}


def export(stream: Stream, facts: dict) -> Path:
  """An .npz of everything a contestant that does not use cl_jax needs.

  x u8[N, ...], y i32[N], index i32[T, S, B], test_x u8[T, n, ...], test_y i32[T, n], and for W1 views
  i32[T, 784] and raw u8[n, 784].
  """
  real = np.asarray(stream.test.w) > 0
  count = real.reshape(len(real), -1).sum(1).min()
  flat = lambda a: np.asarray(a).reshape(len(real), -1, *a.shape[3:])[:, :count]  # noqa: E731
  folder = Path(tempfile.mkdtemp(prefix='cl_jax_bench_'))
  given = {k: v for k, v in facts.items() if isinstance(v, np.ndarray)}
  if stream.views is not None:
    given['views'] = np.asarray(stream.views)
  path = folder / 'stream.npz'
  np.savez(
    path,
    x=np.asarray(stream.x),
    y=np.asarray(stream.y),
    index=np.asarray(stream.index),
    test_x=flat(stream.test.x),
    test_y=flat(stream.test.y),
    **given,
  )
  return path


def remove(path: Path) -> None:
  os.unlink(path)
  path.parent.rmdir()
