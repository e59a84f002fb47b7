"""Rows of results/edge.csv: read, and replaced by learner and target."""

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
