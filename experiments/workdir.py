"""The working directory of a command: claimed, remembered, reported on."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cl_jax import durable
from cl_jax.errors import UserError
from experiments import config, results
from experiments.show import Show

LAUNCH = 'launch.json'  # in a directory that experiments.launch fills


@contextmanager
def claimed(workdir: Path, name: str = '.lock') -> Iterator[Path]:
  """The working directory, made, writable, and ours alone as long as this lasts.

  Args:
    workdir: of the command.
    name: of the file that is locked.
  """
  lock = workdir / name
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    handle = lock.open('a')
  except OSError as error:
    raise UserError(
      f'{workdir} cannot be written ({error.strerror}); name another directory'
    ) from error
  with handle:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise UserError(
        f'another process is at work in {workdir}: wait for it or name another'
      ) from error
    yield workdir


@contextmanager
def in_turn(folder: Path, tell: Callable[[str], None]) -> Iterator[Path]:
  """The folder, made, and ours alone as long as this lasts; waits while another process is at work there."""
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / '.lock').open('a') as handle:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      tell(f'another process is at work in {folder}: waiting for it')
      fcntl.flock(handle, fcntl.LOCK_EX)
    yield folder


def remember(workdir: Path, resolved: Mapping[str, Any]) -> None:
  """Keeps the configuration in the working directory, and refuses another one there.

  The grid of a sweep may change: its cells are told apart by their own configurations. Nothing is refused
  where nothing was computed: a mistake that was found before can be put right in the same place.
  """
  path, there = workdir / 'config.json', None
  if path.exists():
    try:
      there = json.loads(path.read_text())
    except ValueError as error:
      raise UserError(f'{path} is damaged ({error}): name another --workdir') from error
    one, other = (
      {k: v for k, v in config.identity(c).items() if k != 'sweep'} for c in (there, resolved)
    )
    differing = config.difference(one, other)
    if ('sweep' in there) != ('sweep' in resolved):
      differing = ['one is a sweep']
    kept = ('checkpoints', 'jobs', 'moments.json', results.FILE)
    used = any((workdir / name).exists() for name in kept)
    if differing and used:
      more = f' and {len(differing) - 1} more' if len(differing) > 1 else ''
      raise UserError(
        f'{workdir} belongs to another configuration ({differing[0]}{more}; there / here): name '
        'another --workdir'
      )
  if there != json.loads(json.dumps(resolved)):
    durable.write(path, json.dumps(resolved, indent=1) + '\n')


def report(workdir: Path, shown: Show) -> None:
  """report.html and its figures."""
  try:
    from cl_jax.report import write  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    shown.warn(f'no report was written: {error}')
    return
  shown.say(f'report: {write(workdir)}')
