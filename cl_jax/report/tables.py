"""Tables of sections: cells as text, and their forms for a terminal, Markdown and HTML."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from cl_jax import metrics
from cl_jax.report.lines import Group, Section, backbone, differing, flat, setting

NONE = '–'
PERCENT = {  # heading: (field of results.jsonl, what it means)
  'ACC %': ('acc', 'mean accuracy over all tasks at the end'),
  'forgetting': ('forgetting', 'best accuracy before the last task minus the one at the end'),
  'BWT': ('bwt', 'accuracy at the end minus when the task was new (backward transfer)'),
  'FWT': ('fwt', 'accuracy before a task is learnt, above that of the untrained network'),
  'learning ACC': ('learning_acc', 'accuracy on each task when it was new'),
  'average ACC': ('aaa', 'accuracy on the tasks seen so far, averaged over the stream'),
  'min-ACC': ('min_acc', 'lowest accuracy on a task after it was learnt'),
}
LIKELIHOOD = 'log_likelihood'  # the metric of language models, in the place of accuracy
WHO = {  # `Group.oracle`: what captions say
  '': 'not told the task at test time',
  'batch_test': 'answering test batches as a whole, which tells the task where a batch is of one (an oracle)',
  'task_test': 'told the task at test time (an oracle)',
}
ROLES = ('frozen', 'trainable', 'statistics', 'optimiser')


class Table(NamedTuple):
  """Text cells; the first two columns are words, the others numbers."""

  caption: str
  head: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]


def tables(section: Section) -> list[tuple[Table, Table]]:
  """(results, costs) of the methods that are not told the task at test time, then of those that are.

  The kinds of `WHO` are never in one table: an oracle answers an easier question.
  """
  out = []
  for oracle, who in WHO.items():
    groups = [g for g in section.groups if g.oracle == oracle]
    if groups:
      out.append((results(groups, who), costs(groups, who)))
  return out


def results(groups: Sequence[Group], who: str) -> Table:
  """Accuracies, bytes and time side by side, the best accuracy first."""
  shown = [
    name for name, (key, _) in PERCENT.items() if key == 'acc' or any(g.values(key) for g in groups)
  ]
  likelihood = groups[0].first.get('metric') == LIKELIHOOD
  cell, names = (
    (nats, ['nats a token', 'perplexity', *shown[1:]]) if likelihood else (percent, shown)
  )
  head = ('method', 'needs', 'seeds', *names, 'state', 'time')
  rows = []
  for g in groups:
    cells = [cell(g.values(PERCENT[name][0])) for name in shown]
    if likelihood:
      cells.insert(1, f'{np.exp(-np.mean(g.values("acc"))):.4g}')
    needs = ', '.join(g.first['needs']) or NONE
    rows.append((g.label, needs, str(len(g.lines)), *cells, total(g), seconds(mean(g, 'wall_s'))))
  return Table(f'Results, {who}', head, tuple(rows))


def costs(groups: Sequence[Group], who: str) -> Table:
  """Bytes by role, FLOPs, passes and times."""
  extra = dict.fromkeys(
    role
    for g in groups
    for role in g.first['state_bytes']
    if role not in (*ROLES, 'total') and not role.startswith('method')
  )
  roles = [
    role
    for role in (*ROLES, 'method', *extra)
    if any(role_bytes(g, role) or role in ('frozen', 'trainable', 'method') for g in groups)
  ]
  head = (
    'method',
    *('method state' if role == 'method' else role for role in roles),
    'total',
    'FLOPs / step',
    'passes: forward',
    'backward',
    'predict',
    'time',
    'of it compiling',
    'peak memory',
  )
  rows = []
  for g in groups:
    passes, flops = g.first['passes'], scaled(g.first.get('flops_per_step'), '')
    below = backbone(g.first)
    rows.append(
      (
        g.label,
        *(size(role_bytes(g, role)) for role in roles),
        total(g),
        flops + cached(below, 'flops_per_step', lambda n: scaled(n, '')),
        *(
          plain(passes.get(k)) + cached(below, k, plain)
          for k in ('train_forward', 'train_backward', 'predict_forward')
        ),
        seconds(mean(g, 'wall_s')),
        seconds(mean(g, 'compile_s')),
        size(mean(g, 'peak_rss_bytes')),
      )
    )
  behind = any(backbone(g.first) for g in groups)
  note = '; behind a +, the network whose features are cached' if behind else ''
  return Table(f'Costs, {who}{note}', head, tuple(rows))


def cached(below: dict[str, float | None] | None, key: str, form: Callable[[float], str]) -> str:
  """' + 1', what cached features stand for; ' + ?' where a line does not say it, '' where none are cached."""
  if below is None or key == 'train_backward':
    return ''
  value = below.get(key)
  return f' + {"?" if value is None else form(value)}'


def settings(section: Section) -> Table | None:
  """The fields of the configurations that differ between rows, methods' own aside; None if none do."""
  skip = {'name', 'methods', 'scenario', 'base'}
  configs = []
  for g in section.groups:
    own = {'methods', *(g.first['config'].get('methods') or ())}
    kept = {k: v for k, v in setting(g.first).items() if k not in skip | own}
    configs.append(flat(kept))
  names = differing(configs)
  if not names:
    return None
  rows = [
    (g.label, *(NONE if c.get(n) is None else str(c[n]) for n in names))
    for g, c in zip(section.groups, configs, strict=True)
  ]
  return Table('Settings that differ between rows', ('method', *names), tuple(rows))


def role_bytes(g: Group, role: str) -> float | None:
  """Bytes of a role; 'method' is the sum over the methods of a chain. None where unknown."""
  known = g.first['state_bytes']
  if role == 'method':
    own = [v for k, v in known.items() if k.startswith('method') and v is not None]
    return sum(own) if known else None
  return known.get(role)


def total(g: Group) -> str:
  return size(g.first['state_bytes'].get('total'))


def mean(g: Group, key: str) -> float | None:
  found = g.values(key)
  return float(np.mean(found)) if found else None


def percent(values: Sequence[float]) -> str:
  """'86.4 ± 0.3', the mean and its 95 % interval in percent; '86.4' for one seed."""
  return spread([100 * v for v in values])


def nats(values: Sequence[float]) -> str:
  """'-3.214 ± 0.010', the mean log-likelihood of a token and its 95 % interval."""
  return spread(values, 3)


def spread(values: Sequence[float], digits: int = 1, sign: str = '') -> str:
  """'86.4 ± 0.3': the mean and its 95 % interval; '86.4' of one value, '–' of none; `sign` is '' or '+'."""
  if not values:
    return NONE
  centre, half = metrics.interval(values)
  return f'{centre:{sign}.{digits}f}' + ('' if half is None else f' ± {half:.{digits}f}')


def size(n: float | None) -> str:
  return scaled(n, 'B')


def scaled(n: float | None, unit: str, form: str = '') -> str:
  """'42.5 MB', '1.50 G': three digits, or the given format, and a decimal prefix."""
  if n is None:
    return NONE
  for power, prefix in ((12, 'T'), (9, 'G'), (6, 'M'), (3, 'k')):
    if abs(n) >= 0.9995 * 10**power:
      shown = format(n / 10**power, form) if form else _three(n / 10**power)
      return f'{shown} {prefix}{unit}'
  return f'{n:.0f} {unit}'.strip()


def plain(n: float | None) -> str:
  return NONE if n is None else f'{n:.4g}'


def seconds(n: float | None) -> str:
  if n is None:
    return NONE
  return f'{_three(n)} s' if n < 999.5 else f'{n:.0f} s'


def _three(n: float) -> str:
  return f'{n:.0f}' if abs(n) >= 99.95 else f'{n:.1f}' if abs(n) >= 9.995 else f'{n:.2f}'


def text(table: Table) -> str:
  """Columns aligned by spaces."""
  rows = (table.head, *table.rows)
  widths = [max(len(row[i]) for row in rows) for i in range(len(table.head))]
  lines = [
    '  '.join(
      cell.rjust(w) if numeric(table, i) else cell.ljust(w)
      for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
  return '\n'.join([table.caption, *lines])


def markdown(table: Table) -> str:
  cell = lambda s: s.replace('\\', '\\\\').replace('|', '\\|')  # noqa: E731
  line = lambda cells: f'| {" | ".join(map(cell, cells))} |'  # noqa: E731
  rule = ['---:' if numeric(table, i) else '---' for i in range(len(table.head))]
  rows = [line(table.head), f'|{"|".join(rule)}|', *map(line, table.rows)]
  return '\n'.join([f'{table.caption}:', '', *rows])


def as_html(table: Table) -> str:
  """A table in a box that scrolls sideways where the page is narrow."""
  e = html.escape
  kind = lambda i: ' class="n"' if numeric(table, i) else ''  # noqa: E731
  head = ''.join(
    f'<th scope="col"{kind(i)}{_about(name)}>{e(name)}</th>' for i, name in enumerate(table.head)
  )
  body = ''
  for first, *others in table.rows:
    cells = ''.join(f'<td{kind(i)}>{e(c)}</td>' for i, c in enumerate(others, 1))
    body += f'<tr><th scope="row">{e(first)}</th>{cells}</tr>\n'
  return (
    f'<div class="scroll" tabindex="0" role="region" aria-label="{e(table.caption)}"><table>'
    f'<caption>{e(table.caption)}</caption>\n<thead><tr>{head}</tr></thead>\n'
    f'<tbody>\n{body}</tbody></table></div>\n'
  )


def numeric(table: Table, i: int) -> bool:
  """Whether a column is set flush right."""
  return i > 0 and table.head[i] != 'needs'


def _about(name: str) -> str:
  return f' title="{html.escape(PERCENT[name][1])}"' if name in PERCENT else ''
