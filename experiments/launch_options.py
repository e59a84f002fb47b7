"""The command line of experiments.launch: what it has beside that of experiments.sweep."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags

from cl_jax.errors import UserError
from experiments import launch_part, launch_slurm, options

PROGRAM = 'experiments.launch'
ABOUT = """Runs a grid as jobs that resume, are tried again when they crash, and are adopted when the launcher
comes back: after a crash, after Ctrl-C (jobs on this machine save their state and end, those in Slurm go
on) or for a larger grid repeat the command; what is finished is not run again. For example
  python -m experiments.launch --config=configs/split_fashion.py:class,er --workdir=runs/grid \\
      --config.sweep="{'optimizer.lr': (0.1, 0.05), 'er.capacity': (200, 500)}"
  python -m experiments.launch --status=runs/grid
Without a sweep there is one job. Beside the options of experiments.sweep, which follow:
  --executor=local|slurm   processes on this machine, or jobs in Slurm through submitit (local)
  --jobs=N                 at most so many at a time (local: one a core, with --cpus as many as have so many
                           each, with an accelerator one; slurm: any)
  --cells=N                at most so many cells in a job (all that one compiled program serves)
  --retries=N              after a crash (2)
  --cpus=N                 of each job (local: the cores shared out; slurm: 1 a process)
  --partition --time --gpus --mem
                           of each job in Slurm; --time=60 minutes unless given: longer jobs are requeued
  --nodes=N                of Slurm that share --processes (1); --gpus and --mem are of each of them
  --plan                   only check every cell and say what each job needs
  --status=DIR             only say how the jobs of a launch stand, with the table so far
A configuration is executed as Python, and kept as JSON in DIR: put no secrets there."""


class Wish(NamedTuple):
  """The options of a launch that a sweep does not have."""

  executor: str
  jobs: int | None
  cells: int
  retries: int
  cpus: int | None
  slurm: launch_slurm.Resources
  plan: bool
  status: str | None


def wishes(argv: Sequence[str]) -> tuple[Wish, list[str]]:
  """The options of a launch, and the other words."""
  values = flags.FlagValues()
  text, number, yes = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_bool
  flags.DEFINE_enum('executor', 'local', ['local', 'slurm'], '', flag_values=values)
  for name in ('partition', 'time', 'mem', 'status'):
    text(name, None, '', flag_values=values)
  for name, default, least in (
    ('jobs', None, 1), ('cells', None, 1), ('retries', 2, 0), ('cpus', None, 1), ('gpus', None, 1),
    ('nodes', None, 1),
  ):  # fmt: skip
    number(name, default, '', flag_values=values, lower_bound=least)
  yes('plan', False, '', flag_values=values)
  values.set_gnu_getopt(True)
  try:
    _, *rest = values([PROGRAM, *argv], known_only=True)
  except flags.Error as error:
    raise UserError(f'{error} (see --help)') from error
  known = [*values, *options.known(PROGRAM), 'config']
  for word in rest:
    name = word.partition('=')[0].lstrip('-').partition('.')[0]
    if (
      word.startswith('--') and name and name not in known and name.removeprefix('no') not in known
    ):
      close = difflib.get_close_matches(name, known, 1)
      raise UserError(
        f'there is no option --{name}'
        + (f': did you mean --{close[0]}?' if close else ' (see --help)')
      )
  v: Any = values
  if v.executor == 'local' and not v.plan:
    for name in ('partition', 'time', 'mem', 'gpus', 'nodes'):
      if getattr(v, name) is not None:
        raise UserError(f'--{name} is for --executor=slurm')
  minutes = launch_slurm.minutes(v.time or '60')
  asked = launch_slurm.Resources(v.partition, minutes, v.nodes or 1, v.gpus, v.cpus or 1, v.mem)
  if v.mem:
    launch_part.size(v.mem)
  most = v.cells or sys.maxsize
  return Wish(v.executor, v.jobs, most, v.retries, v.cpus, asked, v.plan, v.status), rest
