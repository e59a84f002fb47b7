"""Measures the goals, prints a table and writes results/bench.csv.

Rows of goals that are measured again replace the old ones; the others stay.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import fnmatch
import importlib.metadata
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import peers
from benchmarks.goals import (
  Setup,
  ablation,
  editing,
  features,
  feed,
  gpu,
  process,
  scale,
  stream,
  vision,
)
from benchmarks.measure import ROOT, Row, Unavailable, cores

COLUMNS = (
  'work',
  'against',
  'metric',
  'ratio_median',
  'ratio_min',
  'ratio_max',
  'ours',
  'theirs',
  'unit',
  'runs',
  'versions',
  'device',
  'date',
)
GOALS = {
  'G1': stream.g1,
  'G2': stream.g2,
  'G3': stream.g3,
  'G4': stream.g4,
  'G5': scale.g5,
  'G6': scale.g6,
  'G7': scale.g7,
  'G8': process.g8,
  'G9': ablation.g9,
  'G10': ablation.g10,
  'G11': scale.g11,
  'G12': vision.g12,
  'G13': ablation.g13,
  'G14': vision.g14,
  'G15': gpu.g15,
  'G16': editing.g16,
  'G17': features.g17,
  'G18': feed.g18,
}


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog='python -m benchmarks.run', description=__doc__)
  parser.add_argument('--only', default='*', help='goals, such as G1,G6 or "G1*"')
  parser.add_argument(
    '--quick', action='store_true', help='tiny: shows that it runs; writes no file'
  )
  parser.add_argument('--runs', type=int, help='interleaved turns (7; 2 when quick)')
  parser.add_argument('--offline', action='store_true', help='do not install the peers')
  parser.add_argument('--out', type=Path, help='the file (results/bench.csv; none when quick)')
  given = parser.parse_args(argv)
  patterns = given.only.upper().split(',')
  chosen = {g: f for g, f in GOALS.items() if any(fnmatch.fnmatch(g, p) for p in patterns)}
  if not chosen:
    print(f'no goal matches {given.only!r}; there are {", ".join(GOALS)}', file=sys.stderr)
    return 2
  if given.runs is not None and given.runs < 1:
    print('--runs must be at least 1', file=sys.stderr)
    return 2
  python, env, missing = '', {}, ''
  if {'G1', 'G2', 'G5', 'G8', 'G11', 'G12', 'G14'} & set(chosen):
    try:
      python = peers.python(given.offline)
      env = peers.unleashed()
    except Unavailable as error:
      missing = str(error)
  setup = Setup(given.quick, given.runs or (2 if given.quick else 7), python, env, missing)
  out = given.out or (None if given.quick else ROOT / 'results' / 'bench.csv')
  versions = described(python)
  for name, goal in chosen.items():
    print(f'{name}: {(goal.__doc__ or "").splitlines()[0]}', flush=True)
    rows = goal(setup)
    for r in rows:
      print('  ' + line(r), flush=True)
    if out is not None:
      write(out, name, rows, versions)
  return 0


def line(r: Row) -> str:
  """One row of the table for people."""
  what = f'{r.work}, {r.metric}, against {r.against}: '
  if not r.ratios:
    return what + f'not measured: {r.note}'
  low, high = min(r.ratios[1:]), max(r.ratios[1:])
  text = (
    f'{r.ratios[0]:.3g} ({low:.3g} to {high:.3g}); {r.ours:.4g} against {r.theirs:.4g} {r.unit}'
  )
  if r.target is None:
    return f'{what}{text}. {r.note}'.rstrip('. ')
  verdict = 'reached' if r.reached else 'MISSED'
  note = (
    f': {r.note}' if r.note and (not r.reached or r.note.isupper() or 'DIFFER' in r.note) else ''
  )
  return f'{what}{text}; goal {r.target:.3g} {verdict}{note}'


def write(path: Path, goal: str, rows: Sequence[Row], versions: str) -> None:
  """Replaces the rows of `goal` in the file; rows that were not measured are not written."""
  kept: list[dict] = []
  if path.exists():
    with path.open(newline='') as file:
      kept = [r for r in csv.DictReader(file) if r['work'].split()[0] != goal]
  for r in rows:
    if not r.ratios:
      continue
    values = (r.ratios[0], min(r.ratios[1:]), max(r.ratios[1:]), r.ours, r.theirs)
    kept.append(
      dict(
        zip(
          COLUMNS,
          (
            r.work,
            r.against,
            r.metric,
            *(f'{v:.4g}' for v in values),
            r.unit,
            len(r.ratios) - 1,
            versions,
            device(),
            datetime.date.today().isoformat(),
          ),
          strict=True,
        )
      )
    )
  kept.sort(key=lambda r: int(re.match(r'G(\d+)', r['work'])[1]))  # type: ignore[index]
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('w', newline='') as file:
    writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(kept)


def described(python: str) -> str:
  ours = ', '.join(f'{n} {importlib.metadata.version(n)}' for n in ('jax', 'jaxlib', 'optax'))
  return f'{ours}, {peers.versions(python)}' if python else ours


def device() -> str:
  """'AMD EPYC, 2 cores': the processor's name as it gives it."""
  name = platform.processor() or platform.machine()
  try:
    found = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())
    name = found[1].strip() if found else name
  except OSError:
    pass
  return f'{name}, {len(cores())} cores'


if __name__ == '__main__':
  sys.exit(main())
