"""A grid as jobs, on this machine or in Slurm: `python -m experiments.launch --config=... --workdir=DIR`.

Cells that one compiled program serves are a job: a command that resumes (experiments.sweep) in
DIR/jobs/NUMBER. The launcher may die at any time: what is done, what failed and what runs is on the disk
(launch.json and the jobs' folders), and the same command adopts it.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from cl_jax import durable
from cl_jax.errors import UserError
from experiments import (
  build,
  cli,
  launch_part,
  launch_plan,
  launch_slurm,
  pool,
  results,
  rules,
  scalars,
  show,
  tables,
  workdir,
)
from experiments import launch_jobs as jobs
from experiments.launch_follow import Launch, follow
from experiments.launch_jobs import Job
from experiments.launch_options import ABOUT, PROGRAM, Wish, wishes
from experiments.launch_part import FILE, Part
from experiments.launch_status import gathered, status, verdict
from experiments.options import Options, parse


def main(argv: Sequence[str] | None = None) -> int:
  argv = sys.argv[1:] if argv is None else list(argv)
  if argv[:1] == ['--run']:  # the process of a job
    program, devices, folder, *words = argv[1:]
    return jobs.perform(program, int(devices), Path(folder), words)
  return cli.guarded(PROGRAM, command, argv)


def command(argv: list[str]) -> int:
  wish, rest = wishes(argv)
  if wish.status is not None:
    return status(Path(wish.status))
  options = parse(rest, PROGRAM, ABOUT)
  if options.spread.shard and (options.sweep or options.spread.coordinator):
    raise UserError('--shard spreads one run: launch one configuration, without --coordinator')
  if options.spread.processes % wish.slurm.nodes:
    raise UserError(
      f'--nodes={wish.slurm.nodes} cannot share out --processes={options.spread.processes} evenly: each '
      'node has the same number of processes, with GPUs one'
    )
  if options.spread.shard:
    wish = wish._replace(jobs=1)  # all cores are for the one job that there is
  jax.config.update('jax_platforms', 'cpu')  # an accelerator is for the jobs
  if wish.executor == 'slurm' and not wish.plan:
    launch_slurm.check()
  for name in options.writers:
    scalars.module_of(name)
  rules.untuned(options.config)
  build.resident(options.config, 'experiments.launch')
  cells = launch_plan.cells(options.raw, options.sweep)
  shown = show.make()
  if wish.plan:
    new = added(options, wish, cells, [], shown.say)
    print(launch_part.table([p for p, _ in new], [], wish.slurm.mem or ''))
    return 0
  fresh = not options.workdir.exists()
  with cli.network(options.offline), workdir.claimed(options.workdir) as place:
    if fresh:
      place.chmod(0o700)
    if (place / results.FILE).exists() and not (place / FILE).exists():
      raise UserError(
        f'{place} has results of experiments.sweep or run, which those of the jobs would replace: name '
        'another --workdir'
      )
    workdir.remember(place, {**options.config, 'sweep': options.sweep})
    about, all_jobs = prepared(options, wish, cells, place, shown)
    wanted = {c.sha256 for c in cells}
    todo = [job for job in all_jobs if wanted & set(job.part.cells)]
    order = [c.sha256 for c in cells]
    follow(Launch(place, about['id'], order, wish, options, shown.say), todo)
    lines = gathered(place, order)
    if lines:
      print(tables.table(lines, options.sweep), flush=True)
      workdir.report(place, shown)
  return verdict(todo, shown.say)


def added(
  options: Options, wish: Wish, cells: Sequence[launch_plan.Cell], old: Sequence[Part], say
) -> list[tuple[Part, dict[str, Any]]]:
  """The parts of the cells that no old part has."""
  there = {sha for part in old for sha in part.cells}
  new = [c for c in cells if c.sha256 not in there]
  if not new:
    return []
  local = wish.executor == 'local'
  cpus = wish.cpus or (
    len(pool.cores()) // (wish.jobs or len(pool.cores())) if local else options.spread.processes
  )
  accelerated = bool(wish.slurm.gpus) or (local and pool.default_workers() < len(pool.cores()))
  wide = options.width == 0 or (options.width is None and accelerated)
  return launch_plan.parts(options, new, len(old), wish.cells, max(1, cpus), wide, say)


def prepared(
  options: Options, wish: Wish, cells: Sequence[launch_plan.Cell], place: Path, shown: show.Show
) -> tuple[dict[str, Any], list[Job]]:
  """launch.json and the jobs' folders, of this launch and, where the grid grew, of those before it."""
  about: dict[str, Any] = {'id': secrets.token_hex(4)}
  old: list[Part] = []
  if (place / FILE).exists():
    about, old = launch_part.load(place / FILE)
  new = added(options, wish, cells, old, shown.say)
  for part, source in new:
    folder = place.absolute() / 'jobs' / part.name
    for made in (folder.parent, folder):
      made.mkdir(mode=0o700, exist_ok=True)
      made.chmod(0o700)
    durable.write(folder / 'job.json', json.dumps(source, indent=1) + '\n')
  about |= {'executor': wish.executor, 'command': options.command, 'sweep': options.sweep}
  about['cells'] = [c.sha256 for c in cells]
  if new or not (place / FILE).exists():
    shown.say(launch_part.table([p for p, _ in new], results.read(place), wish.slurm.mem or ''))
  everything = [*old, *(p for p, _ in new)]
  durable.write(place / FILE, launch_part.dumped(about, everything))
  (place / 'slurm' / about['id']).mkdir(mode=0o700, parents=True, exist_ok=True)
  (place / 'slurm').chmod(0o700)
  return about, [jobs.read(p, place.absolute() / 'jobs' / p.name) for p in everything]


if __name__ == '__main__':
  sys.exit(main())
