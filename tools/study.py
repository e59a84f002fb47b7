"""Tables and figures of docs/study.md from results/study/ alone: `python -m tools.study [--write]`.

results/study/NAME/{results,drift}.jsonl are what `experiments.study` left. Without --write the command only
says whether the page is current.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cl_jax import metrics
from cl_jax.report.lines import ORACLES, backbone
from cl_jax.report.tables import NONE, cached, nats, percent, size
from experiments.study import cell_of
from tools.figures import FAINT, OURS, RESULTS, THEIRS, canvas, markdown
from tools.pages import commits, fill, lines_of, update
from tools.pictures import FIGURES, ROOT, check, drawn, stamp
from tools.pictures import shown as picture

MAKER = 'tools/study.py'
PAGE = ROOT / 'docs/study.md'
STUDIES = {  # folder: module of its configuration
  'clinc150': 'study_encoder',
  'banking77': 'study_encoder',
  'vit_cifar10': 'study_vit',
  'vit_omniglot': 'study_vit',
  'lm': 'study_lm',
}


class Cell(NamedTuple):
  """The runs of one cell of a study, a line each, and what was measured after each."""

  words: str
  lines: list[dict[str, Any]]
  drift: list[dict[str, Any]]

  def values(self, key: str) -> list[float]:
    return [line[key] for line in self.lines if line[key] is not None]

  @property
  def orders(self) -> int:
    """Orders of the tasks, one a seed, that were run."""
    return len({line['seed'] for line in self.lines})

  @property
  def oracle(self) -> bool:
    """Whether something tells the task at test time."""
    return any(n in self.lines[0]['needs'] for n in ORACLES)

  @property
  def beside(self) -> int:
    """Bytes kept between steps beside the frozen network: what learning costs."""
    known = self.lines[0]['state_bytes']
    return known['total'] - known['frozen']


def read(folder: Path) -> list[Cell]:
  """The cells in the order of the configuration, also those that have no runs; [] without any results."""
  if not (folder / 'results.jsonl').exists():
    return []
  names = importlib.import_module(f'configs.{STUDIES[folder.name]}').CELLS
  found: dict[str, Cell] = {name: Cell(name, [], []) for name in names}
  for line in lines_of(folder / 'results.jsonl'):
    found[plain(cell_of(line))].lines.append(line)
  for row in lines_of(folder / 'drift.jsonl'):
    found[plain(row['cell'])].drift.append(row)
  return [*found.values()]


def left(cells: Sequence[Cell]) -> str:
  """What the configuration lists and the table does not have: cells, and orders that others were run with."""
  name = lambda some: ', '.join(f'`{c.words}`' for c in some)  # noqa: E731
  most, absent = max(c.orders for c in cells), [c for c in cells if not c.orders]
  said = [
    f'Not run: {name(absent)} ({len(absent)} of the {len(cells)} cells of the configuration).'
    if absent
    else f'All {len(cells)} cells of the configuration were run.'
  ]
  for n in range(1, most):
    if some := [c for c in cells if c.orders == n]:
      said.append(f'Run with {n} of the {most} orders of the tasks: {name(some)}.')
  return ' '.join(said)


def plain(words: str) -> str:
  """The words of a cell without those that name the data."""
  return ','.join(w for w in words.split(',') if w not in (*STUDIES, 'cifar10', 'omniglot'))


def table(cells: Sequence[Cell], names: dict[str, str]) -> str:
  """A row a cell, the best first; last those that something tells the task at test time."""
  head = (
    'adapted', 'method', 'needs', 'ACC %', 'forgetting %', 'when new %', 'CKA', 'beside the frozen network',
    'passes', 'FLOPs / step', 'time, s', 'orders',
  )  # fmt: skip
  rows = []
  for c in sorted(cells, key=lambda c: (c.oracle, -float(np.mean(c.values('acc'))))):
    adapted, _, method = c.words.partition(',')
    first = c.lines[0]
    method += ' (an oracle)' if c.oracle else ''
    passes, below = first['passes'], backbone(first)
    flops = f'{first["flops_per_step"]:.2g}' if first['flops_per_step'] else NONE
    moved = [row['cka'] for row in c.drift]
    rows.append((
      names[adapted], method, ', '.join(first['needs']) or NONE, percent(c.values('acc')),
      percent(c.values('forgetting')), percent(c.values('learning_acc')),
      f'{np.mean(moved):.2f}' if moved else NONE, size(c.beside),
      ' / '.join(
        f'{passes[k]:.3g}' + cached(below, k, '{:.3g}'.format)
        for k in ('train_forward', 'train_backward', 'predict_forward')
      ),
      flops + cached(below, 'flops_per_step', '{:.2g}'.format),
      f'{np.mean(c.values("wall_s")):.0f}', str(c.orders),
    ))  # fmt: skip
  return markdown(head, rows)


def language(cells: Sequence[Cell], names: dict[str, str]) -> str:
  """Perplexities after the last stage, and what became of text that nothing was learnt from."""
  held = sorted({name for c in cells for row in c.drift for name in row.get('held_out', {})})
  head = (
    'adapted', 'method', 'before, nats', 'nats a token', 'perplexity', 'forgetting, nats', 'when new, nats',
    *(f'{name}: before, after' for name in held), 'CKA', 'beside the frozen network', 'time, s', 'runs',
  )  # fmt: skip
  rows = []
  for c in sorted(cells, key=lambda c: -float(np.mean(c.values('acc')))):
    adapted, _, method = c.words.partition(',')
    pairs = {
      n: np.exp(
        -np.mean([row['held_out'][n] for row in c.drift if n in row.get('held_out', {})], 0)
      )
      for n in held
    }
    moved = [row['cka'] for row in c.drift]
    rows.append((
      names[adapted], method, nats(before(c)), nats(c.values('acc')),
      f'{np.exp(-np.mean(c.values("acc"))):.1f}',
      nats(c.values('forgetting')), nats(c.values('learning_acc')),
      *(f'{pairs[n][0]:.1f}, {pairs[n][1]:.1f}' if np.ndim(pairs[n]) else NONE for n in held),
      f'{np.mean(moved):.2f}' if moved else NONE, size(c.beside), f'{np.mean(c.values("wall_s")):.0f}',
      str(len(c.lines)),
    ))  # fmt: skip
  return markdown(head, rows)


def before(c: Cell) -> list[float]:
  """The mean over all tasks before the first step, of each run."""
  return [float(np.mean(row['before'])) for row in c.drift if 'before' in row]


def is_language(cells: Sequence[Cell]) -> bool:
  return cells[0].lines[0].get('metric') == 'log_likelihood'


def draw(cells: Sequence[Cell], names: dict[str, str], path: Path, source: str) -> None:
  """Accuracy at the end beside accuracy when new, a line a cell: the distance is what was lost."""
  if is_language(cells):
    scale, label = 1.0, 'log-likelihood of a token, nats'
  else:
    scale, label = 100.0, 'accuracy, %'
  ordered = sorted(cells, key=lambda c: -float(np.mean(c.values('acc'))))
  text = []
  with canvas(len(ordered), path, source) as axis:
    for y, c in enumerate(ordered):
      adapted, _, method = c.words.partition(',')
      text.append(f'{names[adapted]}: {method}{" (an oracle)" if c.oracle else ""}')
      new, half_new = metrics.interval([scale * v for v in c.values('learning_acc')] or [np.nan])
      end, half = metrics.interval([scale * v for v in c.values('acc')])
      axis.plot([new, end], [y, y], color=FAINT, zorder=0)
      for value, error, colour, marker, name in (
        (new, half_new, THEIRS, 's', 'each task when it was new'),
        (end, half, OURS, 'o', 'all tasks at the end, 95 % interval over orders'),
      ):
        axis.errorbar(
          [value], [y], xerr=None if error is None else [error], fmt=marker, color=colour,
          mfc='none' if marker == 's' else colour, label=name if y == 0 else None,
        )  # fmt: skip
    start = [v for c in ordered if not c.words.startswith('random') for v in before(c)]
    if is_language(cells) and start:
      axis.axvline(float(np.mean(start)), color=FAINT, linestyle='--', label='before learning')
    axis.set(yticks=range(len(text)), yticklabels=text, xlabel=label, ylim=(-0.5, len(text) - 0.5))


def draw_budget(cells: Sequence[Cell], names: dict[str, str], path: Path, source: str) -> None:
  """Accuracy against the bytes beside the frozen network; the front is what nothing beats at its size."""
  import matplotlib

  scale = 1.0 if is_language(cells) else 100.0
  other = lambda c: 'joint' in c.words or c.words.startswith('random') or c.oracle  # noqa: E731
  known = [c for c in cells if not other(c)]
  points = [(c.beside, scale * float(np.mean(c.values('acc'))), c) for c in known]
  palette: Any = matplotlib.colormaps['tab20']
  colours = dict(zip(names, palette.colors, strict=False))
  best, front = -np.inf, []
  for x, y, c in sorted(points, key=lambda p: (p[0], -p[1])):
    if y > best:
      best = y
      front.append((x, y, c))
  with drawn(path, source, 9, 5) as (figure, axis):
    for kind, name in names.items():
      own = [(x, y) for x, y, c in points if c.words.split(',')[0] == kind]
      if own:
        axis.scatter(*zip(*own, strict=True), s=28, color=colours[kind], label=name)
    axis.step([f[0] for f in front], [f[1] for f in front], where='post', color=FAINT, zorder=0)
    for x, y, c in front:
      axis.annotate(c.words, (x, y), (4, 5), textcoords='offset points', fontsize=8)
    axis.set_xscale('log')
    what = 'log-likelihood, nats' if scale == 1.0 else 'accuracy over all tasks at the end, %'
    axis.set(xlabel='bytes kept beside the frozen network', ylabel=what)
    axis.grid(color=FAINT, linewidth=0.5)
    figure.legend(loc='outside right upper', frameon=False, fontsize=8)


def part(folder: str) -> str:
  listed = read(RESULTS / 'study' / folder)
  cells = [c for c in listed if c.lines]
  if not cells:
    return f'Not run yet: results/study/{folder} is not there.'
  names = importlib.import_module(f'configs.{STUDIES[folder]}').NAMES
  made = language(cells, names) if is_language(cells) else table(cells, names)
  lines = [line for c in cells for line in c.lines]
  first = lines[0]
  where = f'{first["device"]}; jax {first["versions"].get("jax")}; {commits(lines)}'
  own = f'each of the {len(lines)} runs has its own in its line, with its configuration'
  config = f'configs/{STUDIES[folder]}.py'
  beneath = (f'results/study/{folder}', f'`{first["command"]}`; {own}', f'[{config}](../{config})')
  pictures = (
    picture(f'study_{folder}', 'accuracy when new and at the end', *beneath),
    picture(f'study_{folder}_bytes', 'accuracy against bytes', *beneath),
  )
  return '\n\n'.join((made, left(listed), f'On {where}.', *pictures))


def page() -> str:
  text = PAGE.read_text()
  for folder in STUDIES:
    text = fill(text, f'{MAKER} {folder}', part(folder))
  return text


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--write', action='store_true', help='write them instead of comparing')
  write = parser.parse_args().write
  sources = {}
  for folder, module in STUDIES.items():
    source = RESULTS / 'study' / folder
    cells = [c for c in read(source) if c.lines]
    if not cells:
      continue
    sources |= {f'study_{folder}': source, f'study_{folder}_bytes': source}
    if write:
      names = importlib.import_module(f'configs.{module}').NAMES
      draw(cells, names, FIGURES / f'study_{folder}.png', stamp(source))
      draw_budget(cells, names, FIGURES / f'study_{folder}_bytes.png', stamp(source))
  return update({PAGE: page()}, write, 'figures') | check(sources)


if __name__ == '__main__':
  sys.exit(main())
