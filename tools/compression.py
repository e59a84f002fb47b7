"""Tables and figure of docs/memory.md on codecs, from results/compression/ alone:
`python -m tools.compression [--write]`.

results/compression/NAME/results.jsonl are what `experiments.sweep --config=configs/compression.py:NAME` left.
Without --write the command only says whether the page is current.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from cl_jax.report.tables import NONE, percent, spread
from tools.figures import FAINT, OURS, RESULTS, THEIRS, markdown
from tools.pages import fill, lines_of, update
from tools.pictures import FIGURES, ROOT, check, drawn, shown, stamp

MAKER = 'tools/compression.py'
PAGE, FIGURE, SOURCE = ROOT / 'docs/memory.md', 'compression', RESULTS / 'compression'
MEMORIES = {'er': 'images (`er`)', 'latent': 'activations (`latent`)'}
STATES = {'ewc': 'penalty of `ewc`', 'adam': 'moments of Adam'}

Lines = list[dict[str, Any]]


def read(name: str) -> dict[str, Lines]:
  """{codec or rules: a line a seed}, in the order in which they ran."""
  found: dict[str, Lines] = {}
  for line in lines_of(RESULTS / 'compression' / name / 'results.jsonl'):
    found.setdefault(label(line['config'].get('compress', {})), []).append(line)
  return found


def label(compress: dict[str, Any]) -> str:
  """What is compressed, in words; 'float32' where nothing is."""
  if compress.get('state'):
    parts = (f'{pattern.strip(".*/")} {codec}' for pattern, codec in compress['state'])
    return ', '.join(parts)
  return compress.get('memory') or compress.get('optimizer') or 'float32'


def accuracy(lines: Lines) -> str:
  return percent([line['acc'] for line in lines])


def row_bytes(name: str, lines: Lines) -> str:
  """Bytes of a slot, from those of the memory; slots + 1 + draw rows, and 4 bytes or flags beside them."""
  first = lines[0]
  slots = first['slots'][name]
  return f'{first["state_bytes"][f"method/{name}"] // (slots + 1 + first["config"][name]["draw"])}'


def gained(lines: Lines, base: Lines) -> str:
  """Difference to `base` within a seed, in points; orders of the classes differ by more than codecs do."""
  if lines is base:
    return NONE
  known = {line['seed']: line['acc'] for line in base}
  pairs = [100 * (line['acc'] - known[line['seed']]) for line in lines if line['seed'] in known]
  return spread(pairs, sign='+')


def part() -> str:
  rows = []
  for name, title in MEMORIES.items():
    cells = read(name)
    for codec, lines in cells.items():
      slots, base = lines[0]['slots'][name], cells.get('float32', lines)
      rows.append((
        title, codec, row_bytes(name, lines), f'{slots:,}', accuracy(lines), gained(lines, base),
        str(len(lines)),
      ))  # fmt: skip
  if not rows:
    return 'There are no results/compression/ yet.'
  memory = markdown(
    ('memory', 'codec', 'bytes a row', 'rows', 'ACC %', 'against float32', 'seeds'), rows
  )
  rows = []
  for name, title in STATES.items():
    role, cells = 'optimiser' if name == 'adam' else 'method/ewc', read(name)
    for codec, lines in cells.items():
      size, base = f'{lines[0]["state_bytes"][role]:,}', cells.get('float32', lines)
      rows.append((title, codec, size, accuracy(lines), gained(lines, base), str(len(lines))))
  state = markdown(('kept', 'as', 'bytes', 'ACC %', 'against float32', 'seeds'), rows)
  picture = shown(
    FIGURE, 'accuracy by codec within one budget', 'results/compression',
    '`python -m experiments.sweep --config=configs/compression.py:NAME --workdir=runs/compression/NAME`, '
    'NAME er or latent',
    '[configs/compression.py](../configs/compression.py)',
  )  # fmt: skip
  return '\n\n'.join((memory, picture, state))


def draw() -> None:
  """Accuracy by the number of rows that fit, a point a codec: means, and each seed faintly."""
  with drawn(FIGURES / f'{FIGURE}.png', stamp(SOURCE), 7, 3.6) as (_, axis):
    for (name, title), colour, marker in zip(MEMORIES.items(), (OURS, THEIRS), 'os', strict=True):
      cells = read(name)
      slots = [lines[0]['slots'][name] for lines in cells.values()]
      values = [[100 * line['acc'] for line in lines] for lines in cells.values()]
      for one in zip(*values, strict=True):
        axis.plot(slots, one, f'{marker}:', color=colour, alpha=0.35, markersize=3, linewidth=1)
      middle = [sum(seeds) / len(seeds) for seeds in values]
      axis.plot(slots, middle, f'{marker}-', color=colour, label=title.replace('`', ''))
      for codec, x, y in zip(cells, slots, middle, strict=True):
        place = {'int8': (5, 7), 'pq32x16': (-36, -13)}.get(codec, (4, -11))
        axis.annotate(codec, (x, y), place, textcoords='offset points', fontsize=8)
    axis.set_xscale('log')
    axis.set(xlabel='rows that fit into 60,000 bytes', ylabel='accuracy, %, mean and seeds')
    axis.grid(color=FAINT, linewidth=0.5)
    axis.legend(frameon=False)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--write', action='store_true', help='write them instead of comparing')
  write = parser.parse_args().write
  there = all(map(read, MEMORIES))
  if write and there:
    draw()
  text = fill(PAGE.read_text(), MAKER, part())
  return update({PAGE: text}, write, 'figures') | check({FIGURE: SOURCE} if there else {})


if __name__ == '__main__':
  sys.exit(main())
