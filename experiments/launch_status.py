"""How the jobs of a launch stand, and what came out of them so far."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cl_jax import durable
from cl_jax.errors import UserError
from experiments import launch_jobs as jobs
from experiments import launch_part, launch_slurm, results, show, sweep, tables
from experiments.launch_jobs import Job
from experiments.launch_part import FILE

ROOM = 100  # characters


def gathered(place: Path, order: Sequence[str]) -> list[dict[str, Any]]:
  """The lines of the cells in `order`, in which results.jsonl of all jobs is kept, whatever ended first."""
  rank = {sha: i for i, sha in enumerate(order)}
  at = lambda line: (rank.get(line['config_sha256'], len(rank)), line['seed'])  # noqa: E731
  folders = sorted((place / 'jobs').iterdir())
  for name, read in ((results.FILE, results.read), (sweep.FAULTS, sweep.faults)):
    lines = sorted((line for folder in folders for line in read(folder)), key=at)
    if lines or (place / name).exists():
      durable.write(place / name, ''.join(json.dumps(line) + '\n' for line in lines))
  return [line for line in results.read(place) if line['config_sha256'] in rank]


def verdict(todo: Sequence[Job], say: Callable[[str], None]) -> int:
  """Lists the jobs that failed for good; the worst exit code."""
  lost = [j for j in todo if j.state['code']]
  for job in lost:
    say(f'job {job.part.name} ({job.part.label}): {jobs.said(job)}; see {job.folder / "log.txt"}')
  if again := [j for j in lost if not jobs.outcome(j)]:
    say(f'{len(again)} of {len(todo)} jobs failed for good; the same command tries them again')
  if len(again) < len(lost):
    say(
      f'{len(lost) - len(again)} of {len(todo)} jobs were stopped by NaN, which they would be again'
    )
  return max((j.state['code'] for j in lost), default=0)


def progress(job: Job) -> str:
  """The job's last words, as far as they fit beside those of others."""
  text = job.work().last_words().partition('  accuracy')[0].partition('; run the same command')[0]
  return text if len(text) <= ROOM else f'... {text[-ROOM:].partition(" ")[2]}'


def brief(job: Job, entries: Sequence[launch_slurm.Entry] | None) -> str:
  """What a job that was started does: it waits in Slurm's queue, or is at work."""
  run = job.state['run'] or {}
  entry = launch_slurm.entry_of(entries or [], run['name'], run['id']) if 'id' in run else None
  if entry and entry.state == 'PENDING':
    return f'in the queue ({entry.reason})'
  return progress(job) or 'starting'


def status(place: Path) -> int:
  """Prints how every job stands, and the table so far; changes nothing."""
  if not (place / FILE).exists():
    raise UserError(f'--status={place}: there is no {FILE}; name the --workdir of a launch')
  about, parts = launch_part.load(place / FILE)
  wanted = set(about['cells'])
  todo = [jobs.read(p, place.absolute() / 'jobs' / p.name) for p in parts if wanted & set(p.cells)]
  slurm = any('id' in (j.state['run'] or ()) for j in todo)
  entries = launch_slurm.queue() if slurm else []
  stands = [stand(job, entries) for job in todo]
  for job, (kind, words) in zip(todo, stands, strict=True):
    print(f'{job.part.name}  {kind:8} {job.part.label}' + (f': {words}' if words != kind else ''))
  lines = [line for job in todo for line in results.read(job.folder)]
  counts = {
    kind: sum(k == kind for k, _ in stands) for kind in ('done', 'running', 'waiting', 'failed')
  }
  left = sum(
    launch_part.seconds(j.part, lines)
    for j, (k, _) in zip(todo, stands, strict=True)
    if k in ('running', 'waiting')
  )
  more = f'; {show.clock(left)} of work at most' if left else ''
  print(f'{", ".join(f"{n} {kind}" for kind, n in counts.items())}{more}')
  if counts['waiting'] + counts['running'] and not launching(place):
    print(f'no launcher is at work; to go on: {about["command"]}')
  lines = [line for line in lines if line['config_sha256'] in wanted]
  if lines:
    rank = {sha: i for i, sha in enumerate(about['cells'])}
    lines.sort(key=lambda line: (rank[line['config_sha256']], line['seed']))
    print('\n' + tables.table(lines, about['sweep']))
  return 0


def stand(job: Job, entries: list[launch_slurm.Entry] | None) -> tuple[str, str]:
  """('done', 'failed', 'running' or 'waiting', what there is to say)."""
  run, said = job.state['run'], jobs.said(job)
  what = jobs.outcome(job)
  if what or job.state['over']:
    return ('done' if what == 'done' else 'failed'), said
  n = job.state['failures']
  before = f' (failed {n} time{"s" * (n > 1)} before)' if n else ''
  if run and 'pid' in run and jobs.alive(run, job.folder):
    return 'running', f'process {run["pid"]} on {run["host"]}{before}: {progress(job)}'
  if run and 'id' in run:
    if entries is None:
      return 'running', f'Slurm job {run["id"]}{before}, squeue does not answer: {progress(job)}'
    entry = launch_slurm.entry_of(entries, run['name'], run['id'])
    if entry and entry.state not in launch_slurm.OVER:
      kind = 'waiting' if entry.state == 'PENDING' else 'running'
      why = f' ({entry.reason})' if kind == 'waiting' else ''
      return kind, f'Slurm job {entry.id}, {entry.state}{why}{before}: {progress(job)}'
  return 'waiting', said if not run else f'its process has ended{before}: {progress(job)}'


def launching(place: Path) -> bool:
  """Whether a launcher holds the directory."""
  with (place / '.lock').open('a') as handle:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      return True
  return False
