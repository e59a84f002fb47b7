"""What the commands share: one-line errors and exit codes, quiet libraries, working directories."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from absl import logging as absl_logging

from cl_jax import durable
from cl_jax.errors import Fault, UserError
from cl_jax.streams import cache
from experiments.options import Help
from experiments.watch import Interrupted


def guarded(program: str, command: Callable[[list[str]], int], argv: Sequence[str] | None) -> int:
  """Runs a command and turns what it raises into one line on stderr and an exit code."""
  words = list(sys.argv[1:] if argv is None else argv)
  debug = any(w in ('--debug', '-debug', '--debug=true') for w in words)
  try:
    with quiet(debug):
      return command(words)
  except Help as text:
    print(text, end='')
    return 0
  except (Exception, KeyboardInterrupt) as error:
    if debug:
      traceback.print_exc()
    code, line = verdict(error)
    print(f'{program}: {" ".join(line.split())}', file=sys.stderr)
    return code


def parser(program: str, about: str | None) -> argparse.ArgumentParser:
  """The parser of a command whose words argparse reads; `about` is its module's docstring."""
  made = argparse.ArgumentParser(
    prog=f'python -m {program}',
    description=about,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  made.add_argument('--debug', action='store_true', help='show tracebacks')
  return made


def refuse(given: argparse.Namespace, options: Sequence[str], why: str) -> None:
  """UserError for the first of these options that was given (is not None or False) and would do nothing."""
  for option in options:
    value = getattr(given, option.removeprefix('--').replace('-', '_'))
    if value is not None and value is not False:
      raise UserError(f'{option} {why}')


def verdict(error: BaseException) -> tuple[int, str]:
  """The exit code of an error, and its line."""
  match error:
    case UserError():
      return 2, str(error)
    case Fault():
      return 3, str(error)
    case Interrupted():
      return 128 + error.signum, f'{error}; run the same command again to go on'
    case KeyboardInterrupt():
      return 130, 'stopped at once; what was saved is kept, run the same command again'
    case OSError():
      where = f': {error.filename}' if error.filename else ''
      return 2, f'{durable.MAKE_ROOM if durable.full(error) else error.strerror or error}{where}'
    case _:
      return 3, f'a fault of the program ({type(error).__name__}: {error}); --debug shows where'


@contextmanager
def quiet(debug: bool) -> Iterator[None]:
  """Keeps the libraries' own messages out of sight; those of cl_jax go to stderr as they are."""
  ours = logging.getLogger('cl_jax')
  handler, level, propagate = logging.StreamHandler(sys.stderr), ours.level, ours.propagate
  verbosity = absl_logging.get_verbosity()
  ours.addHandler(handler)
  ours.setLevel(logging.INFO)
  ours.propagate = False  # a library may give the root a handler, which would say everything again
  try:
    with warnings.catch_warnings():
      if not debug:
        warnings.simplefilter('ignore')
        absl_logging.set_verbosity(absl_logging.FATAL)
      yield
  finally:
    ours.removeHandler(handler)
    ours.setLevel(level)
    ours.propagate = propagate
    absl_logging.set_verbosity(verbosity)


@contextmanager
def network(offline: bool) -> Iterator[None]:
  """With `offline`, whatever looks a host up or connects to one in this process is an error."""
  if not offline:
    yield
    return
  before = {k: os.environ.get(k) for k in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE')}
  os.environ.update(dict.fromkeys(before, '1'))
  watching = [True]

  def watch(event: str, args: tuple) -> None:
    if watching[0] and event in ('socket.getaddrinfo', 'socket.connect'):
      target = args[0] if event.endswith('getaddrinfo') else args[1]
      if not isinstance(target, str) or event.endswith('getaddrinfo'):  # a path is a local socket
        raise UserError(f'--offline: something tried to reach {target!r}; prepare the data first')

  sys.addaudithook(watch)  # cannot be removed, hence the switch
  try:
    yield
  finally:
    watching[0] = False
    for key, value in before.items():
      os.environ.pop(key) if value is None else os.environ.update({key: value})


def devices(runs: int) -> None:
  """Before jax first computes: on a CPU a device per core, as far as there are runs for them.

  Compiled programs are kept below CL_JAX_CACHE, unless JAX_COMPILATION_CACHE_DIR names a place.
  """
  settings: Any = jax.config
  if not settings.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', str(cache.directory() / 'jax'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
  if 'JAX_NUM_CPU_DEVICES' in os.environ or 'device_count' in os.environ.get('XLA_FLAGS', ''):
    return
  try:
    jax.config.update('jax_num_cpu_devices', max(1, min(cores(), runs)))
  except RuntimeError:
    pass  # jax is at work already (a notebook, a test): its devices are what there is


def cores() -> int:
  """How many cores this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
