"""Progress: a bar on a terminal, plain lines in a log. Everything goes to stderr but results."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

EVERY = 10.0  # seconds between lines in a log


class Show:
  """Plain lines: at the beginning, every ten seconds, and at the end of every leg."""

  def __init__(self, out: TextIO | None = None):
    self.out = out or sys.stderr
    self.name, self.total, self.first, self.started = '', 0, 0, time.monotonic()
    self.line_at, self.fresh = -EVERY, True

  def say(self, line: str) -> None:
    print(line, file=self.out, flush=True)

  def warn(self, line: str) -> None:
    self.say(line)

  def begin(self, name: str, total: int, done: int) -> None:
    self.name, self.total, self.first = name, max(total, 1), done
    self.started = self.line_at = time.monotonic()
    self.fresh = True

  def step(self, done: int, about: Mapping[str, Any]) -> None:
    now = time.monotonic()
    self.count_from(done)
    if 'accuracy' in about or now - self.line_at >= EVERY:
      self.line_at = now
      self.say(f'{self.name}  {summary(about)}  {done / self.total:.0%}  eta {self.eta(done)}')

  def count_from(self, done: int) -> None:
    """The first chunk of a process compiles the program, which says nothing of the rest."""
    if self.fresh and done > self.first:
      self.first, self.started, self.fresh = done, time.monotonic(), False

  def eta(self, done: int) -> str:
    new = done - self.first
    if new <= 0:
      return '?'
    return clock((time.monotonic() - self.started) / new * (self.total - done))

  def close(self) -> None:
    pass


class Bar(Show):
  """A bar of rich, with the lines of the legs above it."""

  def __init__(self) -> None:
    super().__init__()
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    self.progress = Progress(
      TextColumn('{task.description}'),
      BarColumn(),
      TextColumn('{task.percentage:>3.0f} %  eta {task.fields[eta]}'),
      TimeElapsedColumn(),
      console=Console(stderr=True),
      transient=True,
    )
    self.bar: Any = None

  def say(self, line: str) -> None:
    self.progress.console.print(line, markup=False, highlight=False)

  def begin(self, name: str, total: int, done: int) -> None:
    super().begin(name, total, done)
    self.progress.start()
    if self.bar is not None:
      self.progress.remove_task(self.bar)
    self.bar = self.progress.add_task(name, total=self.total, completed=done, eta='?')

  def step(self, done: int, about: Mapping[str, Any]) -> None:
    self.count_from(done)
    text = summary({k: v for k, v in about.items() if k != 'accuracy'})
    eta = self.eta(done)
    self.progress.update(self.bar, completed=done, description=f'{self.name}  {text}', eta=eta)
    if 'accuracy' in about:
      self.say(f'{self.name}  {summary(about)}')

  def close(self) -> None:
    self.progress.stop()


def make() -> Show:
  """A bar where somebody looks at it; lines where rich is not there."""
  if not sys.stderr.isatty():
    return Show()
  try:
    return Bar()
  except ImportError:
    return Show()


def summary(about: Mapping[str, Any]) -> str:
  if 'accuracy' in about:
    row = about['accuracy']
    shown = ' '.join(f'{a:.3f}' for a in row[:12]) + (' ...' if len(row) > 12 else '')
    return f'leg {about["leg"]}/{about["legs"]} done  {about.get("measure", "accuracy")} {shown}'
  loss = f'  loss {about["loss"]:.4f}' if 'loss' in about else ''
  return f'leg {min(about["leg"] + 1, about["legs"])}/{about["legs"]}  step {about["done"]}{loss}'


def clock(seconds: float) -> str:
  minutes, s = divmod(int(seconds + 0.5), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{s:02}' if hours else f'{minutes}:{s:02}'
