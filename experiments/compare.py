"""Tables across runs: `python -m experiments.compare DIR... [--out DIR]`.

Every DIR holds a results.jsonl; what has none is named and left out. Runs of one configuration are one row,
with the mean over seeds and its 95 % interval. What was learnt under another dataset, scenario or protocol,
and methods that are told the task at test time, are never in one ranking: each gets a table of its own. With
--out the tables are also written as compare.md, beside report.html and figures of all runs together.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cl_jax import report
from cl_jax.errors import UserError
from cl_jax.report.lines import Line, Problem, identity, read, sections
from cl_jax.report.page import replace
from cl_jax.report.tables import Table, markdown, numeric, tables, text

PROGRAM = 'experiments.compare'


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog=f'python -m {PROGRAM}',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('dirs', nargs='+', metavar='DIR', type=Path)
  parser.add_argument('--out', metavar='DIR', type=Path, help='compare.md, report.html, figures/')
  parser.add_argument('--costs', action='store_true', help='also bytes by role, FLOPs and passes')
  options = parser.parse_args(argv)
  try:
    return command(options.dirs, options.out, options.costs)
  except UserError as error:
    print(f'{PROGRAM}: {error}', file=sys.stderr)
    return 2
  except BrokenPipeError:  # the reader, `head` for instance, has seen enough
    sys.stderr.close()
    return 0


def command(dirs: Sequence[Path], out: Path | None, costs: bool) -> int:
  usable = [d for d in dirs if (d / 'results.jsonl').is_file()]
  missing = ', '.join(str(d) for d in dirs if d not in usable)
  if not usable:
    raise UserError(f'no results.jsonl in {missing}: name the --workdir of runs that have finished')
  if missing:  # a pattern like DIR/* also finds what --out has written
    print(f'left out, without results.jsonl: {missing}', file=sys.stderr)
  lines, problems = gather(usable)
  for p in problems:
    print(f'{p.path}, line {p.number} left out: {p.why}', file=sys.stderr)
  if not lines:
    raise UserError('no usable result in any of the directories: run experiments.run first')
  titled = [
    (section.title, [t for pair in tables(section) for t in (pair if costs else pair[:1])])
    for section in sections(lines)
  ]
  show(titled)
  if out is not None:
    page = report.save(out, lines, problems)
    parts = [f'## {title}\n\n' + '\n\n'.join(map(markdown, ts)) for title, ts in titled]
    try:
      replace(out / 'compare.md', ('\n\n'.join(parts) + '\n').encode())
    except OSError as error:
      raise UserError(f'{out / "compare.md"} cannot be written: {error.strerror}') from error
    print(f'written: {out / "compare.md"} and {page}')
  return 0


def gather(dirs: Sequence[Path]) -> tuple[list[Line], list[Problem]]:
  """The lines of all directories; a run that is in several of them counts once."""
  kept: dict[tuple[str, int], Line] = {}
  problems: list[Problem] = []
  for folder in dirs:
    found, wrong = read(folder / 'results.jsonl')
    problems += wrong
    for line in found:
      kept.setdefault((identity(line), line['seed']), line)
  return [*kept.values()], problems


def show(titled: Sequence[tuple[str, Sequence[Table]]]) -> None:
  """On a terminal with rich, as plain text where there is none."""
  rich = None
  if sys.stdout.isatty():
    try:
      import rich.console as rich
    except ImportError:
      pass
  for title, each in titled:
    if rich is None:
      print(f'{title}\n')
      print('\n\n'.join(map(text, each)), end='\n\n')
      continue
    console = rich.Console()
    console.print(title, style='bold', markup=False, highlight=False)
    for table in each:
      console.print(drawn(fitted(table, console.width)))


def fitted(table: Table, width: int) -> Table:
  """Without as many of the columns that matter least as it takes to fit a terminal."""
  for name in ('FWT', 'min-ACC', 'average ACC', 'BWT', 'learning ACC', 'seeds', 'needs'):
    columns = [*zip(table.head, *table.rows, strict=True)]
    if sum(max(map(len, column)) + 2 for column in columns) + 2 < width:
      break
    head, *rows = zip(*(c for c in columns if c[0] != name), strict=True)
    table = Table(table.caption, head, tuple(rows))
  return table


def drawn(table: Table):
  """A rich.table.Table."""
  from rich import box
  from rich.table import Table as Drawn
  from rich.text import Text

  out = Drawn(title=table.caption, title_justify='left', box=box.SIMPLE_HEAD)
  for i, name in enumerate(table.head):
    out.add_column(name, justify='right' if numeric(table, i) else 'left')
  for row in table.rows:
    out.add_row(*map(Text, row))
  return out


if __name__ == '__main__':
  sys.exit(main())
