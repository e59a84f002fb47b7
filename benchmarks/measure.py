"""Interleaved measurements: contestants take turns, so that what else the machine does hits them alike.

A ratio is the median of the other's cost over the median of ours: above 1, cl_jax is better. Its range
is that of the ratios of single turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Unavailable(Exception):
  """A contestant that cannot be set up here; the message says why."""


class Row(NamedTuple):
  """One line of the table.

  Attributes:
    work: what is done, after its goal: 'G1 permuted pixels, 256 units'.
    against: the other side.
    metric: 'CPU', 'wall', 'memory', 'compile' ...
    target: the ratio to reach; None where the row is information.
    ratios: of the single turns, their median of medians first; () where nothing was measured.
    ours, theirs: medians in `unit`.
    note: what holds it back, or why it was not measured.
  """

  work: str
  against: str
  metric: str
  target: float | None
  ratios: tuple[float, ...] = ()
  ours: float = 0.0
  theirs: float = 0.0
  unit: str = 's'
  note: str = ''

  @property
  def reached(self) -> bool:
    return bool(self.ratios) and self.target is not None and self.ratios[0] >= self.target


class Worker:
  """One contestant process; see `workers.serve`."""

  def __init__(self, module: str, python: str = sys.executable, env: Mapping = {}, **options):  # noqa: B006
    self.name = f'{module} {options}'
    self.log = tempfile.TemporaryFile('w+')
    single = {f'{lib}_NUM_THREADS': '1' for lib in ('OMP', 'MKL', 'OPENBLAS')}
    self.process = subprocess.Popen(
      [python, '-m', f'benchmarks.workers.{module}', json.dumps(options)],
      cwd=ROOT,
      env={**os.environ, **single, **env},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self.log,
      text=True,
    )
    self.facts: dict = {}

  def ready(self) -> dict:
    """Waits until it is prepared; what it said of itself."""
    self.facts = self.facts or self.answer()
    return self.facts

  def go(self) -> None:
    assert self.process.stdin
    self.process.stdin.write('go\n')
    self.process.stdin.flush()

  def answer(self) -> dict:
    assert self.process.stdout
    if not (line := self.process.stdout.readline()):
      self.log.seek(0)
      tail = self.log.read()[-1500:]
      raise RuntimeError(f'{self.name} ended with {self.process.wait()}:\n{tail}')
    return json.loads(line)

  def turn(self) -> dict:
    self.go()
    return self.answer()

  def close(self) -> None:
    assert self.process.stdin and self.process.stdout
    self.process.stdin.close()
    try:
      self.process.wait(timeout=30)
    except subprocess.TimeoutExpired:
      self.process.kill()
      self.process.wait()
    self.process.stdout.close()
    self.log.close()


class Team:
  """Several processes that take their turn together: the wall time of the slowest, the sum of CPU time."""

  def __init__(self, *workers: Worker):
    self.workers = workers

  def ready(self) -> dict:
    return [w.ready() for w in self.workers][0]

  def turn(self) -> dict:
    for w in self.workers:
      w.go()
    found = [w.answer() for w in self.workers]
    total = {'cpu': sum(f['cpu'] for f in found), 'wall': max(f['wall'] for f in found)}
    return {**found[0], **total, 'rss': sum(f['rss'] for f in found)}

  def close(self) -> None:
    for w in self.workers:
      w.close()


Turns = dict[str, list[dict]]


def interleave(contestants: Mapping[str, Worker | Team], runs: int, warm: int = 1) -> Turns:
  """`runs` turns of every contestant, in an order that rotates; `warm` turns before them do not count.

  Closes the contestants.
  """
  turns: Turns = {name: [] for name in contestants}
  names = list(contestants)
  try:
    for worker in contestants.values():  # one after the other: preparing needs the machine, too
      worker.ready()
    for i in range(warm + runs):
      for name in names[i % len(names) :] + names[: i % len(names)]:
        found = contestants[name].turn()
        if i >= warm:
          turns[name].append(found)
  finally:
    for worker in contestants.values():
      worker.close()
  return turns


def compare(
  ours: Sequence[float], theirs: Sequence[float]
) -> tuple[tuple[float, ...], float, float]:
  """(the ratio of medians followed by the ratios of single turns, our median, their median)."""
  us, them = statistics.median(ours), statistics.median(theirs)
  single = (b / a for a, b in zip(ours, theirs, strict=True))
  return (them / us, *single), us, them


def row(
  turns: Turns,
  ours: str,
  theirs: str,
  work: str,
  against: str,
  target: float | None,
  key: str = 'cpu',
  metric: str = 'CPU',
  unit: str = 's',
  scale: float = 1.0,
  note: str = '',
) -> Row:
  """The row that compares two contestants of one interleaved run by `key`, in units of `scale`."""
  ratios, us, them = compare(
    [t[key] / scale for t in turns[ours]], [t[key] / scale for t in turns[theirs]]
  )
  return Row(work, against, metric, target, ratios, us, them, unit, note)


def disagreement(turns: Turns, names: Sequence[str], tolerance: float = 0.03) -> str:
  """Says so where contestants that should learn the same differ in their median accuracy."""
  accuracy = {n: statistics.median(t['accuracy'] for t in turns[n]) for n in names}
  if max(accuracy.values()) - min(accuracy.values()) <= tolerance:
    return ''
  return 'ACCURACIES DIFFER: ' + ', '.join(f'{n} {a:.3f}' for n, a in accuracy.items())


def core() -> list[int]:
  """The core that single-core contestants share: the last of those we may use."""
  return cores()[-1:]


def cores() -> list[int]:
  if hasattr(os, 'sched_getaffinity'):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))
