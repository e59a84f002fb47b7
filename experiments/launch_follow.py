"""The launcher at work: starts jobs, sees them end, adopts those of a launcher before it."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cl_jax.errors import UserError
from experiments import launch_jobs as jobs
from experiments import launch_slurm, pool
from experiments.launch_jobs import Job
from experiments.launch_options import Wish
from experiments.launch_part import many
from experiments.launch_status import brief, gathered
from experiments.options import Options
from experiments.watch import Interrupted, Stop

LOOK = {'local': 0.2, 'slurm': 5.0}  # seconds between looks


class Launch(NamedTuple):
  """What `follow` needs to know; `order` are the cells by their hashes."""

  place: Path
  id: str
  order: list[str]
  wish: Wish
  options: Options
  say: Callable[[str], None]

  @property
  def limit(self) -> int:
    """Jobs at a time."""
    if self.wish.jobs or self.wish.executor != 'local':
      return self.wish.jobs or sys.maxsize
    return min(pool.default_workers(), max(1, len(pool.cores()) // (self.wish.cpus or 1)))

  def argv(self, job: Job) -> list[str]:
    """The command line of the job."""
    o = self.options
    return [
      f'--config={job.folder / "job.json"}',
      f'--workdir={job.folder}',
      f'--save_every={o.save_every}',
      *([f'--data_dir={Path(o.data_dir).absolute()}'] if o.data_dir else []),
      *([] if o.width is None else [f'--width={o.width or "measure"}']),
      *([f'--writers={",".join(o.writers)}'] if o.writers else []),
      *([f'--shard={o.spread.shard}'] if o.spread.shard else []),
      *([f'--processes={o.spread.processes}'] if o.spread.processes > 1 else []),
      *(['--coordinator=auto'] if o.spread.processes > 1 and self.wish.executor == 'slurm' else []),
      *(['--offline'] if o.offline else []),
      *(['--debug'] if o.debug else []),
    ]


def follow(launch: Launch, todo: list[Job]) -> None:
  """Starts jobs and watches them until each is done or has failed for good.

  Raises:
    Interrupted: after a signal; processes on this machine have saved their state, jobs in Slurm go on.
  """
  adopt(launch, todo)
  for job in todo:
    if job.state['over'] and not jobs.outcome(job):
      job.state.update(over=False, failures=0)  # asked for again: another set of tries
    elif job.waiting and jobs.outcome(job):  # it ended while no launcher looked
      launch.say(jobs.ended(job, 0, launch.wish.retries))
  over = sum(j.state['over'] for j in todo)
  running = sum(bool(j.state['run']) for j in todo)
  launch.say(f'{many(len(todo), "job")} in {launch.place}: {over} over, {running} running already')
  said = time.monotonic()
  with Stop().listening((signal.SIGINT, signal.SIGTERM, signal.SIGHUP)) as stop:
    while not all(j.state['over'] for j in todo):
      if stop():
        leave(launch, todo, stop())
      if look(launch, todo):
        gathered(launch.place, launch.order)
      fill(launch, todo)
      if time.monotonic() - said >= pool.STATUS:
        said = time.monotonic()
        busy = [j for j in todo if j.state['run']]
        queued = launch_slurm.queue() if any('id' in j.state['run'] for j in busy) else []
        launch.say(
          ' | '.join(
            [f'{j.part.name}: {brief(j, queued)}' for j in busy[:8]] + ['...'] * (len(busy) > 8)
          )
        )
      if not all(j.state['over'] for j in todo):
        time.sleep(LOOK['slurm' if any('id' in (j.state['run'] or ()) for j in todo) else 'local'])


def adopt(launch: Launch, todo: list[Job]) -> None:
  """Finds what a launcher started that died before it could write that down."""
  entries: list[launch_slurm.Entry] = []
  if any((launch.place / 'slurm' / launch.id).iterdir()):
    found = launch_slurm.queue()
    if found is None:
      raise UserError(
        f'{launch.place} has jobs in Slurm, and squeue does not answer: try again later'
      )
    entries = found
  for job in todo:
    entry = launch_slurm.entry_of(entries, launch_slurm.name_of(launch.id, job))
    if not job.state['run'] and entry and entry.state not in launch_slurm.OVER:
      job.state['run'] = {'id': entry.id, 'name': entry.name}
      job.save()
    jobs.adopt(job)


def look(launch: Launch, todo: list[Job]) -> bool:
  """Takes note of the jobs that have ended; whether there are any."""
  ended, entries = [], []
  if any('id' in (j.state['run'] or ()) for j in todo):
    entries = launch_slurm.queue()
  for job in todo:
    run = job.state['run']
    if not run:
      continue
    if 'pid' in run:
      code, words, final = jobs.code_of(job), '', False
      if code is None:
        continue
    else:
      if entries is None:  # Slurm does not answer: nobody knows, the job may run
        continue
      entry = launch_slurm.entry_of(entries, run['name'], run['id'])
      if entry and entry.state not in launch_slurm.OVER:
        continue
      code, words, final = launch_slurm.end_of(entry, jobs.left_code(job))
      if (
        not words and not (job.folder / 'exit.json').exists()
      ):  # nobody knows: it may not even have begun
        words = (
          f'it left no exit code, what Slurm kept is in slurm/{launch.id}/{run["id"]}_0_log.out; '
        )
    ended.append(job)
    launch.say(jobs.ended(job, code, launch.wish.retries, words, final))
  return bool(ended)


def fill(launch: Launch, todo: list[Job]) -> None:
  """Starts what waits, as far as there is room."""
  running = [j for j in todo if j.state['run']]
  groups = pool.shares(pool.cores(), launch.limit)
  limit = len(groups) if launch.wish.executor == 'local' else launch.limit
  for job in [j for j in todo if j.waiting]:
    if len(running) >= limit:
      return
    if launch.wish.executor == 'slurm':
      asked, processes = launch.wish.slurm, launch.options.spread.processes
      launch_slurm.submit(job, launch.argv(job), launch.place, launch.id, asked, processes)
    else:
      busy = {core for j in running for core in j.state['run'].get('cores', ())}
      free = [g for g in groups if not g & busy] or groups
      jobs.start(job, launch.argv(job), free[0])
    running.append(job)


def leave(launch: Launch, todo: list[Job], signum: int) -> None:
  """Asks the processes on this machine to save and end, waits for them, and raises Interrupted."""
  here = socket.gethostname()
  own = [j for j in todo if (j.state['run'] or {}).get('host') == here]
  queued = sum('id' in (j.state['run'] or ()) for j in todo)
  if own:
    launch.say(f'waiting for {many(len(own), "job")} to save and end; Ctrl-C again kills at once')
  for ask in (signal.SIGTERM, signal.SIGKILL):
    try:
      for job in own:
        jobs.signalled(job, ask)
      while any(jobs.code_of(job) is None for job in own):
        time.sleep(LOOK['local'])
      break
    except KeyboardInterrupt:
      pass
  for job in own:
    job.state['run'] = None
    job.save()
  more = f', {queued} jobs go on in Slurm' if queued else ''
  raise Interrupted(signum, f'{launch.place}: stopped by {signal.Signals(signum).name}{more}')
