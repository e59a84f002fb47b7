"""Tables and figures of README and docs/ from the files in results/: `python -m tools.figures [--write]`.

results/published.csv and results/bench.csv become the tables of docs/results.md and one picture each in
docs/figures/; results/demo/table.md becomes README's table. Nothing else goes in. Without --write the
command only says whether the committed tables are current.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from tools.pages import fill, update
from tools.pictures import FIGURES, ROOT, check, drawn, shown, stamp

RESULTS = ROOT / 'results'
MAKER = 'tools/figures.py'
OURS, THEIRS, FAINT = '#0072b2', '#d55e00', '#c8c8c8'

Row = dict[str, str]


def read(name: str) -> list[Row]:
  path = RESULTS / name
  if not path.exists():
    return []
  with path.open(newline='') as file:
    return list(csv.DictReader(file))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join(f'| {" | ".join(c.replace("|", "/") for c in line)} |' for line in lines)


def with_error(value: str, error: str) -> str:
  return f'{value} ± {error}' if value and error else value


def published(rows: Sequence[Row]) -> str:
  """A table per published table."""
  if not rows:
    return 'There is no results/published.csv yet: `make reproduce` writes it.'
  parts = []
  for table, group in groupby(rows, lambda r: r['table']):
    cells = [
      (
        r['scenario'],
        r['method'],
        r['setting'],
        r['needs'].replace(' ', ', ') or 'nothing',
        r['metric'],
        with_error(r['published'], r['published_err']),
        with_error(r['ours'], r['ours_ci95']),
        r['seeds'],
        r['note'],
      )
      for r in group
    ]
    head = (
      'scenario', 'method', 'setting', 'needs', 'metric', 'published', 'ours, 95 %', 'seeds', 'note',
    )  # fmt: skip
    parts += [f'### {table}', markdown(head, cells)]
  parts.append(
    shown(
      'published',
      'published figures and ours',
      'results/published.csv',
      '`make reproduce`; each row there has its own',
      '`experiments/published/`',
    )
  )
  return '\n\n'.join(parts)


def bench(rows: Sequence[Row]) -> str:
  """Ratios; more than 1 means that cl_jax is better."""
  if not rows:
    return 'There is no results/bench.csv yet: `make bench` writes it.'
  cells = [
    (
      r['work'],
      r['against'],
      r['metric'],
      r['ratio_median'],
      f'{r["ratio_min"]} to {r["ratio_max"]}',
      f'{r["ours"]} / {r["theirs"]} {r["unit"]}',
      r['runs'],
    )
    for r in rows
  ]
  head = ('work', 'against', 'metric', 'ratio', 'range', 'ours / theirs', 'runs')
  where = sorted({f'{r["versions"]}; {r["device"]}; {r["date"]}' for r in rows})
  picture = shown('bench', 'ratios', 'results/bench.csv', '`make bench`', '`benchmarks/`')
  return '\n\n'.join((markdown(head, cells), *where, picture))


def demo() -> str:
  path = RESULTS / 'demo/table.md'
  if not path.exists():
    return 'There is no results/demo/table.md yet.'
  return path.read_text()


def number(text: str) -> float:
  return float(text) if text else 0.0


def draw_published(rows: Sequence[Row], path: Path, source: str) -> None:
  """Ours (with interval) beside the paper's value, a line for each accuracy that was run."""
  done = [r for r in rows if r['ours'] and r['published'] and r['metric'] == 'acc']
  names = [f'{r["table"]} {r["scenario"]}: {r["method"]}, {r["setting"]}' for r in done]
  with canvas(len(done), path, source) as axis:
    for y, r in enumerate(done):
      axis.plot([float(r['published']), float(r['ours'])], [y, y], color=FAINT, zorder=0)
    for column, error, colour, label, marker in (
      ('published', 'published_err', THEIRS, 'published', 's'),
      ('ours', 'ours_ci95', OURS, 'ours, 95 % interval', 'o'),
    ):
      axis.errorbar(
        [float(r[column]) for r in done],
        range(len(done)),
        xerr=[number(r[error]) for r in done],
        fmt=marker,
        color=colour,
        mfc='none' if marker == 's' else colour,
        label=label,
      )
    axis.set(yticks=range(len(done)), yticklabels=names, xlabel='accuracy, %')


def draw_bench(rows: Sequence[Row], path: Path, source: str) -> None:
  """Median ratio and range, on a logarithmic axis, with the line where both are equal."""
  names = [f'{r["work"]}, {r["metric"]}: {r["against"]}' for r in rows]
  middle = [float(r['ratio_median']) for r in rows]
  low = [m - number(r['ratio_min']) for m, r in zip(middle, rows, strict=True)]
  high = [number(r['ratio_max']) - m for m, r in zip(middle, rows, strict=True)]
  with canvas(len(rows), path, source) as axis:
    axis.axvline(1.0, color=FAINT, zorder=0)
    axis.errorbar(middle, range(len(rows)), xerr=[low, high], fmt='o', color=OURS, label='ratio')
    axis.set_xscale('log')
    axis.set(yticks=range(len(rows)), yticklabels=names, xlabel='ratio (more is better)')


@contextmanager
def canvas(n: int, path: Path, source: str):
  """An axis with a line of text for each of n entries; see `pictures.drawn`."""
  with drawn(path, source, 9, 1.2 + 0.24 * n) as (figure, axis):
    yield axis
    axis.invert_yaxis()
    axis.grid(axis='x', color=FAINT, linewidth=0.5)
    axis.margins(y=0.02)
    figure.legend(loc='outside lower right', frameon=False, ncols=2)


def pages() -> dict[Path, str]:
  readme, results = ROOT / 'README.md', ROOT / 'docs/results.md'
  text = fill(results.read_text(), f'{MAKER} published', published(read('published.csv')))
  return {
    readme: fill(readme.read_text(), MAKER, demo()),
    results: fill(text, f'{MAKER} bench', bench(read('bench.csv'))),
  }


def main() -> int:
  parser = argparse.ArgumentParser(description='tables and figures from the files in results/')
  parser.add_argument('--write', action='store_true', help='write them instead of comparing')
  write = parser.parse_args().write
  drawing = {'published': draw_published, 'bench': draw_bench}
  sources = {n: p for n in drawing if (p := RESULTS / f'{n}.csv').exists()}
  for name, source in sources.items() if write else ():
    drawing[name](read(source.name), FIGURES / f'{name}.png', stamp(source))
  return update(pages(), write, 'figures') | check(sources)


if __name__ == '__main__':
  sys.exit(main())
