"""A part of a launch: what one job runs, what it needs, and how launch.json keeps it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cl_jax.errors import UserError
from experiments import build, config, show, study, workdir

FILE = workdir.LAUNCH
PROCESS = 5e8  # bytes of a process that holds the libraries and nothing else
SPEED, START = 5e9, 20.0  # FLOP/s of a core, seconds of a start: assumed until a run has finished


class Part(NamedTuple):
  """Cells that one process runs, as launch.json keeps it.

  Attributes:
    name: of its folder in jobs/.
    label: in messages, how it differs from the others.
    program: 'sweep' or 'run', of experiments.
    cells: hashes of the configurations.
    seeds: that each cell has.
    devices: of a CPU, fixed once: on another number results would agree to rounding only.
    bytes, flops: estimates, of memory in all and of arithmetic in all.
  """

  name: str
  label: str
  program: str
  cells: tuple[str, ...]
  seeds: tuple[int, ...]
  devices: int
  bytes: float
  flops: float

  @property
  def runs(self) -> set[tuple[str, int]]:
    return {(sha, seed) for sha in self.cells for seed in self.seeds}


def estimate(setup: build.Setup) -> dict[str, float]:
  """Bytes that all runs share, of the state and of a step's temporaries; FLOPs of a run."""
  cost = study.needed(setup)
  shared = cost['weights'] + cost['data']
  flops = 0.0 if math.isnan(cost['flops']) else cost['flops'] * cost['steps']
  temporary = 0.0 if math.isnan(cost['temporary']) else cost['temporary']
  return {'shared': shared, 'state': cost['state'], 'temporary': temporary, 'flops': flops}


def seconds(part: Part, lines: Sequence[Mapping[str, Any]]) -> float:
  """What the part will take, by the speed of finished runs, or by an assumed one where there are none."""
  runs = len(part.runs)
  known = [n for n in lines if n['flops_per_step'] and n['steps']]
  if not known:
    return START + part.flops / SPEED / part.devices
  speed = statistics.median(n['wall_s'] / (n['flops_per_step'] * n['steps']) for n in known)
  return speed * part.flops if part.flops else runs * statistics.median(n['wall_s'] for n in lines)


def table(todo: Sequence[Part], lines: Sequence[Mapping[str, Any]], memory: str = '') -> str:
  """What each part needs, a line each, and all together."""
  rows = [f'{"job":5} {"runs":>5} {"memory":>9} {"time":>9}  what']
  for part in todo:
    need = f'{part.bytes / 1e9:6.2f} GB'
    rows.append(
      f'{part.name:5} {len(part.runs):5} {need:>9} {show.clock(seconds(part, lines)):>9}  {part.label}'
    )
  total = sum(seconds(part, lines) for part in todo)
  how = 'by finished runs' if lines else f'by FLOPs at {SPEED:.0e} a second and core: a rough guess'
  rows.append(
    f'{many(len(todo), "job")}, {many(sum(len(p.runs) for p in todo), "run")}; one after the other '
    f'{show.clock(total)} ({how})'
  )
  if memory and any(part.bytes > size(memory) for part in todo):
    rows.append(f'--mem={memory} is less than some jobs are expected to need')
  return '\n'.join(rows)


def many(n: int, noun: str) -> str:
  return f'{n} {noun}{"s" * (n != 1)}'


def size(text: str) -> float:
  """Bytes of '4G', '500M' or '4000', in MB as Slurm reads it."""
  units = {'K': 1e3, 'M': 1e6, 'G': 1e9, 'T': 1e12}
  number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, 'M')
  try:
    return float(number) * units[unit]
  except (ValueError, KeyError) as error:
    raise UserError(f'--mem must be a size as in 4G or 500M; got {text!r}') from error


def dumped(about: Mapping[str, Any], all_parts: Sequence[Part]) -> str:
  """The text of launch.json."""
  return json.dumps({**about, 'jobs': [p._asdict() for p in all_parts]}, indent=1) + '\n'


def load(path: Path) -> tuple[dict[str, Any], list[Part]]:
  """What launch.json says: about the launch, and its parts."""
  try:
    about = config.tuples(json.loads(path.read_text()))
    return about, [Part(**fields) for fields in about.pop('jobs')]
  except (ValueError, TypeError, KeyError) as error:
    raise UserError(f'{path} is damaged ({error}): name another --workdir') from error
