"""Rows of results/edge.csv: read, replaced by learner and target, printed."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cl_jax import durable
from cl_jax.errors import UserError

COLUMNS = (
  'learner', 'target', 'parity_int', 'parity_float', 'code_bytes', 'state_bytes', 'peak_bytes',
  'macs_per_step', 'instructions_per_step', 'energy_uj_estimate', 'accuracy', 'steps', 'note',
)  # fmt: skip


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Puts rows into the file, in the place of those of the same learner and target."""
  new = {(r['learner'], r['target']): r for r in rows}
  there = read(path)
  kept = [new.pop((r['learner'], r['target']), r) for r in there]
  text = io.StringIO()
  out: Any = csv.DictWriter(text, COLUMNS, lineterminator='\n')
  out.writeheader()
  out.writerows([*kept, *new.values()])
  path.parent.mkdir(parents=True, exist_ok=True)
  durable.write(path, text.getvalue())


def read(path: Path) -> list[dict[str, Any]]:
  if not path.exists():
    return []
  with path.open(newline='') as file:
    reader = csv.DictReader(file)
    if tuple(reader.fieldnames or ()) != COLUMNS:
      raise UserError(f'{path} has other columns than results/edge.csv: move it away')
    return list(reader)


def table(rows: Sequence[Mapping[str, Any]], hashes: Mapping[str, str]) -> str:
  """The rows of one learner as aligned text; what is the same on all targets comes above."""
  if not rows:
    return 'nothing was verified'
  first = rows[0]
  number = lambda v: f'{v:,}' if isinstance(v, int) else str(v) or '-'  # noqa: E731
  head = (
    f'{first["learner"]}: {first["steps"]} steps, state {number(first["state_bytes"])}, peak '
    f'{number(first["peak_bytes"])} bytes (planned = measured), '
    f'{number(first["macs_per_step"])} MACs a step, '
    f'energy {first["energy_uj_estimate"] or "-"} uJ (an estimate), accuracy {first["accuracy"] or "-"}'
  )
  names = ('target', 'integers', 'floats', 'state hash', 'code bytes', 'instructions/step')
  lines = [names] + [
    (
      r['target'], r['parity_int'], r['parity_float'], hashes[r['target']], number(r['code_bytes']),
      number(r['instructions_per_step']),
    )
    for r in rows
  ]  # fmt: skip
  widths = [max(len(line[k]) for line in lines) for k in range(len(names))]
  body = ['  '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines]
  return '\n'.join([head, *(f'  {line.rstrip()}' for line in body)])
