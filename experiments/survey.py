"""Which family wins within a budget of bytes? `python -m experiments.survey --workdir=DIR`.

The question of De Lange et al. (TPAMI 2022) on Split Fashion-MNIST or Omniglot, task-incremental, with their
hyperparameter framework (`experiments.framework`): a class order a seed, memories as large as each budget
allows, snapshots and importances counted. Mean ranks over the orders, with the critical difference of
Nemenyi's test (Demsar 2006) at 5 %: methods whose ranks differ by less are not told apart. It resumes when
repeated. `--table` draws the tables again from what there is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cl_jax import durable, metrics
from experiments import framework

# By configuration, bytes beside the weights. Split Fashion-MNIST, 1.08 MB of weights: 500, 1,500 and 4,100
# images, or one and three copies of the weights. Omniglot, 0.9 MB: 125 and 500 images, all of them or three
# copies.
BENCHMARKS = {
  'split_fashion': (400_000, 1_200_000, 3_300_000),
  'omniglot': (100_000, 400_000, 2_800_000),
}
# The survey's 0.01 in our form. It is not decayed: what would be measured is the network after merging.
L2 = '--config.l2.coef=0.02'
# By name, words of the configuration and further ones of the command.
METHODS = {
  'fine-tuning': ('naive', ()),
  'EWC': ('ewc', ()),
  'SI': ('si', ()),
  'MAS': ('mas', ()),
  'LwF': ('lwf', ()),
  'EBLL': ('ebll', ()),
  'mean-IMM': ('l2,imm', ('--config.imm.mode=mean', L2)),
  'mode-IMM': ('l2,imm', ('--config.imm.mode=mode', L2)),
  'PackNet': ('packnet', ()),
  'HAT': ('hat', ('--config.hat.embedding=uniform',)),  # as the survey's code
}
# With a memory: R-PM keeps a share of it for each task from the start, R-FM uses all of it always.
REPLAY = {
  'R-PM': ('rehearsal', ('--config.rehearsal.share=partial',)),
  'R-FM': ('rehearsal', ()),
  'ER': ('er', ()),
  'A-GEM': ('agem', ()),
  'GEM': ('gem', ()),
  'iCaRL': ('icarl', ()),
  'DER++': ('derpp', ()),
  'GDumb': ('gdumb', ()),
}


def runs(budgets: Sequence[int]) -> list[tuple[str, int | None, str, tuple[str, ...]]]:
  """(name, budget, words of the configuration, further words of the command)."""
  found: list[tuple[str, int | None, str, tuple[str, ...]]] = []
  for budget, methods in ((None, METHODS), *((b, REPLAY) for b in budgets)):
    found += [(name, budget, words, more) for name, (words, more) in methods.items()]
  return found


def place_of(root: Path, name: str, budget: int | None) -> Path:
  short = name.lower().replace('+', 'p')
  return root / (short if budget is None else f'{short}-{budget}')


def read(path: Path) -> list[dict[str, Any]]:
  if not path.exists():
    return []
  return [json.loads(text) for text in path.read_text().splitlines() if text.strip()]


def added(line: dict[str, Any], plain: int) -> int:
  return line['state_bytes']['total'] - plain


def ranks(table: Mapping[str, Sequence[float]]) -> dict[str, float]:
  """Mean ranks, 1 the best, equals sharing; columns are the orders that all methods have."""
  from scipy.stats import rankdata

  names = list(table)
  scores = np.array([table[n] for n in names])
  return dict(zip(names, rankdata(-scores, axis=0).mean(axis=1), strict=True))


def critical_difference(methods: int, orders: int) -> float:
  """Nemenyi's at 5 %: q sqrt(k (k + 1) / (6 N)) with q of the studentized range over sqrt(2)."""
  from scipy.stats import studentized_range

  q = float(studentized_range.ppf(0.95, methods, np.inf)) / np.sqrt(2)
  return q * np.sqrt(methods * (methods + 1) / (6 * orders))


def tables(root: Path, budgets: Sequence[int]) -> str:
  """A table for each budget, in Markdown, from the results alone."""
  found = {(n, b): read(place_of(root, n, b) / 'results.jsonl') for n, b, *_ in runs(budgets)}
  plain = found['fine-tuning', None]
  if not plain:
    return 'nothing is finished yet\n'
  naive = plain[0]['state_bytes']['total']
  text = []
  for budget in budgets:
    fits = {
      name: lines
      for (name, b), lines in found.items()
      if lines and b in (None, budget) and added(lines[0], naive) <= budget
    }
    seeds = sorted(set.intersection(*({x['seed'] for x in lines} for lines in fits.values())))
    if not seeds:
      text += [
        f'### {budget / 1e6:g} MB beside the weights',
        '',
        'No class order is finished by all yet.',
        '',
      ]
      continue
    acc = {n: [x['acc'] for x in lines if x['seed'] in seeds] for n, lines in fits.items()}
    mean_rank = ranks(acc)
    apart = []
    if len(acc) > 1:
      difference = critical_difference(len(acc), len(seeds))
      apart = [f'Critical difference of mean ranks: {difference:.1f}.', '']
    text += [
      f'### {budget / 1e6:g} MB beside the weights, {len(seeds)} class orders',
      '',
      *apart,
      '| method | needs | rank | accuracy % | forgetting % | bytes added | slots | search, times a run |',
      '|---|---|---:|---:|---:|---:|---:|---:|',
    ]
    for name in sorted(mean_rank, key=lambda n: mean_rank[n]):
      lines = [x for x in fits[name] if x['seed'] in seeds]
      shown = []
      for measure in ('acc', 'forgetting'):
        mean, ci = metrics.interval([x[measure] * 100 for x in lines])
        shown.append(f'{mean:.1f}' + (f' ± {ci:.1f}' if ci is not None else ''))
      cost = np.mean([x['tuning_steps'] / x['steps'] for x in lines])
      slots = next(iter(lines[0].get('slots', {}).values()), '')
      cells = (
        name, ', '.join(lines[0]['needs']), f'{mean_rank[name]:.1f}', *shown, f'{added(lines[0], naive):,}',
        f'{slots:,}' if slots else '', f'{cost:.1f}',
      )  # fmt: skip
      text.append('| ' + ' | '.join(cells) + ' |')
    left = [n for n, b, *_ in runs(budgets) if b in (None, budget) and n not in fits]
    text += ['', f'Too large for it, or not run: {", ".join(left) or "none"}.', '']
  return '\n'.join(text)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog='python -m experiments.survey', description=__doc__)
  parser.add_argument('--workdir', type=Path, required=True, help='where runs and tables go')
  parser.add_argument(
    '--benchmark', default='split_fashion', choices=BENCHMARKS, help='(split_fashion)'
  )
  parser.add_argument('--seeds', type=int, default=5, help='class orders (5)')
  parser.add_argument('--only', default='', help='methods by name, such as ER,SI')
  parser.add_argument('--table', action='store_true', help='only draw the tables again')
  args = parser.parse_args(argv)
  only = {n.strip() for n in args.only.split(',') if n.strip()}
  if unknown := only - {*METHODS, *REPLAY}:
    parser.error(f'--only: unknown {sorted(unknown)}; there are {", ".join((*METHODS, *REPLAY))}')
  worst, budgets = 0, BENCHMARKS[args.benchmark]
  for name, budget, words, more in () if args.table else runs(budgets):
    if only and name not in only:
      continue
    place = place_of(args.workdir, name, budget)
    seeds = ','.join(map(str, range(args.seeds)))
    words = [f'--config=configs/{args.benchmark}.py:task,{words}', f'--workdir={place}', *more]
    words += [f'--config.seeds={seeds},' if args.seeds == 1 else f'--config.seeds={seeds}']
    words += [] if budget is None else [f'--config.budget_bytes={budget}']
    print(f'== {name}' + ('' if budget is None else f', {budget / 1e6:g} MB'), flush=True)
    code = framework.main(words)
    if code > 3:
      return code  # a signal
    worst = max(worst, code)
  text = tables(args.workdir, budgets)
  durable.write(args.workdir / 'survey.md', text)
  print(text)
  return worst


if __name__ == '__main__':
  sys.exit(main())
