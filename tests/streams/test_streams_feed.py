"""Examples that stay in their files: the same run as from memory, in the same order for all workers."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from operator import itemgetter
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from grain._src.python.dataset.transformations import process_prefetch

from cl_jax import compression, run, run_chunks, streams
from cl_jax.compose import chain
from cl_jax.learner import learner
from cl_jax.loop import host_feed
from cl_jax.methods.regularisation.ewc import ewc
from cl_jax.methods.replay.er import er
from cl_jax.models.mlp import mlp
from cl_jax.streams import Plan, Records, dataset, grain_feed, stored
from cl_jax.streams import feed as feeds
from cl_jax.streams.check import check
from cl_jax.streams.take import take
from cl_jax.types import Method
from tests.prepared import prepare
from tests.streams.test_streams_load import says

PLAN = Plan(batch=6, epochs=2, ends_batch=16)  # of 40 examples a task: 14 steps, padded


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('CL_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
    yield


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """Of the dataset, prepared once."""
  return prepare(tmp_path_factory.mktemp('data'))


def loaded(place, **options):
  return dataset('squares', place.parents[2], **options)


@pytest.fixture(scope='module')
def split(place):
  """(from memory, in files): the same stream."""
  one, two = loaded(place), loaded(place, in_files=True)
  return tuple(streams.split(*pair, 'class', 2, plan=PLAN) for pair in (one, two))


def build(hp, weights):
  return learner(mlp((8,), 4), optax.sgd(hp), chain(er=er(20, 4), ewc=ewc(1.0)))


def same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = map(jax.random.key_data, (x, y))
    np.testing.assert_array_equal(x, y)


def test_records_are_the_arrays(place, monkeypatch):
  (a, test), (b, _) = loaded(place), loaded(place, in_files=True)
  assert isinstance(b.x, Records) and b.x.shape == a.x.shape and b.x.dtype == a.x.dtype
  np.testing.assert_array_equal(b.x, a.x)
  np.testing.assert_array_equal(b.x[[[3, 50], [3, 79]]], a.x[[[3, 50], [3, 79]]])
  assert (b.y == a.y).all() and b.names == a.names
  small = [
    loaded(place, image=(3, 3, 3), train='train[:9]', **o)[0].x for o in ({}, {'in_files': True})
  ]
  np.testing.assert_array_equal(*small)
  # A stream is made without a look at a training example.
  monkeypatch.setattr(stored.Read, '__call__', lambda *given: 1 / 0)
  select = streams.Select(validation=0.2, examples_per_class=5)
  made = streams.permuted(b, test, 'domain', 2, plan=PLAN, select=select)
  assert isinstance(check(made).x, Records) and made.x.shape[0] < 40


def test_the_same_run(split):
  memory, files = split
  state, record = jax.jit(run, static_argnums=0)(build, 0.1, jax.random.key(0), memory)
  with grain_feed(files, workers=0) as feed:
    passed = list(run_chunks(build, 0.1, jax.random.key(0), files, chunk=5, feed=feed))
  same(passed[-1].state, state)
  for name in ('start', 'R', 'loss'):
    np.testing.assert_array_equal(getattr(passed[-1].record, name), getattr(record, name))
  # Resumed in the middle of a leg, by a feed that has not read what comes before.
  middle = passed[5]
  assert (middle.leg, middle.done) == (1, 5)
  with grain_feed(files, workers=0, ahead=1) as feed:
    *_, last = run_chunks(build, 0.1, jax.random.key(0), files, chunk=5, feed=feed, resume=middle)
  same(last.state, state)


def calls(stream):
  """What `run_chunks` asks for, with chunks of 4 and a jump back in the end."""
  index, ends = np.asarray(stream.index), np.asarray(stream.ends)
  yield 0, index[0, :1]
  for leg in range(len(index)):
    for lo in range(0, index.shape[1], 4):
      rows = index[leg, lo : lo + 4]
      yield leg, np.pad(rows, ((0, 4 - len(rows)), (0, 0)), constant_values=-1)
    yield leg, ends[leg]
  yield 0, index[0, 4:8]


@pytest.mark.parametrize('workers, ahead', [(0, None), (1, 3), (2, None)])
def test_any_number_of_workers(split, workers, ahead):
  memory, files = split
  wanted, asked = host_feed(memory), list(calls(files))
  *asked, back = asked
  half = len(asked) // 2 if workers == 1 else len(asked)
  with grain_feed(files, workers, ahead) as feed:
    for leg, rows in asked[:half] if workers else [*asked, back]:
      real = int((rows >= 0).any(1).sum())  # padding past the end of a leg is not used
      same(
        *(jax.tree.map(itemgetter(slice(real)), b) for b in (feed(leg, rows), wanted(leg, rows)))
      )
    for worker in multiprocessing.active_children() if workers == 1 else ():
      worker.kill()
    if workers == 1:
      says('where a worker ended', lambda: [feed(*c) for c in asked[half:]])
  assert not multiprocessing.active_children()


@pytest.mark.parametrize('kind', ['joint', 'blurry'])
def test_legs_that_mix_transformed_tasks(place, kind):
  """Entries k * N + n, from the host and from files alike."""
  make = {
    'joint': lambda s: streams.joint(s, PLAN),
    'blurry': lambda s: streams.blurry(s, Plan(batch=6), segments=2),
  }[kind]
  memory, files = (
    make(streams.permuted(*loaded(place, **o), 'class', 2, plan=PLAN))
    for o in ({}, {'in_files': True})
  )
  rows = np.asarray(memory.index[-1, :2])
  assert rows.max() >= len(memory.y)
  wanted = jax.vmap(lambda r: take(memory, r, len(memory.index) - 1))(rows)
  with grain_feed(files, workers=0) as feed:
    for read in (feed, host_feed(memory)):
      same(read(len(memory.index) - 1, rows), wanted)


def test_a_boundary_that_looks_at_no_example_has_none_read(split):
  """One that does, as of EWC, is in `test_the_same_run`."""
  memory, _ = split
  read, asked = host_feed(memory), []

  def feed(leg, rows):
    asked.append(rows.shape)
    return read(leg, rows)

  coded = chain(er=compression.memory('int4', er(20, 5)))
  for method in (
    Method(),
    coded,
  ):  # codes are made at boundaries too, and of a reservoir thrown away
    asked.clear()
    make = lambda hp, weights, m=method: learner(mlp((8,), 4), optax.sgd(hp), m)  # noqa: E731
    list(run_chunks(make, 0.1, jax.random.key(0), memory, chunk=20, feed=feed))
    assert asked == [(1, 6), (20, 6), (1, 16), (1, 16), (20, 6), (1, 16)]
  assert memory.ends.shape[1] == 3


def copied(place, tmp_path):
  return shutil.copytree(place, tmp_path / 'tfds' / 'squares' / '1.0.0')


def test_files_that_are_cut_short(place, tmp_path):
  copy = copied(place, tmp_path)
  file = copy / 'squares-train.array_record-00001-of-00002'
  content = file.read_bytes()
  damaged = 'is damaged: prepare it again'
  file.write_bytes(content[: len(content) // 2])
  says(damaged, dataset, 'squares', tmp_path, in_files=True)
  says('examples 0 to 79 cannot be read', dataset, 'squares', tmp_path, in_files=True)
  file.unlink()
  says('No such file', dataset, 'squares', tmp_path, in_files=True)
  info = (copy / 'dataset_info.json').read_text()
  (copy / 'dataset_info.json').write_text(info.replace('array_record', 'tfrecord'))
  says('--file_format=array_record', dataset, 'squares', tmp_path, in_files=True)
  says('tfds build circles', dataset, 'circles', tmp_path, in_files=True)


@pytest.mark.parametrize('workers', [0, 1])
def test_a_record_that_is_damaged_later(place, tmp_path, workers):
  """When the labels are known already, in this process and in a worker."""
  copy = copied(place, tmp_path)
  data = dataset('squares', tmp_path, in_files=True)
  stream = streams.split(*data, 'class', 2, plan=PLAN)
  file = copy / 'squares-train.array_record-00001-of-00002'
  file.write_bytes(b'\0' * file.stat().st_size)
  stored._source.cache_clear()
  with grain_feed(stream, workers) as feed:
    says('is damaged: prepare it again', lambda: [feed(*c) for c in list(calls(stream))[1:4]])


def test_what_workers_are_given_fits_in_a_pipe_and_signals_come_later(place, monkeypatch):
  """A worker that ends in its start would be waited for for ever; Ctrl-C is sent to all."""
  data = loaded(place, in_files=True)
  stream = streams.split(*data, 'class', 2, plan=Plan(batch=6, epochs=2000))
  size, blocked, real = [], [], process_prefetch._serialize_dataset

  def serialise(dataset):
    size.append(len(real(dataset)))
    blocked.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    raise RuntimeError('no worker')

  monkeypatch.setattr(process_prefetch, '_serialize_dataset', serialise)
  with grain_feed(stream, 1) as feed:
    says('no worker', lambda: feed(0, np.asarray(stream.index[0, :4])))
  assert size[0] < 1 << 15 < stream.index.nbytes
  assert {signal.SIGINT, signal.SIGTERM} <= blocked[0]
  assert not {signal.SIGINT, signal.SIGTERM} & signal.pthread_sigmask(signal.SIG_BLOCK, ())
  assert feed.folder is None


def test_a_worker_whose_run_was_killed_before_it_began_ends(monkeypatch):
  ended = threading.Event()
  gone = SimpleNamespace(join=lambda: None)  # what Python gives where the parent has ended
  monkeypatch.setattr(multiprocessing, 'parent_process', lambda: gone)
  monkeypatch.setattr(os, '_exit', lambda code: ended.set())
  monkeypatch.setattr(signal, 'signal', lambda signum, action: None)
  feeds._worker(0, 1)
  assert ended.wait(5)


def test_mistakes(split, place, monkeypatch):
  memory, files = split
  says('host_feed(stream)', grain_feed, memory)
  says('workers must be a whole number of at least 0', grain_feed, files, workers=-1)
  says('ahead must be a whole number of at least 1', grain_feed, files, ahead=0)
  says('feed=streams.grain_feed(stream)', streams.put, files)
  says('feed=', lambda: next(run_chunks(build, 0.1, jax.random.key(0), files)))
  data = loaded(place, in_files=True)
  says('leave pad at 0', streams.permuted, *data, 'domain', 2, pad=2)
  says("no option 'in_files'", dataset, 'fashion_mnist_small', in_files=True)
  monkeypatch.setitem(sys.modules, 'grain', None)
  says('needs the extra "data": pip install "cl_jax[data]"', grain_feed, files)
