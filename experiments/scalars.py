"""Accuracies and costs of runs for TensorBoard and Weights & Biases: --writers=tensorboard,wandb.

results.jsonl is the record, and these are views of it. At step t they get the accuracy on every task after
leg t as soon as it is known, and with the last leg the measures and bytes of the run's line. DIR/writers.json
says how many points of a run each has, so that none is written twice, however often a run is resumed.
TensorBoard reads DIR/tensorboard; wandb works offline, in DIR/wandb, unless WANDB_MODE says otherwise.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cl_jax import durable
from cl_jax.errors import UserError
from cl_jax.loop import Record
from cl_jax.report.figures import seen_so_far
from cl_jax.report.tables import PERCENT
from experiments import results
from experiments.build import likelihood
from experiments.config import sha256
from experiments.job import Job

FILE = 'writers.json'
COSTS = ('flops_per_step', 'wall_s', 'compile_s', 'peak_rss_bytes')


class Point(NamedTuple):
  """What a writer gets at once.

  Attributes:
    step: legs learnt.
    values: by tag.
    final: whether these are the run's own, not those of a leg.
  """

  step: int
  values: dict[str, float]
  final: bool = False


class Sink(NamedTuple):
  """Where the points of a run go.

  Attributes:
    add: (point) -> None; the point is with the operating system when it returns.
    close: () -> None.
  """

  add: Callable[[Point], None]
  close: Callable[[], None]


def tensorboard(module: Any, place: Path, run: str, config: Mapping[str, Any], last: int) -> Sink:
  """A directory of event files, one for each process; those of former ones have the points to step `last`.

  What a process wrote that was killed before it could note it is hidden by `purge_step`.
  """
  folder, own = str(place / 'tensorboard' / run), f'.{last}'
  made = module.SummaryWriter(folder, purge_step=last + 1, filename_suffix=own)
  if not last:
    made.add_text('config', f'    {json.dumps(config)}')

  def add(point: Point) -> None:
    for tag, value in point.values.items():
      made.add_scalar(tag, value, point.step)
    made.flush()

  return Sink(add, made.close)


def wandb(module: Any, place: Path, run: str, config: Mapping[str, Any], last: int) -> Sink:
  """A run of Weights & Biases; processes that resume it share its id, by which `wandb sync` joins them."""
  made = module.init(
    project='cl_jax',
    name=run,
    id=run,
    dir=str(place),
    config=dict(config),
    mode=os.environ.get('WANDB_MODE', 'offline'),
    resume='allow' if last else None,
    reinit='create_new',  # the seeds of a program are runs side by side
    settings=module.Settings(silent=True, console='off'),
  )

  def add(point: Point) -> None:
    if point.final:
      made.summary.update(point.values)
    else:
      made.log(point.values, step=point.step, commit=True)

  return Sink(add, made.finish)


WRITERS = {'tensorboard': ('tensorboardX', tensorboard), 'wandb': ('wandb', wandb)}


class Scalars:
  """The writers of a command."""

  def __init__(self, names: Sequence[str], place: Path):
    self.place, self.modules = place, {name: module_of(name) for name in names}
    self.sinks: dict[tuple[str, str], Sink] = {}
    path = place / FILE
    try:
      self.counts = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
      raise UserError(
        f'{path} is damaged ({error}): remove it, and what was written, to begin anew'
      ) from error

  def leg(self, job: Job, record: Record, faults: Mapping[int, Any]) -> None:
    """Gives what is new in the record of a job whose leg has ended."""
    if not self.modules:
      return
    R = record.R.reshape(-1, *record.R.shape[-2:])
    for run, (config, seed) in enumerate(zip(job.configs, job.seeds, strict=True)):
      if run not in faults:
        rows = results.table(np.asarray(R[run], np.float64), job.streams[run].tasks)
        self.give(config, seed, legs(rows, config))

  def lines(self, lines: Sequence[Mapping[str, Any]]) -> None:
    """Gives what is new in the lines of finished runs."""
    for line in lines if self.modules else ():
      points = legs(line['R'], line['config'])
      last = Point(len(line['R']), figures(line), final=True)
      self.give(line['config'], line['seed'], [*points, last])

  def give(self, config: Mapping[str, Any], seed: int, points: Sequence[Point]) -> None:
    run = f'{results.method_name(config)}-seed{seed}-{sha256(config)[:8]}'
    for name, module in self.modules.items():
      had = self.counts.setdefault(name, {}).get(run, 0)
      if had >= len(points):
        continue
      if (name, run) not in self.sinks:
        last = points[had - 1].step if had else 0
        self.sinks[name, run] = WRITERS[name][1](module, self.place, run, config, last)
      for point in points[had:]:
        self.sinks[name, run].add(point)
      self.counts[name][run] = len(points)
      durable.write(self.place / FILE, json.dumps(self.counts, indent=1) + '\n')

  def close(self) -> None:
    for sink in self.sinks.values():
      sink.close()


@contextmanager
def opened(names: Sequence[str], place: Path) -> Iterator[Scalars]:
  """The writers of these names, closed at the end.

  Raises:
    UserError: the extra of one is not installed.
  """
  made = Scalars(names, place)
  try:
    yield made
  finally:
    made.close()


def module_of(name: str) -> Any:
  if name not in WRITERS:
    raise UserError(f'--writers: there is no writer {name!r}, only {" and ".join(WRITERS)}')
  module, _ = WRITERS[name]
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise UserError(
      f"--writers={name} needs {module}: pip install 'cl_jax[{name}]' ({error})"
    ) from error


def legs(R: Sequence[Sequence[float | None]], config: Mapping[str, Any]) -> list[Point]:
  """A point for each row of R, as results.jsonl has it, in which something was evaluated."""
  what = 'log_likelihood' if likelihood(config) else 'accuracy'
  rows = np.array(R, np.float64)
  points = []
  for t, seen in enumerate(seen_so_far(rows)):
    tasks = {f'{what}/task_{i + 1}': float(v) for i, v in enumerate(rows[t]) if np.isfinite(v)}
    if tasks:
      points.append(Point(t + 1, tasks | {f'{what}/tasks_seen': float(seen)}))
  return points


def figures(line: Mapping[str, Any]) -> dict[str, float]:
  """The numbers of a line: measures, bytes by role, costs."""
  found = {f'measures/{key}': line[key] for key, _ in PERCENT.values()}
  found |= {f'state_bytes/{role}': n for role, n in line['state_bytes'].items()}
  found |= {f'costs/{key}': line[key] for key in COSTS}
  return {tag: float(v) for tag, v in found.items() if v is not None}
