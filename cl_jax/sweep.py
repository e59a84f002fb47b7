"""Many runs in few programs: grid -> compile groups -> mapped width -> devices.

Floats of a cell are traced, so cells that differ in floats, seeds and `gated` switches alone share one
compiled program; ints, strings and bools are static and define the compile group. Inside a group runs
are mapped over devices by `shard_map` (no collectives) and, on each, `width` at a time: on a GPU vmap is
the point, on a CPU it streams every run's parameters out of the cache, and one after the other is best.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from cl_jax.errors import UserError
from cl_jax.loop import Record, run
from cl_jax.types import Array, State, Stream, Tree

MAPPED, SHARED = 0, -1


def map_runs(f: Callable, axes: Sequence[Tree], n: int, width: int = 1, devices=None) -> Callable:
  """`f` of one run, over n runs.

  Args:
    f: a pure function of positional arguments.
    axes: for each argument, a prefix tree of MAPPED (a leading run axis) and SHARED (one for all, which
      is never copied per run).
    n: number of runs.
    width: runs computed at once on a device (vmap); 1 is one after the other, bitwise equal to `f` on a CPU
      with jax before 0.12, and to rounding after.
    devices: the devices to spread over; all of the default backend by default.

  Returns:
    A function of the same arguments whose every output has a leading axis n.
  """
  devices = list(devices or jax.devices())[:n]

  def over_runs(*args):
    treedef, leaves = jax.tree.structure(args), jax.tree.leaves(args)
    flags = broadcast(axes, args)
    mapped = [a for a, flag in zip(leaves, flags, strict=True) if flag == MAPPED]
    shared = [a for a, flag in zip(leaves, flags, strict=True) if flag == SHARED]

    def local(mapped, shared):
      def one(mapped):
        m, s = iter(mapped), iter(shared)
        return f(*jax.tree.unflatten(treedef, [next(m if x == MAPPED else s) for x in flags]))

      runs = mapped[0].shape[0]
      if width >= runs > 1:
        return jax.vmap(one)(mapped)
      return jax.lax.map(one, mapped, batch_size=width if width > 1 else None)

    if len(devices) == 1:
      return local(mapped, shared)
    padded = -(-n // len(devices)) * len(devices)
    if padded > n:  # repeat the last run; its copies are dropped again below
      filler = jnp.minimum(jnp.arange(padded), n - 1)
      mapped = [a[filler] for a in mapped]
    runs, whole = PartitionSpec('runs'), PartitionSpec()
    out = jax.shard_map(
      local,
      mesh=Mesh(np.array(devices), ('runs',)),
      in_specs=(runs, whole),
      out_specs=runs,
      check_vma=False,
    )(mapped, shared)
    return jax.tree.map(lambda a: a[:n], out) if padded > n else out

  return over_runs


def broadcast(prefix: Sequence[Tree], args: Sequence[Tree]) -> list[int]:
  """One flag per leaf of `args` from a prefix tree."""
  full = [
    jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), p, a)
    for p, a in zip(prefix, args, strict=True)
  ]
  return jax.tree.leaves(full)


class Many(NamedTuple):
  """How `run_chunks` maps: `lift=Many(...).lift`.

  Attributes:
    n: number of runs.
    stream: MAPPED/SHARED for each leaf of the stream; see `stack_streams`.
    width, devices: see `map_runs`.
  """

  n: int
  stream: Any
  width: int = 1
  devices: tuple | None = None

  def lift(self, f: Callable, mapped: Iterable[str]) -> Callable:
    names = list(inspect.signature(f).parameters)
    axes = [
      self.stream if name == 'stream' else MAPPED if name in mapped else SHARED for name in names
    ]
    return map_runs(f, axes, self.n, self.width, self.devices)


def stack_streams(streams: Sequence[Stream]) -> tuple[Stream, Stream]:
  """Streams of several runs as one, and its axes: leaves that are the same object are shared.

  Streams that differ in their order alone have the same `x` and `y`, which stay single. Where the names of
  the tasks differ they become 'task 1', 'task 2', ...

  Raises:
    ValueError: they differ in more, as in the labels of each task, which programs may have fixed.
  """
  if len({s.task_names for s in streams}) > 1:
    names = tuple(f'task {t + 1}' for t in range(streams[0].tasks))
    streams = [dataclasses.replace(s, task_names=names) for s in streams]
  streams = even(streams)
  first = streams[0]
  flat = [jax.tree.leaves(s) for s in streams]
  treedef = jax.tree.structure(first)
  if any(jax.tree.structure(s) != treedef for s in streams):
    raise ValueError('the streams differ in more than their arrays: run them separately')
  leaves, axes = [], []
  for column in zip(*flat, strict=True):
    same = all(a is column[0] for a in column)
    leaves.append(column[0] if same else np.stack([np.asarray(a) for a in column]))
    axes.append(SHARED if same else MAPPED)
  return jax.tree.unflatten(treedef, leaves), jax.tree.unflatten(treedef, axes)


def even(streams: Sequence[Stream]) -> list[Stream]:
  """Pads tables and tests of streams to the same shapes: tasks differ in size with the class order."""

  def padded(a, length, value):
    short = length - a.shape[1]
    return np.pad(a, [(0, 0), (0, short), *[(0, 0)] * (a.ndim - 2)], constant_values=value)

  longest = lambda name: max(getattr(s, name).shape[1] for s in streams)  # noqa: E731
  steps, ends = longest('index'), longest('ends')
  tests = max(s.test.y.shape[1] for s in streams)
  ragged = any(s.steps is not None or s.index.shape[1] < steps for s in streams)
  done = []
  for s in streams:
    change = {}
    if s.index.shape[1] < steps:
      change['index'] = padded(np.asarray(s.index), steps, -1)
    if ragged and s.steps is None:
      change['steps'] = np.full(s.index.shape[0], s.index.shape[1], np.int32)
    if s.ends.shape[1] < ends:
      change['ends'] = padded(np.asarray(s.ends), ends, -1)
    if s.test.y.shape[1] < tests:
      change['test'] = jax.tree.map(lambda a: padded(np.asarray(a), tests, 0), s.test)
    done.append(dataclasses.replace(s, **change) if change else s)
  return done


def grid(axes: Mapping[str, Sequence]) -> list[dict]:
  """Every combination, the last axis fastest: {'lr': (.1, .01), 'size': (10, 20)} gives 4 cells."""
  return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def factorial(names: Sequence[str]) -> list[dict]:
  """On/off switches for every subset of `names`, as floats: cells for `gated` in a superset program."""
  return grid({name: (0.0, 1.0) for name in names})


class Group(NamedTuple):
  """Cells that one compiled program serves: `cells[i]` is the i-th member's position in the grid."""

  members: tuple[int, ...]
  static: Any  # the cell with every float replaced by its position in `floats`
  floats: np.ndarray  # f32[members, floats]


class Slot(NamedTuple):
  """Stands for the i-th float of a cell."""

  i: int


def compile_groups(cells: Sequence[Mapping]) -> list[Group]:
  """Groups cells (nested dicts) by everything but their floats, in order of first appearance."""
  groups: dict[str, tuple[list[int], Any, list[list[float]]]] = {}
  for position, cell in enumerate(cells):
    values: list[float] = []

    def static(node, values=values):
      if isinstance(node, Mapping):
        return {k: static(node[k], values) for k in sorted(node)}
      if isinstance(node, float):
        values.append(node)
        return Slot(len(values) - 1)
      if isinstance(node, np.ndarray | jax.Array):
        raise UserError(
          'a cell of a sweep holds numbers, texts and tuples; arrays belong to weights'
        )
      return node

    shape = static(cell)
    members, _, floats = groups.setdefault(repr(shape), ([], shape, []))
    members.append(position)
    floats.append(values)
  return [Group(tuple(m), s, np.array(f, np.float32)) for m, s, f in groups.values()]


def fill(static: Any, floats: Array) -> Any:
  """The cell of a group again, its floats taken from the (traced) vector."""
  if isinstance(static, Slot):
    return floats[static.i]
  if isinstance(static, Mapping):
    return {k: fill(v, floats) for k, v in static.items()}
  return static


def sweep(
  build: Callable,
  cells: Sequence[Mapping],
  keys: Array,
  stream: Stream,
  weights: Tree = None,
  every: int = 0,
  width: int | None = None,
  devices=None,
) -> list[tuple[State, Record]]:
  """Runs every cell, one compiled program per group.

  Args:
    build: (cell, weights) -> Learner, called inside the trace; floats of the cell are tracers.
    cells: nested dicts.
    keys: typed keys [cells], one per cell (repeat a cell to run it with several seeds).
    stream, weights, every: as for `run`, the same for all cells.
    width, devices: see `map_runs`; None is 1 on a CPU and everything at once elsewhere.

  Returns:
    (state, record) of every cell, in the order of `cells`.
  """
  results: list = [None] * len(cells)
  for group in compile_groups(cells):
    static, n = group.static, len(group.members)

    def one(floats, key, stream, weights, static=static):
      return run(lambda hp, w: build(fill(static, hp), w), floats, key, stream, weights, every)

    wide = width or default_width(n)
    program = jax.jit(map_runs(one, (MAPPED, MAPPED, SHARED, SHARED), n, wide, devices))
    out = program(jnp.asarray(group.floats), keys[np.array(group.members)], stream, weights)
    for i, position in enumerate(group.members):
      results[position] = jax.tree.map(lambda a, i=i: a[i], out)
  return results


def default_width(n: int) -> int:
  """What measurement says without measuring: one at a time on a CPU, all at once elsewhere."""
  return 1 if jax.default_backend() == 'cpu' else n


def calibrate(
  make: Callable[[int], Callable[[], Any]], widths: Sequence[int], name: str, cache: Path | None
) -> int:
  """The fastest of `widths` on this machine, by a short measurement that is cached.

  Args:
    make: width -> a function that runs a short piece of the work and returns its arrays.
    widths: candidates.
    name: identifies the work (model, batch, number of runs); the key also holds device and versions.
    cache: directory of `calibration.json`; None measures every time.

  Returns:
    The width with the lowest of three times, compile excluded.
  """
  device = jax.devices()[0]
  key = f'{name}|{device.platform}|{device.device_kind}|{jax.__version__}|{tuple(widths)}'
  key = hashlib.sha256(key.encode()).hexdigest()[:16]
  path = None if cache is None else Path(cache) / 'calibration.json'
  known = {}
  if path is not None and path.exists():
    try:
      known = json.loads(path.read_text())
    except ValueError:
      known = {}  # an interrupted write: measure again
    known = known if isinstance(known, dict) else {}
  if known.get(key) in widths:
    return known[key]
  times = {}
  for width in widths:
    work = make(width)
    jax.block_until_ready(work())
    laps = []
    for _ in range(3):
      begin = time.perf_counter()
      jax.block_until_ready(work())
      laps.append(time.perf_counter() - begin)
    times[width] = min(laps)
  best = min(times, key=times.__getitem__)
  if path is not None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f'.{os.getpid()}.part')
    part.write_text(json.dumps({**known, key: best}))
    part.replace(path)
  return best
