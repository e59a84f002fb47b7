"""The loop: `run` is a whole stream as one program, `run_chunks` the same steps a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from cl_jax.errors import UserError
from cl_jax.streams.records import in_files
from cl_jax.streams.take import places, shown, take, without_data
from cl_jax.types import Array, Batch, Learner, State, Stream, Tree

Build = Callable[[Tree, Tree], Learner]  # (hyperparameters, weights) -> Learner


class Record(NamedTuple):
  """What a run leaves behind besides its final state.

  Attributes:
    start: f32[T], accuracy on every task before training.
    R: f32[L, T], accuracy on every task after every leg.
    loss: f32[L, S] of every step; NaN where leg l has fewer than S steps.
    curve: f32[L, S // every, T], accuracy every `every` steps; [L, 0, T] when every = 0.
  """

  start: Array
  R: Array
  loss: Array
  curve: Array


def check_needs(needs: tuple[str, ...], stream: Stream) -> None:
  """Raises UserError when the method needs what the scenario does not tell: no silent oracle."""
  if missing := [n for n in needs if n != 'batch_test' and n not in stream.told]:
    raise UserError(
      f'the method needs {", ".join(missing)}, which the {stream.scenario!r} scenario does not tell '
      f'(it tells {", ".join(stream.told) or "nothing"}): choose another scenario or another method'
    )


def run(
  build: Build, hp: Tree, key: Array, stream: Stream, weights: Tree = None, every: int = 0
) -> tuple[State, Record]:
  """Learns the whole stream in one traceable program: jit it, vmap it, map it.

  `jax.jit(run, static_argnums=(0, 5))(build, hp, key, stream)`.

  Args:
    build: (hp, weights) -> Learner, called inside the trace.
    hp: pytree of hyperparameters; floats may be mapped.
    key: typed key of this run.
    stream: see `Stream`.
    weights: pretrained weights, shared by mapped runs.
    every: also evaluate every `every` steps inside each leg (stability gap); 0 = at the ends only.

  Returns:
    The final state and the `Record`.
  """
  learner = build(hp, weights)
  check_needs(learner.needs, stream)
  state, start = begin(learner, key, stream, take(stream, stream.index[0, 0], 0))

  def leg(state, t):
    state, loss, curve = learn(learner, state, stream, t, every)
    state, acc = close(learner, state, stream, t)
    return state, (acc, loss, curve)

  state, (R, loss, curve) = jax.lax.scan(leg, state, jnp.arange(stream.index.shape[0]))
  return state, Record(start, R, loss, curve)


def begin(learner: Learner, key: Array, stream: Stream, first: Batch) -> tuple[State, Array]:
  """The initial state, and the accuracy f32[T] before training."""
  state = strong(learner.init(key, first))
  return state, evaluate(learner, state, stream.test)


def strong(state: State) -> State:
  """The state without weak types, which would make the next call of a chunk compile again."""
  key = jax.dtypes.prng_key
  return jax.tree.map(
    lambda a: a if jnp.issubdtype(a.dtype, key) else jax.lax.convert_element_type(a, a.dtype), state
  )


def advance(
  learner: Learner, state: State, stream: Stream, fetch: Callable, t: Array, lo: Array, n: int
):
  """Steps lo .. lo + n of leg t, of which those past its end are left out.

  `fetch(i)` is the batch of step lo + i. Returns (state, loss f32[n], NaN where left out).
  """
  S = stream.index.shape[1]
  last = S if stream.steps is None else stream.steps[t]
  whole = stream.steps is None and isinstance(lo, int)  # then the trip count is static: a scan
  end = min(n, S - lo) if whole else jnp.clip(last - lo, 0, n)

  def body(i, carry):
    state, loss = carry
    state, value = learner.step(state, fetch(i))
    return state, loss.at[i].set(value)

  start = (state, jnp.full(n, jnp.nan, jnp.float32))
  state, loss = jax.lax.fori_loop(0, end, body, start)
  return strong(state), loss


def learn(learner: Learner, state: State, stream: Stream, t: Array, every: int):
  """All steps of leg t: (state, loss f32[S], curve f32[S // every, T])."""
  S = stream.index.shape[1]

  def ahead(state, lo, n):
    fetch = lambda i: take(stream, stream.index[t, lo + i], t)  # noqa: E731
    return advance(learner, state, stream, fetch, t, lo, n)

  if not every:
    state, loss = ahead(state, 0, S)
    return state, loss, jnp.zeros((0, stream.tasks))

  def piece(state, lo):
    state, loss = ahead(state, lo, every)
    acc = evaluate(learner, state, stream.test)
    inside = lo + every <= (S if stream.steps is None else stream.steps[t])
    return state, (loss, jnp.where(inside, acc, jnp.nan))

  pieces = S // every
  state, (loss, curve) = jax.lax.scan(piece, state, jnp.arange(pieces) * every)
  if S == pieces * every:
    return state, loss.reshape(-1), curve
  state, rest = ahead(state, pieces * every, S - pieces * every)
  return state, jnp.concatenate([loss.reshape(-1), rest]), curve


def close(
  learner: Learner, state: State, stream: Stream, t: Array, batches: Batch | None = None
) -> tuple[State, Array]:
  """The end of leg t: its boundary, where boundaries are told, then the accuracy on every task."""
  if 'boundary' in stream.told:
    if batches is None:
      batches = jax.vmap(lambda rows: take(stream, rows, t))(stream.ends[t])
    state = strong(learner.boundary(state, batches))
  return state, evaluate(learner, state, stream.test)


def evaluate(learner: Learner, state: State, test: Batch) -> Array:
  """f32[T]: the accuracy on every task (or what `Model.measure` says); `test` has leaves [T, E, B, ...]."""

  def accuracy(state, batch):
    right = learner.predict(state, batch).argmax(-1) == batch.y
    return jnp.stack([batch.w * right, batch.w], -1)

  def total(batch):
    return (learner.measure or accuracy)(state, batch).sum(0)

  value, weight = jax.lax.map(lambda b: jax.lax.map(total, b).sum(0), test).T
  return value / weight


def confusion(learner: Learner, state: State, test: Batch, classes: int) -> Array:
  """i32[C, C]: how often label i (row) was predicted as j (column), over all tasks' test examples."""

  def count(matrix, batch):
    guess = learner.predict(state, batch).argmax(-1)
    return matrix.at[batch.y, guess].add(batch.w.astype(jnp.int32)), None

  flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), test)
  return jax.lax.scan(count, jnp.zeros((classes, classes), jnp.int32), flat)[0]


class Progress(NamedTuple):
  """Where a chunked run stands: what a checkpoint of it holds.

  Attributes:
    state: the learner's state.
    record: NumPy arrays, filled as far as the run has come; NaN after that.
    leg: legs that are complete.
    done: steps done in the current leg.
  """

  state: State
  record: Record
  leg: int
  done: int


class Programs(NamedTuple):
  """The compiled parts of a chunked run; see `programs`."""

  begin: Callable
  advance: Callable
  close: Callable
  probe: Callable
  chunk: int


def programs(
  build: Build, chunk: int = 100, lift: Callable | None = None, donate: bool = False
) -> Programs:
  """Jits what `run_chunks` calls; keep it to run, or resume, several times without compiling anew.

  Args:
    build: (hp, weights) -> Learner.
    chunk: steps between two yields.
    lift: (f, mapped) -> f over many runs, where `mapped` names the arguments with a leading run axis;
      see `sweep.Many`. Then hp, key, and what else it maps have that axis, and so has every leaf of
      the record.
    donate: the new state takes the place of the old one, which then is gone. Without it both are there at
      once, which a large model has no room for.
  """
  gone = ('state',) if donate else ()
  over = lift or (lambda f, mapped: f)

  def begin_one(hp, key, stream, weights, first):
    first = take(stream, stream.index[0, 0], 0) if first is None else first
    return begin(build(hp, weights), key, stream, first)

  def advance_one(hp, state, stream, weights, t, lo, batches):
    def fetch(i):
      if batches is None:
        return take(stream, stream.index[t, lo + i], t)
      return jax.tree.map(lambda a: a[i], batches)

    return advance(build(hp, weights), state, stream, fetch, t, lo, chunk)

  def close_one(hp, state, stream, weights, t, batches):
    return close(build(hp, weights), state, stream, t, batches)

  def probe_one(hp, state, stream, weights):
    return evaluate(build(hp, weights), state, stream.test)

  return Programs(
    jax.jit(over(begin_one, ('hp', 'key', 'stream'))),
    jax.jit(over(advance_one, ('hp', 'state', 'stream')), donate_argnames=gone),
    jax.jit(over(close_one, ('hp', 'state', 'stream')), donate_argnames=gone),
    jax.jit(over(probe_one, ('hp', 'state', 'stream'))),
    chunk,
  )


def run_chunks(
  build: Build,
  hp: Tree,
  key: Array,
  stream: Stream,
  weights: Tree = None,
  chunk: int = 100,
  every: int = 0,
  resume: Progress | None = None,
  feed: Callable | None = None,
  lift: Callable | None = None,
  parts: Programs | None = None,
  donate: bool = False,
) -> Iterator[Progress]:
  """The same run as `run`, yielding after the start, after every chunk of steps and after every leg.

  The steps, their order and their keys are those of `run`, bitwise.

  Args:
    build, hp, key, stream, weights, every: as for `run`; hp and key have a run axis with `lift`.
    chunk: steps between two yields; `every` takes its place where it is set.
    resume: a `Progress` of this run, of whatever process: go on from there.
    feed: (leg, rows i32[n, B]) -> Batch with leaves [n, B, ...], for data that stays on the host or in files;
      `None` takes the rows from the data on the device. See `host_feed` and `streams.grain_feed`. Of a
      leg's `ends` it is asked for the first batch only where the boundary does not look at them.
    lift, donate: see `programs`; with `donate` the state that was yielded last is all there is.
    parts: `programs(build, every or chunk, lift, donate)`, where they exist already.

  Yields:
    `Progress`.
  """
  learner = build(hp, weights)
  check_needs(learner.needs, stream)
  chunk = every or chunk
  parts = parts or programs(build, chunk, lift, donate)
  if parts.chunk != chunk:
    raise ValueError(f'the programs advance by {parts.chunk} steps, not by {chunk}')
  L, S = stream.index.shape[-3:-1]
  if feed is not None and np.ndim(stream.index) != 3:
    raise ValueError('mapped runs take their data from the device: give feed or lift, not both')
  host_index = None if feed is None else np.asarray(stream.index)
  if feed is None and in_files(stream.x):
    raise UserError(
      "the stream's examples stay in files: pass feed=streams.grain_feed(stream) to run_chunks"
    )
  resident = stream if feed is None else without_data(stream)

  def rows(leg, lo):  # the batches of a chunk; past the end of a leg comes padding that is not used
    if feed is None or host_index is None:
      return None
    wanted = host_index[leg, lo : lo + chunk]
    short = chunk - len(wanted)
    return feed(leg, np.pad(wanted, ((0, short), (0, 0)), constant_values=-1))

  # The examples of a leg once, as far as its boundary looks at them.
  def at_end(feed: Callable, leg: int, state: State) -> Batch:
    own = np.asarray(stream.ends[leg])
    if 'boundary' in stream.told and not seen:
      seen.append(len(own) == 1 or looks(learner, state, feed(leg, own[:1])))
    return feed(leg, own if seen and seen[0] else own[:1])

  seen: list[bool] = []  # filled at the first boundary
  if resume is None:
    first = None
    if feed is not None and host_index is not None:
      first = jax.tree.map(lambda a: a[0], feed(0, host_index[0, :1]))
    state, start = parts.begin(hp, key, resident, weights, first)
    lead = start.shape[:-1]
    T, K = stream.tasks, S // every if every else 0

    def empty(*shape: int) -> Any:
      return np.full((*lead, *shape), np.nan, np.float32)

    record = Record(jax.device_get(start), empty(L, T), empty(L, S), empty(L, K, T))
    leg, done = 0, 0
    yield Progress(state, record, leg, done)
  else:
    state, record, leg, done = resume
    record = jax.tree.map(np.array, record)
    leg, done = int(leg), int(done)

  steps = np.full(L, S) if stream.steps is None else np.asarray(stream.steps)
  longest = steps.reshape(-1, L).max(0)
  while leg < L:
    while done < longest[leg]:
      state, loss = parts.advance(hp, state, resident, weights, leg, done, rows(leg, done))
      n = min(chunk, S - done)
      record.loss[..., leg, done : done + n] = np.asarray(loss)[..., :n]
      if every and done + every <= longest[leg]:
        acc = np.asarray(parts.probe(hp, state, resident, weights))
        inside = (done + every <= steps[..., leg])[..., None]
        record.curve[..., leg, done // every, :] = np.where(inside, acc, np.nan)
      done = min(done + chunk, int(longest[leg]))
      yield Progress(state, record, leg, done)
    ends = None if feed is None else at_end(feed, leg, state)
    state, acc = parts.close(hp, state, resident, weights, leg, ends)
    record.R[..., leg, :] = np.asarray(acc)
    leg, done = leg + 1, 0
    yield Progress(state, record, leg, done)


def looks(learner: Learner, state: State, batches: Batch) -> bool:
  """Whether the learner's boundary looks at the task's examples; where it does not they need not be read.

  A boundary that knew only how many there are, by a shape, would be taken for one that does not look.
  """
  jaxpr = jax.make_jaxpr(learner.boundary)(state, batches).jaxpr
  # What is computed of them and thrown away, as codes of a memory that writes nothing, does not count.
  _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return any(used[-len(jax.tree.leaves(batches)) :])


def host_feed(stream: Stream) -> Callable:
  """A `feed` for `run_chunks` that gathers rows from host arrays (NumPy, memory-mapped files)."""
  show, count = shown(stream), len(stream.y)

  def feed(leg: int, rows: np.ndarray) -> Batch:
    n = places(stream, rows.reshape(-1), count)
    return show(jax.tree.map(lambda a: np.asarray(a[n]), stream.x), rows, leg)

  return feed
