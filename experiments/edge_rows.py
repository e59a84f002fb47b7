"""What a target gave, as a row of results/edge.csv and in a printed table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cl_jax import durable
from cl_jax.edge import energy, parity, ram, targets, toolchain
from cl_jax.errors import UserError
from experiments import results

COLUMNS = (
  'learner', 'target', 'parity_int', 'parity_float', 'code_bytes', 'state_bytes', 'peak_bytes',
  'macs_per_step', 'instructions_per_step', 'energy_uj_estimate', 'accuracy', 'steps', 'note',
)  # fmt: skip


class Verified(NamedTuple):
  """What a target gave.

  Attributes:
    target: its name.
    parity: of the state, against JAX.
    logits: the largest difference of the prediction's.
    hash: of the state.
    image: see `toolchain.Image`.
    instructions: of a step; None where they are not counted.
    stack: bytes that were touched; None with an operating system.
  """

  target: str
  parity: parity.Parity
  logits: float
  hash: str
  image: toolchain.Image
  instructions: int | None
  stack: int | None


def write(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> None:
  """Puts rows into the file, in the place of those of the same learner and target."""
  new = {(r['learner'], r['target']): r for r in rows}
  there = read(path, columns)
  kept = [new.pop((r['learner'], r['target']), r) for r in there]
  text = io.StringIO()
  out: Any = csv.DictWriter(text, columns, lineterminator='\n')
  out.writeheader()
  out.writerows([*kept, *new.values()])
  path.parent.mkdir(parents=True, exist_ok=True)
  durable.write(path, text.getvalue())


def read(path: Path, columns: Sequence[str] = COLUMNS) -> list[dict[str, Any]]:
  """The rows of a file.

  Raises:
    UserError: it has other columns.
  """
  if not path.exists():
    return []
  with path.open(newline='') as file:
    reader = csv.DictReader(file)
    if tuple(reader.fieldnames or ()) != tuple(columns):
      raise UserError(f'{path} has other columns than {", ".join(columns)}: move it away')
    return list(reader)


def row(
  manifest: Mapping[str, Any],
  v: Verified,
  steps: int,
  right: float | None,
  done: Sequence[Verified],
) -> dict[str, Any]:
  """The line of results/edge.csv."""
  macs = manifest['macs']['step']
  batch = sum(ram.leaf_bytes(leaf) for leaf in manifest['batch'])
  estimate = energy.estimate(macs, manifest['state_bytes'] + manifest['arenas']['step'] + batch)
  target = targets.TARGETS[v.target]
  notes = [f'state {v.hash}']
  if v.stack is not None:
    notes.append(f'stack {v.stack}')
  if v.instructions is None:
    why = 'not emulated' if not target.emulators else 'this emulator loads no plugin'
    notes.append(f'instructions not counted: {why}')
  peers = {w.hash for w in done if w.target == 'host'}
  if right is not None and v.target != 'host':
    notes.append('accuracy by host')
  return {
    'learner': results.variant_name(manifest['config']),
    'target': v.target,
    'parity_int': 'bitwise' if not v.parity.differing else f'{len(v.parity.differing)} differ',
    'parity_float': f'{max(v.parity.error, v.logits):.1e}',
    'code_bytes': v.image.code_bytes,
    'state_bytes': manifest['state_bytes'],
    'peak_bytes': sum(manifest['ram_bytes'].values()),
    'macs_per_step': macs,
    'instructions_per_step': '' if v.instructions is None else v.instructions,
    'energy_uj_estimate': '' if estimate.uj is None else f'{estimate.uj:.3g}',
    'accuracy': '' if right is None or peers - {v.hash} else f'{right:.4f}',
    'steps': steps,
    'note': '; '.join(notes),
  }


def table(rows: Sequence[Mapping[str, Any]], done: Sequence[Verified]) -> str:
  """Aligned text; what is the same on all targets comes above."""
  if not done:
    return 'nothing was verified'
  first = rows[0]
  number = lambda v: f'{v:,}' if isinstance(v, int) else str(v or '-')  # noqa: E731
  head = (
    f'{first["learner"]}: {first["steps"]} steps; planned: state {number(first["state_bytes"])}, peak '
    f'{number(first["peak_bytes"])} bytes; {number(first["macs_per_step"])} MACs a step, energy '
    f'{first["energy_uj_estimate"] or "-"} uJ (an estimate), accuracy {first["accuracy"] or "-"}'
  )
  names = ('target', 'integers', 'floats', 'state hash', 'code', 'state + arena', 'image RAM',
           'stack used', 'instructions/step')  # fmt: skip
  lines = [names] + [
    (
      v.target, r['parity_int'], r['parity_float'], v.hash, number(v.image.code_bytes),
      number(sum(v.image.held.values())), number(v.image.ram_bytes), number(v.stack),
      number(v.instructions),
    )
    for r, v in zip(rows, done, strict=True)
  ]  # fmt: skip
  return '\n'.join([head, *aligned(lines)])


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
  """Lines of cells as text in columns."""
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  body = ['  '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines]
  return [f'  {line.rstrip()}' for line in body]
