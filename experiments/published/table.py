"""What the modules of this folder describe: rows of published tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from cl_jax.types import Learner, Method, Stream


class Figure(NamedTuple):
  """A number in a paper: a metric of `metrics.summary`, its value and error, times `scale`."""

  metric: str
  value: float | None
  err: float | None = None
  scale: float = 100.0


class Row(NamedTuple):
  """One line of a published table.

  Attributes:
    stream: (seed, data_dir) -> Stream.
    build: (hp, weights) -> Learner.
    figures: what the paper gives for it.
    note: what differs from the paper, and where a figure comes from.
    slow: run only when `--only` names it or with --all.
    learner: () -> a learner or method that needs what the row's needs; None where `build` takes no data.
    stored: how its lines in results/published/ call it, where they were written under another name.
  """

  table: str
  dataset: str
  scenario: str
  method: str
  setting: str
  stream: Callable[[int, str | None], Stream]
  build: Callable[..., Learner]
  figures: tuple[Figure, ...]
  note: str = ''
  slow: bool = False
  learner: Callable[[], Learner | Method] | None = None
  stored: str = ''

  @property
  def name(self) -> str:
    return '/'.join((self.table, self.scenario, self.method, self.setting)).replace(' ', '_')

  @property
  def needs(self) -> tuple[str, ...]:
    """What the scenario must tell: see `Method.needs`."""
    return (self.learner() if self.learner else self.build(None, None)).needs

  def own(self, lines: Sequence[dict]) -> list[dict]:
    """Those of `lines` that hold its results, the last one of each seed."""
    own = {line['seed']: line for line in lines if line['row'] in (self.name, self.stored)}
    return [*own.values()]


def seen_once(stream: Stream) -> Stream:
  """The stream whose `ends` are exactly the rows it learns from, for protocols that see a part of a pool."""
  index = np.asarray(stream.index)
  flat = index.reshape(index.shape[0], -1)
  size = next(b for b in (250, 200, 100, 50, 10, 1) if flat.shape[1] % b == 0)
  return dataclasses.replace(stream, ends=flat.reshape(index.shape[0], -1, size))
