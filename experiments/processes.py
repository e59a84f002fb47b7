"""One run by several processes on this machine: started together, and ended together.

A process that is killed leaves the others waiting for it in a collective. So the one that started them ends
them all, and says so: the same command goes on from the last checkpoint, which is whole.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.devices import LOOPBACK
from experiments.watch import Interrupted, Stop

LOOK, GRACE = 0.1, 10.0  # seconds between looks; and that the others have, to end as well


def watched(argv: Sequence[str], n: int, workdir: Path) -> int:
  """Runs `python -m experiments.run` with these words as n processes; what the first one prints is printed.

  What the others print is in workdir/process-I.txt, for whatever they have to say when they fail.

  Returns:
    0, or the exit code of the first that failed by itself (2 and 3 as for one process).

  Raises:
    Interrupted: after a signal, which all have got, their state saved; or because one was killed.
  """
  coordinator = f'{LOOPBACK}{free_port()}'
  command = [sys.executable, '-m', 'experiments.run', *argv, f'--coordinator={coordinator}']
  workdir.mkdir(parents=True, exist_ok=True)
  running = []
  with Stop().listening() as stop:
    try:
      for i in range(n):
        running.append(started([*command, f'--process={i}'], i, workdir))
      code, told = None, 0
      while any(p.poll() is None for p in running) and not code:
        if stop() != told:
          told = stop()
          for p in running:
            p.send_signal(told)
        time.sleep(LOOK)
        code = next((p.returncode for p in running if p.returncode), 0)
      end = time.monotonic() + GRACE
      while any(p.poll() is None for p in running) and time.monotonic() < end:
        time.sleep(LOOK)
    finally:
      late = [p for p in running if p.poll() is None]
      for p in late:
        p.kill()
        p.wait()
  codes = [0 if p in late else p.returncode for p in running]  # what we did is no verdict
  if told and set(codes) <= {0, 128 + told}:
    if any(codes):
      raise Interrupted(told, f'all {n} processes have saved their state and ended')
    return 0
  return verdict(codes, workdir)


def verdict(codes: Sequence[int], workdir: Path) -> int:
  """0, or the exit code that a process gave itself, with what it said where nobody has seen that.

  Raises:
    Interrupted: one was killed, whatever became of the others then.
  """
  for wanted in (-signal.SIGKILL, 2, 3, *sorted({c for c in codes if c < 0})):
    if wanted not in codes:
      continue
    i = codes.index(wanted)
    if wanted < 0:
      name = signal.Signals(-wanted).name
      raise Interrupted(
        -wanted, f'process {i} of {len(codes)} was ended by {name}, and with it the rest'
      )
    if i:
      words = (workdir / f'process-{i}.txt').read_text(errors='replace').strip()
      print(words.rpartition('\n')[2], file=sys.stderr)
    return wanted
  return max(codes)


def started(command: Sequence[str], i: int, workdir: Path) -> subprocess.Popen:
  """A process whose Ctrl-C comes through us alone; all but the first write into a file."""
  if i == 0:
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
  with (workdir / f'process-{i}.txt').open('w') as log:
    return subprocess.Popen(
      command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )


def free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]
