"""What a run keeps an eye on while it works: the time, and the signals that ask it to stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import jax.monitoring


class Interrupted(Exception):
  """A signal asked the run to stop, and its state was saved."""

  def __init__(self, signum: int, message: str):
    super().__init__(message)
    self.signum = signum


class Clock:
  """Seconds of work over all processes of a job, and those of lowering and compiling in them."""

  def __init__(self, wall_s: float = 0.0, compile_s: float = 0.0, started: str = ''):
    self.before, self.compile_s, self.since = wall_s, compile_s, time.monotonic()
    self.started = started or datetime.now(UTC).isoformat(timespec='seconds')

  def add(self, stand: Mapping[str, Any]) -> None:
    """What an earlier process has spent, {} for nothing."""
    self.before += stand.get('wall_s', 0.0)
    self.compile_s += stand.get('compile_s', 0.0)
    self.started = stand.get('started', self.started)

  def stand(self) -> dict[str, Any]:
    return {'wall_s': self.wall(), 'compile_s': self.compile_s, 'started': self.started}

  def wall(self) -> float:
    return self.before + time.monotonic() - self.since

  @contextmanager
  def running(self) -> Iterator[None]:
    counted = ('jaxpr_to_mlir_module_duration', 'backend_compile_duration')

    def listen(event: str, duration_secs: float, **about: Any) -> None:
      if event.endswith(counted):
        self.compile_s += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
      yield
    finally:
      jax.monitoring.unregister_event_duration_listener(listen)


class Stop:
  """Turns SIGINT and SIGTERM into a question that the loop asks; a second SIGINT stops at once."""

  def __init__(self) -> None:
    self.signum = 0

  def __call__(self) -> int:
    return self.signum

  @contextmanager
  def listening(self, signals: Sequence[int] = (signal.SIGINT, signal.SIGTERM)) -> Iterator[Stop]:
    def note(signum: int, frame: Any) -> None:
      if self.signum and signum == signal.SIGINT:
        raise KeyboardInterrupt
      self.signum = signum

    before = {s: signal.signal(s, note) for s in signals}
    try:
      yield self
    finally:
      for s, handler in before.items():
        signal.signal(s, handler)
