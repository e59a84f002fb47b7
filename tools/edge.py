"""Pareto figures and the tables of two kinds of learners of docs/edge.md: `python -m tools.edge [--write]`.

They are made from results/edge.csv (`make edge`), results/demo/results.jsonl (`make demo`) and
results/sparse/ (`experiments.run` and `experiments.budget --json` of configs/edge_sparse.py) alone.
Without --write the command only says whether the page is current.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cl_jax import durable, metrics
from cl_jax.edge import energy
from cl_jax.report import pareto
from cl_jax.report.pareto import Point
from cl_jax.report.tables import NONE, spread
from configs import demo, edge_sparse
from tools.figures import RESULTS, markdown, read
from tools.pages import fill, lines_of, update
from tools.pictures import FIGURES, FORMS, ROOT, check, shown, stamp

MAKER = 'tools/edge.py'
PAGE = ROOT / 'docs/edge.md'
BYTES, MACS, ENERGY = 'bytes of state', 'multiply-adds of a step', 'estimated energy of a step'
PANELS = ((BYTES, 'B'), (MACS, ''), (ENERGY, 'J'))
APART = 'told the task, or all data at once: another problem'
KINDS = {
  'replay': ('er', 'er_ace', 'derpp', 'agem', 'latent', 'remind', 'gdumb', 'dreamnet'),
  'regularisation': ('ewc', 'si', 'lwf'),
  'statistics of frozen features': ('ncm', 'slda', 'ranpac'),
  'low-rank adapters': ('lora',),
  'prompts': ('prompt_tuning',),
  'fine-tuning': ('naive', 'joint', 'hat', 'packnet'),
}
# Learners of the table of statistics, adapters and memories in few bits.
SMALL = (
  'ncm', 'slda', 'ranpac', 'ranpac (structured)', 'lora', 'lora+er (vit_int8)',
  'lora+er (vit_int8_pretrained)', 'prompt_tuning+er (vit_int8)',
  'prompt_tuning+er (vit_int8_pretrained)', 'latent', 'latent (int8)', 'dreamnet',
)  # fmt: skip
UPDATES = {
  'everything': ('full', 'micro'),
  'a share of the channels': ('in', 'channels', 'outputs'),
  'whole layers or biases': ('upper', 'bias', 'head'),
}
SPARSE = RESULTS / 'sparse'
FROM = {  # what each figure is drawn from, the command that made that, its configuration
  'pareto_edge': (RESULTS / 'edge.csv', 'make edge', '[configs/edge.py](../configs/edge.py)'),
  'pareto_demo': (
    RESULTS / 'demo/results.jsonl',
    'make demo',
    '[configs/demo.py](../configs/demo.py)',
  ),
  'pareto_sparse': (
    SPARSE,
    'python -m experiments.run --config=configs/edge_sparse.py:WORDS',
    '[configs/edge_sparse.py](../configs/edge_sparse.py)',
  ),
}


def kind_of(name: str, kinds: dict[str, tuple[str, ...]]) -> str:
  """Of a learner, by its first method: 'lora+er (vit_int8)' is an adapter."""
  method = name.partition(' ')[0].partition('+')[0]
  return next(kind for kind, names in kinds.items() if method in names)


# --- points -----------------------------------------------------------------------------------------


def edge_points() -> list[Point]:
  """The learners of results/edge.csv, by the figures of the host."""
  found = []
  for row in read('edge.csv'):
    name = row['learner']
    if row['target'] != 'host' or not row['accuracy']:
      continue
    costs = {BYTES: float(row['state_bytes'])}
    if name != 'gdumb':  # which trains at boundaries alone
      costs |= {MACS: float(row['macs_per_step']), ENERGY: 1e-6 * float(row['energy_uj_estimate'])}
    accuracy = float(row['accuracy'])
    found.append(
      Point(name, kind_of(name, KINDS), accuracy, None, costs, name in ('hat', 'packnet'))
    )
  return found


def demo_points(path: Path) -> list[Point]:
  """The runs of make demo; what learns from cached features is charged the forward pass that made them."""
  groups = grouped(lines_of(path), lambda line: (line['method'], line['scenario']))
  work = {key: lines[0]['flops_per_step'] for key, lines in groups.items()}
  forward = (
    work['lwf', 'class'] - work['naive', 'class']
  )  # a second forward pass is all that lwf adds
  found = []
  for (method, scenario), lines in groups.items():
    first = lines[0]
    cached = first['config']['cache_features']
    macs = (work[method, scenario] + (forward if cached else 0)) // 2
    name = 'joint' if scenario == 'joint' else method
    found.append(
      point(
        name, kind_of(name, KINDS), lines, first['state_bytes']['total'], macs, scenario != 'class'
      )
    )
  return found


def point(name: str, kind: str, lines: list, state: int, macs: int, apart: bool = False) -> Point:
  centre, half = metrics.interval([line['acc'] for line in lines])
  joules = energy.estimate(macs, state).uj
  costs = {BYTES: float(state), MACS: float(macs), ENERGY: 1e-6 * (joules or 0.0)}
  return Point(name, kind, float(centre), half, costs, apart)


def grouped(lines: Sequence[dict], key) -> dict[Any, list[dict]]:
  found: dict[Any, list[dict]] = {}
  for line in lines:
    found.setdefault(key(line), []).append(line)
  return found


def small_table() -> str:
  """What learners of `SMALL` take on a Cortex-M7 and reach on the whole stream."""
  head = (
    'learner', 'state', 'RAM', 'code and constants', 'multiply-adds of a step', 'instructions of a step',
    'targets', 'floats', 'accuracy, %',
  )  # fmt: skip
  rows, table = [], read('edge.csv')
  for name in SMALL:
    own = {row['target']: row for row in table if row['learner'] == name}
    if 'cortex-m7' not in own:
      continue
    at = own['cortex-m7']
    worst = max(own.values(), key=lambda row: float(row['parity_float']))['parity_float']
    bytes_of = lambda column, at=at: f'{int(at[column]):,}'  # noqa: E731
    rows.append((
      f'`{name}`', bytes_of('state_bytes'), bytes_of('peak_bytes'), bytes_of('code_bytes'),
      bytes_of('macs_per_step'), bytes_of('instructions_per_step') if at['instructions_per_step'] else NONE,
      str(len(own)), worst, f'{100 * float(at["accuracy"]):.1f}' if at['accuracy'] else NONE,
    ))  # fmt: skip
  return markdown(head, rows)


# --- sparse updates ---------------------------------------------------------------------------------


def sparse_cells() -> list[tuple[str, list[dict], dict]]:
  """(words, a line a seed, what the budget said), in the order of the configuration."""
  budgets = {line['cell']: line for line in lines_of(SPARSE / 'budget.jsonl')}
  runs = grouped(lines_of(SPARSE / 'results.jsonl'), lambda line: line['cell'])
  return [(c, runs[c], budgets[c]) for c in edge_sparse.CELLS if c in runs and c in budgets]


def sparse_points(cells: Sequence[tuple[str, list[dict], dict]]) -> list[Point]:
  found = []
  for words, lines, about in cells:
    centre, half = metrics.interval([line['acc'] for line in lines])
    step = about['step']
    costs = {
      BYTES: float(about['state_bytes']),
      MACS: float(step['macs']['total']),
      ENERGY: 1e-6 * step['energy_estimate']['45nm-cache']['uj'],
    }
    kind = kind_of(words.partition(',')[0], UPDATES)
    name, _, choice = words.partition(',')
    label = f'{name} ({choice})' if choice else name  # names on one spot are joined by commas
    found.append(Point(label, kind, float(centre), half, costs))
  return found


def sparse_table(cells: Sequence[tuple[str, list[dict], dict]]) -> str:
  head = (
    'words', 'accuracy, %', 'against full, paired', 'multiply-adds: forward', 'backward', 'step, of full',
    'temporary bytes', 'trained', 'optimiser', 'arena in C99', 'energy, estimate',
  )  # fmt: skip
  rows, whole, dense = [], 0, {line['seed']: line['acc'] for line in cells[0][1]}
  for words, lines, about in cells:
    macs, roles = about['step']['macs'], about['state_bytes_by_role']
    whole = whole or macs['total']
    acc = spread([100 * line['acc'] for line in lines])
    apart = spread([100 * (line['acc'] - dense[line['seed']]) for line in lines], sign='+')
    rows.append((
      f'`{words}`', acc, NONE if words == cells[0][0] else apart, f'{macs["forward"]:,}',
      f'{macs["backward"]:,}', f'{macs["total"] / whole:.1%}', f'{about["peak"]["temporary"]:,}',
      f'{roles["trainable"]:,}', f'{roles["optimiser"]:,}', f'{about["arena_bytes"]:,}',
      f'{about["step"]["energy_estimate"]["45nm-cache"]["uj"]:.3g} uJ',
    ))  # fmt: skip
  first = cells[0][1][0]
  where = f'{first["device"]}; jax {first["versions"].get("jax")}; {len(cells[0][1])} seeds, 95 % intervals.'
  return '\n\n'.join((markdown(head, rows), f'On {where}'))


# --- the page ---------------------------------------------------------------------------------------


def told(points: Sequence[Point]) -> str:
  """The fronts in words, for who cannot see the figure."""
  return '\n'.join(
    f'- {cost}: {", ".join(f"{p.name} {100 * p.accuracy:.1f} %" for p in pareto.front(points, cost))}'
    for cost, _ in PANELS
  )


def picture(points: Sequence[Point], name: str) -> str:
  """A figure, what it was drawn from, and its fronts."""
  source, command, configuration = FROM[name]
  alt = 'accuracy against bytes, multiply-adds and energy'
  place = source.relative_to(ROOT).as_posix()
  drawn = shown(name, alt, place, f'`{command}`', configuration)
  return f'{drawn}\n\nOn the fronts:\n\n{told(points)}'


def figures() -> dict[str, tuple[list[Point], dict[str, tuple[str, ...]]]]:
  """{name: (points, kinds)}; those without results are left out."""
  made = {
    'pareto_edge': (edge_points(), KINDS),
    'pareto_demo': (demo_points(RESULTS / 'demo/results.jsonl'), KINDS),
    'pareto_sparse': (sparse_points(sparse_cells()), UPDATES),
  }
  return {name: figure for name, figure in made.items() if figure[0]}


def page() -> str:
  made, parts = figures(), []
  for name, title in (
    ('pareto_edge', 'Split Fashion-MNIST, the list of make edge'),
    ('pareto_demo', f'CLINC150 with {demo.MODEL}, make demo'),
    ('pareto_sparse', 'Sparse updates'),
  ):
    if name in made:
      parts += [f'### {title}', picture(made[name][0], name)]
  text = fill(PAGE.read_text(), f'{MAKER} pareto', '\n\n'.join(parts))
  text = fill(text, f'{MAKER} small', small_table())
  cells = sparse_cells()
  return fill(text, f'{MAKER} sparse', sparse_table(cells) if cells else 'Not run yet.')


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--write', action='store_true', help='write them instead of comparing')
  write = parser.parse_args().write
  made = figures()
  for name, (points, kinds) in made.items() if write else ():
    for form in FORMS:
      image = pareto.draw(
        points, PANELS, list(kinds), APART, form=form, source=stamp(FROM[name][0])
      )
      durable.replace(FIGURES / f'{name}.{form}', lambda f, image=image: f.write(image))
    print(f'{name} drawn')
  return update({PAGE: page()}, write, 'figures') | check({name: FROM[name][0] for name in made})


if __name__ == '__main__':
  sys.exit(main())
