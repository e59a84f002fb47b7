"""Runs of one program, side by side: their arguments, where these lie, and what is kept of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cl_jax import checkpoint, shard
from cl_jax.loop import Progress, Record, begin, programs
from cl_jax.report.lines import flat
from cl_jax.streams import cache
from cl_jax.streams.feed import Feed, grain_feed
from cl_jax.streams.records import in_files
from cl_jax.streams.take import show, without_data
from cl_jax.sweep import MAPPED, Many, calibrate, default_width, stack_streams
from cl_jax.types import Stream, Tree
from experiments.build import Setup, example, hyper, stacked


class Job(NamedTuple):
  """Runs that share one compiled program.

  Attributes:
    setup: of that program.
    configs, seeds, streams: of each run.
    labels: what messages call each run: its seed, and how it differs from the others.
    name: in messages, the job.
    workdir: where it leaves its files.
    folder: of its checkpoints.
    sha256: of what the runs are; a checkpoint of other runs is refused.
    width: runs computed at once on a device; None by default_width, 0 by measurement.
    cut: how its one run is spread over all devices, of all processes; None where runs are mapped over them.
  """

  setup: Setup
  configs: list[dict[str, Any]]
  seeds: list[int]
  streams: list[Stream]
  labels: list[str]
  name: str
  workdir: Path
  folder: Path
  sha256: str
  width: int | None = None
  cut: shard.Cut | None = None


class Plan(NamedTuple):
  """How a job is spread: its arguments padded to whole rows of devices, and where they lie.

  Attributes:
    n: runs with their padding; the last run is repeated, and its copies are dropped at the end.
    lift: for `run_chunks`; None for a single run, which is not mapped.
    stream, hp, key, weights: the arguments.
    place: moves a tree with a leading run axis to its devices.
    width: runs computed at once on a device.
    cut: see `Job`; then the state of a step takes the place of the one before.
  """

  n: int
  lift: Callable | None
  stream: Stream
  hp: Tree
  key: jax.Array
  weights: Tree
  place: Callable[[Tree], Tree]
  width: int = 1
  cut: shard.Cut | None = None


def spread(job: Job) -> Plan:
  runs = len(job.seeds)
  hps = [hyper(c, s) for c, s in zip(job.configs, job.streams, strict=True)]
  if job.cut is not None:
    cut = job.cut
    place = lambda tree: shard.put(cut, tree)  # noqa: E731
    key = shard.put(cut, jax.random.key(job.seeds[0]), cut.whole)
    stream = shard.put(cut, job.streams[0], cut.whole)
    return Plan(1, None, stream, hps[0], key, place(job.setup.weights), place, cut=cut)
  if runs == 1:
    put = jax.device_put
    key, stream = jax.random.key(job.seeds[0]), job.streams[0]
    if in_files(stream.x):  # read by the feed: see `feed`
      stream = without_data(stream)
    return Plan(1, None, put(stream), hps[0], key, put(job.setup.weights), put)
  devices = tuple(jax.devices()[:runs])
  order = [min(i, runs - 1) for i in range(-(-runs // len(devices)) * len(devices))]
  stream, axes = stack_streams([job.streams[i] for i in order])
  mesh = Mesh(np.array(devices), ('runs',))
  apart = NamedSharding(mesh, PartitionSpec('runs'))
  whole = NamedSharding(mesh, PartitionSpec())
  # Placed once: what lay elsewhere would be copied to every device in every chunk.
  place = lambda tree: jax.device_put(tree, apart)  # noqa: E731
  stream = jax.tree.map(
    lambda a, axis: jax.device_put(a, apart if axis == MAPPED else whole), stream, axes
  )
  key = jnp.stack([jax.random.key(job.seeds[i]) for i in order])
  weights = jax.device_put(job.setup.weights, whole)
  hp = place(stacked([hps[i] for i in order]))
  plan = Plan(len(order), None, stream, hp, place(key), weights, place)
  lift = lambda width: Many(plan.n, axes, width, devices).lift  # noqa: E731
  width = job.width
  if width is None:
    width = default_width(plan.n)
  elif width == 0:
    width = measured_width(job, plan, lift, plan.n // len(devices))
  return plan._replace(lift=lift(width), width=width)


def feed(job: Job) -> AbstractContextManager[Feed | None]:
  """What `run_chunks` gets its batches from; None where the examples are on the device."""
  stream, how = job.streams[0], job.setup.config.get('feed', {})
  if not in_files(stream.x):
    return nullcontext()
  return grain_feed(stream, how['workers'], how['ahead'])


def measured_width(job: Job, plan: Plan, lift: Callable[[int], Callable], most: int) -> int:
  """The fastest of a few widths up to `most`, by five steps of each; compiling is not counted."""

  def make(width: int) -> Callable[[], Any]:
    steps = min(5, job.streams[0].index.shape[1])
    parts = programs(job.setup.build, steps, lift(width))
    state, _ = parts.begin(plan.hp, plan.key, plan.stream, plan.weights, None)
    return lambda: parts.advance(plan.hp, state, plan.stream, plan.weights, 0, 0, None)

  widths = sorted({1, min(8, most), most})
  work = flat({k: v for k, v in job.setup.config.items() if k not in ('name', 'seeds')})
  name = f'{plan.n} runs of {json.dumps(work, sort_keys=True, default=str)}'
  return calibrate(make, widths, name, cache.directory())


def blank(job: Job, plan: Plan, every: int) -> Progress:
  """Shapes and dtypes of the job's progress, for a checkpoint to be read into."""
  s, lead = job.streams[0], (len(job.seeds),) if plan.lift else ()
  L, S = s.index.shape[:2]
  hp = hyper(job.configs[0], s)

  x, y = example(s)[:2]

  def start(hp, key, stream, weights, x, y):
    first = show(stream, x, y, stream.index[0, 0], 0, len(s.y))
    return begin(job.setup.build(hp, weights), key, stream, first)

  one, _ = jax.eval_shape(start, hp, jax.random.key(0), without_data(s), job.setup.weights, x, y)
  state = jax.tree.map(lambda a: jax.ShapeDtypeStruct((*lead, *a.shape), a.dtype), one)
  if plan.cut is not None:
    struct = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)  # noqa: E731
    state = jax.tree.map(struct, state, shard.rule(plan.cut, state))
  f32: Any = lambda *shape: jax.ShapeDtypeStruct((*lead, *shape), np.float32)  # noqa: E731
  curve = f32(L, S // every if every else 0, s.tasks)
  return Progress(state, Record(f32(s.tasks), f32(L, s.tasks), f32(L, S), curve), 0, 0)


def host(p: Progress) -> Progress:
  """On the host, and independent of what the loop goes on writing to; what processes share stays there."""
  kept = lambda a: checkpoint.is_key(a) or checkpoint.apart(a)  # noqa: E731
  state = jax.tree.map(lambda a: a if kept(a) else np.asarray(a), p.state)
  return p._replace(state=state, record=jax.tree.map(np.array, p.record))


def without_copies(p: Progress, job: Job, plan: Plan) -> Progress:
  """The runs of a job alone, on however many devices they are: what its checkpoints hold."""
  if plan.lift is None:
    return p
  own = lambda tree: jax.tree.map(lambda a: a[: len(job.seeds)], tree)  # noqa: E731
  return p._replace(state=own(p.state), record=own(p.record))


def padded(p: Progress, plan: Plan) -> Progress:
  """What a checkpoint holds, with as many copies of the last run as these devices need."""
  if plan.lift is None:
    return p
  at = lambda a: np.minimum(np.arange(plan.n), len(a) - 1)  # noqa: E731
  whole = lambda tree: jax.tree.map(lambda a: a[at(a)], tree)  # noqa: E731
  return p._replace(state=whole(p.state), record=whole(p.record))


def forget(p: Progress, every: int) -> Progress:
  """`p` without what the record, which the loop writes in place, has got since."""
  record = jax.tree.map(np.array, p.record)
  record.loss[..., p.leg, p.done :] = np.nan
  if every:
    record.curve[..., p.leg, p.done // every :, :] = np.nan
  record.loss[..., p.leg + 1 :, :] = np.nan
  record.curve[..., p.leg + 1 :, :, :] = np.nan
  record.R[..., p.leg :, :] = np.nan
  return p._replace(record=record)


def all_finite(params: Tree, n: int, mapped: bool) -> jax.Array:
  """bool[n], or bool[] for a single run: no parameter is NaN or infinite."""
  lead = (n,) if mapped else ()
  axes = lambda a: tuple(range(len(lead), a.ndim))  # noqa: E731
  flags = [
    jnp.isfinite(a).all(axes(a))
    for a in jax.tree.leaves(params)
    if jnp.issubdtype(a.dtype, jnp.floating)
  ]
  return jnp.stack([jnp.ones(lead, bool), *flags]).all(0)


def leg_steps(s: Stream) -> np.ndarray:
  """i32[L], the steps of each leg."""
  return np.full(len(s.index), s.index.shape[1]) if s.steps is None else np.asarray(s.steps)
