"""Runs as processes side by side, each on cores of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from experiments import results
from experiments.config import sha256
from experiments.options import parse

POLL, STATUS = 0.2, 20.0  # seconds between looks at the processes, and between lines about them


class Work(NamedTuple):
  """What one process does.

  Attributes:
    name: in messages.
    seeds: that it runs.
    folder: its working directory; what it prints goes to log.txt there.
    argv: the words of an experiments.run command line.
  """

  name: str
  seeds: tuple[int, ...]
  folder: Path
  argv: tuple[str, ...]

  def finished(self) -> bool:
    sha = sha256(parse([*self.argv], 'experiments.run', '').config)
    return {(sha, seed) for seed in self.seeds} <= results.done(self.folder)

  def last_words(self) -> str:
    """The last line that it printed."""
    try:
      lines = (self.folder / 'log.txt').read_text(errors='replace').split('\n')
    except OSError:
      return ''
    return next((line.strip() for line in reversed(lines) if line.strip()), '')


@contextmanager
def processes(
  todo: Sequence[Work], command: Sequence[str], workers: int, say: Callable[[str], None]
) -> Iterator[Iterator[tuple[Work, int]]]:
  """Yields (work, exit code) as processes end; starts them in order, `workers` at a time.

  Whoever leaves early, for instance by Ctrl-C, waits until the running ones have saved their state; a
  second Ctrl-C kills them.
  """
  groups = shares(cores(), workers)
  waiting, running = list(todo), {}
  handlers = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGHUP)}

  def ended() -> Iterator[tuple[Work, int]]:
    said = time.monotonic()
    while waiting or running:
      while waiting and len(running) < len(groups):
        used = [group for _, _, group in running.values()]
        group = next(g for g in groups if g not in used)
        work = waiting.pop(0)
        running[work.name] = work, start(work, command, group), group
      time.sleep(POLL)
      for work, process, _ in [*running.values()]:
        code = process.poll()
        if code is not None:
          del running[work.name]
          yield work, code if code >= 0 else 128 - code
      if running and time.monotonic() - said >= STATUS:
        said = time.monotonic()
        words = {w.name: w.last_words().partition('  accuracy')[0] for w, _, _ in running.values()}
        say(' | '.join(f'{name}: {line[:80]}' for name, line in words.items()))

  try:
    yield ended()
  finally:
    left = [process for _, process, _ in running.values()]
    try:
      for process in left:
        if process.poll() is None:
          process.send_signal(signal.SIGTERM)
      for process in left:
        process.wait()
    except KeyboardInterrupt:
      for process in left:
        process.kill()
        process.wait()
    for s, handler in handlers.items():
      signal.signal(s, handler)


def stop(signum: int, frame: object) -> None:
  """A signal that asks us to end does it in the way of Ctrl-C."""
  raise KeyboardInterrupt


def start(work: Work, command: Sequence[str], group: frozenset[int]) -> subprocess.Popen:
  """A process that sees the cores of its group only; Ctrl-C reaches it through us alone."""
  work.folder.mkdir(parents=True, exist_ok=True)
  before = cores()
  with (work.folder / 'log.txt').open('ab') as log:
    try:
      pin(group)
      return subprocess.Popen(
        [*command, *work.argv],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
      )
    finally:
      pin(before)


def cores() -> frozenset[int]:
  """The cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return frozenset(os.sched_getaffinity(0))
  return frozenset(range(os.cpu_count() or 1))


def pin(group: frozenset[int]) -> None:
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, group)


def shares(available: frozenset[int], workers: int) -> list[frozenset[int]]:
  """The cores dealt out to at most so many workers, each at least one."""
  ordered = sorted(available)
  n = min(workers, len(ordered))
  return [frozenset(ordered[i::n]) for i in range(n)]


def default_workers() -> int:
  """One a core; a single one where jax would use an accelerator, which processes cannot share."""
  return 1 if accelerated() and os.environ.get('JAX_PLATFORMS') != 'cpu' else len(cores())


@cache
def accelerated() -> bool:
  """Whether jax can use an accelerator; asked again and again, and 40 ms to find out."""
  names = {(d.metadata['Name'] or '').lower().replace('_', '-') for d in metadata.distributions()}
  return any(n.startswith('jax-') and n.endswith('-plugin') for n in names) or 'libtpu' in names
