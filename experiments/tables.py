"""The table that a command prints at its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cl_jax.report.lines import flat
from cl_jax.report.tables import LIKELIHOOD, nats, percent

HEAD = ('method', 'scenario', 'dataset')
FIGURES = ('seeds', 'acc %', 'forgetting %', 'state kB', 's / run')


def table(lines: Sequence[Mapping[str, Any]], fields: Iterable[str] = ()) -> str:
  """Mean and 95 % interval over seeds, a row per configuration.

  Args:
    lines: of results.jsonl.
    fields: dotted fields of the configuration that get a column each.
  """
  fields = tuple(fields)
  groups: dict[str, list[Mapping[str, Any]]] = {}
  for line in lines:
    groups.setdefault(line['config_sha256'], []).append(line)
  rows: list[tuple[str, ...]] = [(*HEAD, *fields, *FIGURES)]
  for group in groups.values():
    first = group[0]
    values = flat(first['config'])
    rows.append(
      (
        *(str(first[name]) for name in HEAD),
        *(str(values.get(name, '-')) for name in fields),
        str(len(group)),
        *(shown([line[key] for line in group], first) for key in ('acc', 'forgetting')),
        f'{first["state_bytes"]["total"] / 1000:.0f}',
        f'{sum(line["wall_s"] for line in group) / len(group):.1f}',
      )
    )
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return '\n'.join(
    '  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
  )


def shown(values: Sequence[float | None], line: Mapping[str, Any]) -> str:
  """Percent, or nats where the line's R holds log-likelihoods; '-' where there is nothing."""
  known = [v for v in values if v is not None]
  if not known:
    return '-'
  return f'{nats(known)} nats' if line.get('metric') == LIKELIHOOD else percent(known)
