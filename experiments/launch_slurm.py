"""Jobs in Slurm's queue: submitted by submitit, found again by their names.

Slurm's own clients say what is in the queue (submitit asks sacct, which many clusters do not have). A job
that is preempted, or whose time is over, saves its state at the end of the chunk and has submitit put it
back into the queue; where that does not happen the launcher submits it again.

A run of several processes is a job of as many tasks, which find each other by what Slurm tells them
(`--coordinator=auto`). The first one speaks for all; when one dies srun ends the others.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cl_jax.errors import UserError
from experiments.launch_jobs import ASKED, Job, mark, perform
from experiments.watch import Interrupted

PATIENCE = 30.0  # seconds that a client of Slurm may take
OVER = {
  'BOOT_FAIL', 'CANCELLED', 'COMPLETED', 'DEADLINE', 'FAILED', 'NODE_FAIL', 'OUT_OF_MEMORY', 'PREEMPTED',
  'TIMEOUT',
}  # fmt: skip
AGAIN = {'PREEMPTED', 'TIMEOUT', 'NODE_FAIL', 'BOOT_FAIL'}  # no fault of the job
WARNING = 60  # seconds before the time limit at which a job is told


class Entry(NamedTuple):
  """A line of squeue."""

  id: str
  name: str
  state: str
  reason: str


class Resources(NamedTuple):
  """What a job asks for; None is the cluster's default."""

  partition: str | None
  minutes: int
  nodes: int
  gpus: int | None
  cpus: int
  mem: str | None


def check() -> None:
  """Raises UserError where jobs cannot be submitted."""
  try:
    import submitit  # noqa: F401  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise UserError("--executor=slurm needs submitit: pip install 'cl_jax[slurm]'") from error
  if missing := [c for c in ('sbatch', 'srun', 'squeue', 'scontrol') if not shutil.which(c)]:
    raise UserError(
      f'--executor=slurm: there is no {missing[0]} on this machine: use a login node of the cluster'
    )
  if queue() is None:
    raise UserError('--executor=slurm: squeue does not answer: is the cluster up?')


def queue() -> list[Entry] | None:
  """The user's jobs, those that ended lately as well; None where Slurm does not answer."""
  words = ['squeue', '--me', '--noheader', '--states=all', '--format=%i|%j|%T|%r']
  try:
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=True)
  except (OSError, subprocess.SubprocessError):
    return None
  rows = (line.strip().split('|', 3) for line in done.stdout.splitlines())
  return [Entry(*row) for row in rows if len(row) == 4]


def entry_of(entries: Sequence[Entry], name: str, number: str | None = None) -> Entry | None:
  """The job of this name that is in the queue, else the one with this number."""
  ours = [e for e in entries if e.name == name]
  live = [e for e in ours if e.state not in OVER]
  return (live or [e for e in ours if e.id == number] or [None])[-1]


def end_of(entry: Entry | None, left: int) -> tuple[int, str, bool]:
  """(exit code, words, whether it is final) of a job that is no longer in the queue.

  Args:
    left: the exit code that the job left behind.
  """
  state = entry.state if entry else ''
  if state in AGAIN:
    return 128 + signal.SIGTERM, f'Slurm: {state}; ', False
  if state == 'CANCELLED':
    return 128 + signal.SIGTERM, 'cancelled in Slurm; ', True
  words = f'Slurm: {state}; ' if state in ('OUT_OF_MEMORY', 'DEADLINE') else ''
  return left or 3, words, False


def name_of(launch: str, job: Job) -> str:
  return f'cl_jax_{launch}_{job.part.name}'


def minutes(text: str) -> int:
  """Slurm's forms of a time limit: minutes, M:S, H:M:S, D-H, D-H:M and D-H:M:S; rounded up."""
  if not re.fullmatch(r'(\d+-)?\d+(:\d+){0,2}', text):
    raise UserError(f'--time must be minutes, H:M:S or D-H:M:S; got {text!r}')
  days, dash, rest = text.rpartition('-')
  parts = [int(p) for p in rest.split(':')]
  if dash:
    h, m, s = (*parts, 0, 0)[:3]
  else:
    h, m, s = parts if len(parts) == 3 else (0, *parts, 0)[:3]
  total = -(-((int(days or 0) * 24 + h) * 3600 + m * 60 + s) // 60)
  if not total:
    raise UserError('--time must be at least a minute')
  return total


def submit(
  job: Job, argv: Sequence[str], place: Path, launch: str, asked: Resources, processes: int = 1
) -> None:
  """Puts a job into the queue and remembers it.

  Args:
    processes: tasks of the job, the same number on each of its nodes.
  """
  import submitit  # pyright: ignore[reportMissingImports]

  (job.folder / 'exit.json').unlink(missing_ok=True)
  job.state['mark'] = mark(job)
  # Numbers start again with a fresh Slurm, so every launch has a folder of its own.
  executor = submitit.SlurmExecutor(place / 'slurm' / launch, max_num_timeout=1_000_000)
  each = max(1, asked.cpus // processes)
  executor.update_parameters(
    job_name=name_of(launch, job),
    time=asked.minutes,
    cpus_per_task=each,
    nodes=asked.nodes,
    ntasks_per_node=processes // asked.nodes,
    # srun no longer takes the cores from sbatch. And a task that died leaves the others waiting for it.
    srun_args=[f'--cpus-per-task={each}', '--kill-on-bad-exit=1'],
    signal_delay_s=WARNING,
    stderr_to_stdout=True,
    additional_parameters={'requeue': True},
    **{k: v for k, v in (('partition', asked.partition), ('mem', asked.mem)) if v},
    **({'gpus_per_node': asked.gpus} if asked.gpus else {}),
  )
  task = Task(job.part.program, job.part.devices, str(job.folder), tuple(argv), processes > 1)
  try:
    number = executor.submit(task).job_id
  except Exception as error:  # submitit wraps what sbatch says
    words = ' '.join(str(error).split())[-300:]
    raise UserError(f'sbatch refuses job {job.part.name}: {words}') from error
  job.state['run'] = {'id': number, 'name': name_of(launch, job)}
  job.save()


class Task:
  """What submitit calls in each task of the job: texts and numbers, since submitit keeps it pickled."""

  joined = False  # whether it is one of several tasks; what older versions have queued does not say

  def __init__(self, program: str, devices: int, folder: str, argv: tuple[str, ...], joined: bool):
    self.program, self.devices, self.folder, self.argv = program, devices, folder, argv
    self.joined = joined

  def __call__(self) -> int:
    rank = int(os.environ['SLURM_PROCID']) if self.joined else 0
    requeue = signal.getsignal(signal.SIGUSR2)  # submitit's: checkpoint(), scontrol requeue, exit

    def leave(signum: int, frame: Any) -> None:
      raise Interrupted(signal.SIGTERM, 'stopped between two parts of the work')

    # Slurm ends a job with SIGTERM, and submitit has it warned by SIGUSR2: both are the SIGTERM that
    # a run in training answers by saving its state at the end of the chunk.
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGUSR2, lambda signum, frame: os.kill(os.getpid(), signal.SIGTERM))
    folder = Path(self.folder)
    with logging(folder / (f'process-{rank}.txt' if rank else 'log.txt')):
      code = perform(self.program, self.devices, folder, self.argv, rank)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, requeue)
    if code in ASKED and not rank and wanted():
      os.kill(os.getpid(), signal.SIGUSR2)
    if self.joined and code and code not in ASKED:
      if rank:  # the launcher looks for last words in log.txt
        words = (folder / f'process-{rank}.txt').read_text(errors='replace').strip()
        with (folder / 'log.txt').open('a') as log:
          log.write(words.rpartition('\n')[2] + '\n')
      os._exit(
        code
      )  # at once: the end of an interpreter waits for the others, and they for this one
    return code

  def checkpoint(self) -> Any:
    """The same again: the run goes on from what is on the disk."""
    import submitit  # pyright: ignore[reportMissingImports]

    return submitit.helpers.DelayedSubmission(self)


@contextlib.contextmanager
def logging(path: Path) -> Iterator[None]:
  """Sends what this process and its libraries print to the end of a file, and then as before."""
  with path.open('ab') as log:
    kept = [(stream, os.dup(stream.fileno())) for stream in (sys.stdout, sys.stderr)]
    for stream, _ in kept:
      stream.flush()
      os.dup2(log.fileno(), stream.fileno())
    try:
      yield
    finally:
      for stream, before in kept:
        stream.flush()
        os.dup2(before, stream.fileno())
        os.close(before)


def wanted() -> bool:
  """Whether this job runs still in the eyes of Slurm: not cancelled, not in the queue again."""
  words = ['scontrol', 'show', 'job', '--oneliner', os.environ.get('SLURM_JOB_ID', '')]
  with contextlib.suppress(OSError, subprocess.SubprocessError):
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    return 'JobState=RUNNING' in done.stdout
  return False
