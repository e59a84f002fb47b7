"""Batches read from files while the steps before them run, by grain."""

from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cl_jax.errors import UserError
from cl_jax.streams.records import Records
from cl_jax.streams.select import whole
from cl_jax.streams.take import places, shown
from cl_jax.types import Batch, Stream, Tree

THREADS = 4  # that read and decode in one process: images are decoded outside Python's lock
SHARED = (
  1 << 20
)  # bytes of a batch from which it comes from a worker in shared memory; less is sent faster


def grain_feed(stream: Stream, workers: int = 2, ahead: int | None = None) -> Feed:
  """A `feed` for `run_chunks` whose examples stay in files: grain (github.com/google/grain) reads ahead.

  The stream's index table is the order in which records are read, so batches have the same bytes for any
  number of workers, and a run that is resumed begins to read at its step: nothing of the feed is saved.

      with grain_feed(stream) as feed:
        for progress in run_chunks(build, hp, key, stream, feed=feed):
          ...

  Args:
    stream: one whose `x` is made of `Records`, as of `dataset(name, in_files=True)`; labels are in memory.
    workers: processes that read and decode; each takes every `workers`-th batch. 0 = threads of this process.
      They are started anew, importing cl_jax, so a script needs `if __name__ == '__main__':`.
    ahead: batches that are kept ready; None = as many as the first chunk has.

  Raises:
    UserError: x is in memory, grain is not installed; and from the feed: a record that cannot be read.
  """
  return Feed(stream, workers, ahead)


class Fetch(NamedTuple):
  """(rows i64[B] of x) -> their inputs, leaves [B, ...]: what runs in the workers."""

  x: Tree

  def __call__(self, rows: np.ndarray) -> Tree:
    some, place = np.unique(rows, return_inverse=True)
    return jax.tree.map(lambda leaf: np.asarray(leaf[some])[place], self.x)


@dataclasses.dataclass(frozen=True)
class Filed:
  """An array in a file, in the place of one in what workers are given.

  They get it by a pipe before they run. Where it does not fit in there and a worker ends in its start, as by
  an error in the script that it imports, the process that waits for it would do so for ever.
  """

  path: Path
  count: int

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: Any) -> np.ndarray:
    return np.asarray(_mapped(self.path)[index])


def _filed(path: Path, a: np.ndarray) -> Filed:
  np.save(path, a)
  return Filed(path, len(a))


@lru_cache(maxsize=8)
def _mapped(path: Path) -> np.ndarray:
  return np.load(path, mmap_mode='r')


class Feed:
  """See `grain_feed`. Calls that follow each other in the stream are read ahead, others are answered too."""

  def __init__(self, stream: Stream, workers: int, ahead: int | None):
    if not all(isinstance(leaf, Records) for leaf in jax.tree.leaves(stream.x)):
      raise UserError(
        "grain_feed: the stream's examples are in memory; make it of dataset(name, in_files=True), "
        'or feed it with host_feed(stream)'
      )
    self.grain = _grain()
    self.workers = whole(workers, 'workers', 0)
    self.ahead = None if ahead is None else whole(ahead, 'ahead')
    self.stream, self.index = stream, np.asarray(stream.index)
    self.show, self.count = shown(stream), len(stream.y)
    L, S = self.index.shape[:2]
    self.steps = np.full(L, S) if stream.steps is None else np.asarray(stream.steps)
    self.starts = np.concatenate([[0], np.cumsum(self.steps)])
    self.units = np.concatenate([own[:n] for own, n in zip(self.index, self.steps, strict=True)])
    self.iterator: Any = None
    self.at = -1  # the unit, a step of the whole stream, that the iterator gives next
    self.begun = False
    self.folder: tempfile.TemporaryDirectory | None = None  # of what is `Filed`

  def __call__(self, leg: int, rows: np.ndarray) -> Batch:
    """The batches `rows` i32[n, B] of leg `leg`; see `run_chunks`."""
    rows = np.asarray(rows)
    real = int((rows >= 0).any(1).sum())
    at = self._place(leg, rows, real)
    # A run begins with a look at its first batch, which its first chunk reads again.
    look = not self.begun and at == 0 and len(rows) == 1
    self.begun = True
    try:
      if at is None or look:
        parts = list(self._read(rows, 0, len(rows)))
      else:
        parts = self._follow(at, real, len(rows))
    except UserError:
      self.close()
      raise
    except Exception as error:
      self.close()
      text = ' '.join(str(error).split())[:200] or type(error).__name__
      raise UserError(
        f'grain could not read a batch of leg {leg} ({text}); where a worker ended, see what it '
        "printed, use fewer workers where memory is short, and put a script's own commands below "
        "if __name__ == '__main__':"
      ) from error
    lost = len(rows) - len(parts)  # past the end of a leg: padding that is not used
    x = jax.tree.map(lambda *a: np.concatenate([*a, *[np.zeros_like(a[0])] * lost]), *parts)
    return self.show(x, rows, leg)

  def close(self) -> None:
    """Ends the workers."""
    if self.iterator is not None:
      self.iterator.close()
    if self.folder is not None:
      self.folder.cleanup()
    self.iterator, self.folder, self.at = None, None, -1

  def __enter__(self) -> Feed:
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def _place(self, leg: int, rows: np.ndarray, real: int) -> int | None:
    """The unit that these rows begin with; None where they are no steps of the stream."""
    own = self.index[leg, : self.steps[leg]]
    if rows.shape[1] != own.shape[1] or not real:
      return None
    following = self.at - int(self.starts[leg])
    for lo in (following, *np.flatnonzero((own == rows[0]).all(1))):
      if 0 <= lo and np.array_equal(own[lo : lo + real], rows[:real]):
        return int(self.starts[leg] + lo)
    return None

  def _follow(self, at: int, real: int, n: int) -> list[Tree]:
    if at == self.at:
      parts = [next(self.iterator) for _ in range(real)]
    else:
      self.close()
      with _unheard():
        self.iterator = self._read(self.units[at:], self.workers, self.ahead or n)
        parts = [next(self.iterator) for _ in range(real)]
    self.at = at + real
    return parts

  def _read(self, rows: np.ndarray, workers: int, ahead: int) -> Any:
    """An iterator over the inputs of rows i32[n, B]."""
    wanted: Any = places(self.stream, rows, self.count)
    x = self.stream.x
    if workers:
      self.folder = tempfile.TemporaryDirectory(prefix='cl_jax-')
      folder = Path(self.folder.name)
      wanted = _filed(folder / 'wanted.npy', wanted)
      leaves, tree = jax.tree.flatten(x)
      own = [_filed(folder / f'rows{i}.npy', a.rows) for i, a in enumerate(leaves)]
      leaves = [dataclasses.replace(a, rows=r) for a, r in zip(leaves, own, strict=True)]
      x = jax.tree.unflatten(tree, leaves)
    each = -(-ahead // workers) if workers else ahead
    threads = 1 if workers else min(THREADS, ahead)
    grain = self.grain
    steps = grain.MapDataset.source(wanted).map(Fetch(x))
    steps = steps.to_iter_dataset(grain.ReadOptions(threads, threads if workers else each))
    if workers:
      small = grain.experimental.DatasetOptions(min_shm_size=SHARED)
      steps = grain.experimental.WithOptionsIterDataset(steps, small)
      options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=each)
      steps = steps.mp_prefetch(options, worker_init_fn=_worker)
    return iter(steps)


@contextmanager
def _unheard() -> Iterator[None]:
  """Processes that are started inside do not hear SIGINT and SIGTERM, also not before `_worker`.

  They are started by threads that begin inside: a thread and a process inherit what is blocked.
  """
  from multiprocessing import resource_tracker

  resource_tracker.ensure_running()  # its start would end the blocking
  before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _worker(number: int, count: int) -> None:
  """In a worker at its start: it ends with the process that reads from it, and not before that does."""
  import multiprocessing

  del number, count
  for signum in (signal.SIGINT, signal.SIGTERM):  # sent to all: the run saves its state first
    signal.signal(signum, signal.SIG_IGN)
  # Known as well where it is gone before this begins.
  parent: Any = multiprocessing.parent_process()

  def watch() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def _grain() -> Any:
  try:
    import grain
    from absl import flags
  except ImportError as error:
    raise UserError(
      f'reading data while it is learnt from needs the extra "data": pip install "cl_jax[data]" ({error})'
    ) from error
  if not flags.FLAGS.is_parsed():  # grain reads its options from there
    flags.FLAGS.mark_as_parsed()
  return grain
