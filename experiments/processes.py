"""One run by several processes on this machine: started together, and ended together.

A process that is killed leaves the others waiting for it in a collective. So the one that started them ends
them all, and says so: the same command goes on from the last checkpoint, which is whole. They end with it as
well: the standard input of each is a pipe whose other end is open as long as it lives.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.devices import LOOPBACK
from experiments.watch import Interrupted, Stop
from experiments.workdir import claimed

LOOK, GRACE = 0.1, 10.0  # seconds between looks; and that the others have, to end as well
LOCK = '.processes.lock'  # of the one that started them; .lock is the first one's
ABORT = -signal.SIGABRT  # what jax does to a process that has lost another: never the cause


def watched(argv: Sequence[str], n: int, workdir: Path) -> int:
  """Runs `python -m experiments.run` with these words as n processes; what the first one prints is printed.

  What the others print is in workdir/process-I.txt, for whatever they have to say when they fail.

  Returns:
    0, or the exit code of the first that failed by itself (2 and 3 as for one process).

  Raises:
    UserError: another command is at work in workdir.
    Interrupted: after a signal, which all have got; or because one was killed.
  """
  coordinator = f'{LOOPBACK}{free_port()}'
  command = [sys.executable, '-m', 'experiments.processes', *argv, f'--coordinator={coordinator}']
  with claimed(workdir, LOCK):
    with claimed(workdir):
      pass  # before anything is touched: the first process claims it when all have started
    return together([[*command, f'--process={i}'] for i in range(n)], workdir)


def together(commands: Sequence[Sequence[str]], workdir: Path) -> int:
  """Runs these commands, each with its words, until all have ended; see `watched`."""
  running: list[subprocess.Popen] = []
  theirs, ours = os.pipe()  # neither is inherited but as a standard input
  with Stop().listening() as stop:
    try:
      for i, words in enumerate(commands):
        running.append(started(words, i, workdir, theirs))
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
      os.close(ours)
      os.close(theirs)
  codes = [0 if p in late else p.returncode for p in running]  # what we did is no verdict
  if told and set(codes) <= {0, 128 + told, -told}:
    if any(codes):  # what they have saved, the first one says
      name = signal.Signals(told).name
      raise Interrupted(told, f'stopped by {name}, all {len(codes)} processes have ended')
    return 0
  return verdict(codes, workdir)


def verdict(codes: Sequence[int], workdir: Path) -> int:
  """0, or the exit code that a process gave itself, with what it said where nobody has seen that.

  Raises:
    Interrupted: one was ended by a signal (SIGKILL, SIGSEGV, ...), whatever became of the others then.
  """
  signals = sorted({c for c in codes if c < 0} - {-signal.SIGKILL, ABORT})
  for wanted in (-signal.SIGKILL, *signals, 2, 3, ABORT):
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


def started(command: Sequence[str], i: int, workdir: Path, stdin: int) -> subprocess.Popen:
  """A process whose Ctrl-C comes through us alone; all but the first write into a file."""
  if i == 0:
    return subprocess.Popen(command, stdin=stdin, start_new_session=True)
  with (workdir / f'process-{i}.txt').open('w') as log:
    return subprocess.Popen(command, stdin=stdin, stdout=log, stderr=log, start_new_session=True)


def free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def main(argv: Sequence[str] | None = None) -> int:
  """What each of the processes runs: the command, until it or the one that started it ends."""
  threading.Thread(target=outlast, daemon=True).start()
  from experiments import run  # which imports this module

  return run.main(argv)


def outlast() -> None:
  """Ends this process when nobody holds the other end of its standard input any more.

  At once, as SIGKILL would: the state is in the checkpoints, and who repeats the command needs the directory.
  """
  while os.read(0, 1):
    pass
  os._exit(128 + signal.SIGKILL)


if __name__ == '__main__':
  sys.exit(main())
