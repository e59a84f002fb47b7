"""A job of a launch: what its folder says about it, its process, and what became of that.

Everything that must survive is on the disk. The launcher writes state.json: tries that failed, and what
runs. The job's own process holds a lock on worker.json and says there who it is, so that it is never started
twice; at its end it leaves its exit code in exit.json.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cl_jax import durable
from experiments import pool, results, sweep
from experiments.launch_part import Part

BUSY = 75  # exit code: another process has the job already
ASKED = tuple(128 + s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2))
FRESH = {'failures': 0, 'over': False, 'code': 0, 'why': '', 'run': None, 'mark': ''}


@dataclass
class Job:
  """One part at work.

  Attributes:
    part, folder: what, and where.
    state: as in state.json: tries that failed; whether it is over, with which exit code and why; `run`, who
      runs it ({'pid', 'since', 'host', 'cores'} or {'id', 'name'} of Slurm); `mark`, how far it was before.
    process: the process, where this launcher started it.
  """

  part: Part
  folder: Path
  state: dict[str, Any] = field(default_factory=lambda: dict(FRESH))
  process: subprocess.Popen | None = None

  def save(self) -> None:
    durable.write(self.folder / 'state.json', json.dumps(self.state) + '\n')

  def work(self) -> pool.Work:
    return pool.Work(self.part.name, self.part.seeds, self.folder, ())

  @property
  def waiting(self) -> bool:
    return not self.state['over'] and not self.state['run']


def read(part: Part, folder: Path) -> Job:
  return Job(part, folder, FRESH | (document(folder / 'state.json') or {}))


def document(path: Path) -> dict[str, Any] | None:
  """A JSON file, None where it is absent or half-written."""
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError):
    return None
  return found if isinstance(found, dict) else None


# --- what became of it ------------------------------------------------------------------------------


def outcome(job: Job) -> str:
  """'done', 'nan' (runs were stopped by NaN, the others are done), or '' while there is more to do."""
  have, folder = results.done(job.folder), job.folder
  if job.part.runs <= have:
    return 'done'
  lost = {(f['config_sha256'], f['seed']) for f in sweep.faults(folder)}
  if job.part.program == 'run':
    return 'nan' if (folder / 'fault.json').exists() else ''
  return 'nan' if job.part.runs <= have | lost else ''


def mark(job: Job) -> str:
  """Changes with every checkpoint and every result."""
  return f'{" ".join(checkpoints(job))} {len(results.done(job.folder))}'


def checkpoints(job: Job) -> list[str]:
  """Those that are whole: a name with a dot in front is being written."""
  found = (p for p in job.folder.glob('checkpoints/*/*') if p.name.isdecimal())
  return sorted(f'{p.parent.name}/{p.name}' for p in found)


def ended(job: Job, code: int, retries: int, words: str = '', final: bool = False) -> str:
  """Takes note that the process has ended; a line about it.

  An interruption (a signal that asked, preemption, a time limit) is no failure where a checkpoint came
  since the start; a mistake (2), NaN and what is `final` are not tried again. Slurm's `words` for an end go
  before the job's own.
  """
  state, what = job.state, outcome(job)
  if code == BUSY and not what and (other := document(job.folder / 'worker.json')):
    job.process, state['run'] = None, {**other, 'cores': []}
    job.save()
    return f'job {job.part.name}: runs already, as process {other["pid"]}'
  job.process, state['run'] = None, None
  if what == 'done':
    state.update(over=True, code=0, why='')
  elif what == 'nan':
    state.update(over=True, code=3, why=job.work().last_words() or 'stopped by NaN')
  elif code in ASKED and not final and mark(job) != state['mark']:
    state.update(code=code, why='')
  else:
    state['failures'] += 1
    state['over'] = state['failures'] > retries or final or code == 2
    state.update(code=code or 3, why=f'{words or ending(code)}{job.work().last_words()[-300:]}')
  job.save()
  return f'job {job.part.name}: {said(job)}'


def ending(code: int) -> str:
  if code <= 128:
    return ''
  try:
    name = signal.Signals(code - 128).name
  except ValueError:
    return ''
  return f'ended by {name}; its last words: '


def said(job: Job) -> str:
  """Where an idle job stands."""
  state = job.state
  n = state['failures']
  times = f'failed {n} time{"s" * (n > 1)}' if n else ''
  if outcome(job) == 'done':
    return f'done{f" ({times} before)" if n else ""}'
  if state['over']:
    return f'{times or "failed"} for good: {state["why"]}'
  if n:
    return f'waiting to be tried again, {times}: {state["why"]}'
  return 'waiting to go on' if checkpoints(job) else 'waiting'


# --- processes on this machine ----------------------------------------------------------------------


def start(job: Job, argv: Sequence[str], cores: frozenset[int]) -> None:
  """Starts the process of a job on some cores and remembers it."""
  (job.folder / 'exit.json').unlink(missing_ok=True)
  work = pool.Work(job.part.name, job.part.seeds, job.folder, tuple(argv))
  job.state['mark'] = mark(job)
  job.process = pool.start(work, command(job), cores)
  job.state['run'] = {**identity(job.process.pid), 'cores': sorted(cores)}
  job.save()


def command(job: Job) -> tuple[str, ...]:
  about = (job.part.program, str(job.part.devices), str(job.folder))
  return (sys.executable, '-m', 'experiments.launch', '--run', *about)


def identity(pid: int) -> dict[str, Any]:
  return {'pid': pid, 'since': since(pid), 'host': socket.gethostname()}


def since(pid: int) -> str:
  """When a process started, '' where there is none that lives: with the pid, it names one process."""
  try:
    text = Path(f'/proc/{pid}/stat').read_text()
  except OSError:
    if Path('/proc/self/stat').exists():
      return ''
    words = ['ps', '-o', 'stat=,lstart=', '-p', str(pid)]  # a system without /proc
    text = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    return '' if not text or text[0] == 'Z' else text.partition(' ')[2].strip()
  fields = text.rpartition(')')[2].split()  # from the third on: state, ..., start time (22nd)
  return '' if fields[0] in 'ZX' else fields[19]


def alive(run: dict[str, Any], folder: Path) -> bool:
  """Whether the process of a job lives: where it is of another host name, whether it holds its lock."""
  if run['host'] != socket.gethostname():
    return locked(folder / 'worker.json')
  return bool(run['since']) and since(run['pid']) == run['since']


def locked(path: Path) -> bool:
  """Whether a process holds the lock of a file, as far as hosts share locks; True where none can be asked."""
  try:
    with path.open() as file:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except FileNotFoundError:
    return False
  except OSError:
    return True
  return False


def code_of(job: Job) -> int | None:
  """The exit code of a job's process, None while it lives; 128 + 9 where nobody knows."""
  if job.process is not None:
    code = job.process.poll()
    return None if code is None else code if code >= 0 else 128 - code
  if alive(job.state['run'], job.folder):
    return None
  return left_code(job)


def left_code(job: Job) -> int:
  left = document(job.folder / 'exit.json')
  return 128 + signal.SIGKILL if left is None else int(left['code'])


def adopt(job: Job) -> None:
  """Finds the process of a launcher that died before it could write down whom it had started."""
  if job.state['run'] is None:
    other = document(job.folder / 'worker.json')
    if other and other['host'] == socket.gethostname() and alive(other, job.folder):
      job.state['run'] = {**other, 'cores': []}
      job.save()


def signalled(job: Job, signum: int) -> None:
  run = job.state['run']
  if run and 'pid' in run and run['host'] == socket.gethostname() and alive(run, job.folder):
    os.kill(run['pid'], signum)


# --- inside the job's process -----------------------------------------------------------------------


def perform(program: str, devices: int, folder: Path, argv: Sequence[str], rank: int = 0) -> int:
  """Runs the command of a job in this process, unless another one does; the exit code.

  Args:
    rank: of this process among those of the job in Slurm. The first one speaks for all, as long as the
      others do not fail.
  """
  with (folder / (f'worker-{rank}.json' if rank else 'worker.json')).open('a+') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      return BUSY
    file.truncate(0)
    file.write(json.dumps(identity(os.getpid())) + '\n')
    file.flush()
    if not rank:
      (folder / 'exit.json').unlink(missing_ok=True)
    if 'JAX_NUM_CPU_DEVICES' not in os.environ:
      os.environ['JAX_NUM_CPU_DEVICES'] = str(devices)  # cli.devices leaves it alone
      import jax

      jax.config.update('jax_num_cpu_devices', devices)
    code = importlib.import_module(f'experiments.{program}').main(list(argv))
    if not rank or (code and code not in ASKED):
      durable.write(folder / 'exit.json', json.dumps({'code': code}) + '\n')
    return code
