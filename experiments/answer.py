"""What the demo found, as a table and in sentences, from its results.jsonl alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cl_jax.errors import UserError
from cl_jax.report.lines import Group, matrix, read, sections
from cl_jax.report.tables import NONE, Table, markdown, mean, percent, seconds, text, total
from configs.demo import NAMES
from experiments import probe

HEAD = (
  'method',
  'needs',
  'ACC %',
  'last domain',
  'earlier ones',
  'forgetting',
  'state',
  'time',
  'seeds',
)
NOTES = (
  'ACC: accuracy over all domains after the last one was learnt, with its 95 % interval where there are '
  'several seeds; every seed draws its own sentences and its own order of the domains.',
  'Last domain, earlier ones: the same on the domain learnt last and on those before it. Forgetting: best '
  'accuracy on a domain before the last one was learnt, minus the accuracy at the end.',
  'State: every byte kept between steps, the frozen weights included. Time: training, evaluation after '
  'every domain and compilation, of one run on one core; for methods on features without computing these, '
  'which is done once.',
)
QUICK = (
  'Quick: a few sentences, one pass. It shows that everything works, and nothing about the methods.'
)


def answer(folder: Path, quick: bool = False) -> tuple[str, str]:
  """(for a terminal, in Markdown): the table of all methods and, unless it was `quick`, what it says.

  Raises:
    UserError: the directory has no usable results, or those of different experiments.
  """
  lines, _ = read(folder / 'results.jsonl')
  found = sections(lines)
  if len(found) != 1:
    raise UserError(f'{folder}/results.jsonl holds {len(found)} experiments, not one')
  groups, title = found[0].groups, found[0].title
  table = Table(title, HEAD, tuple(map(row, groups)))
  said = [QUICK] if quick else sentences(groups) + features(groups, folder)
  plain = '\n'.join([text(table), '', *said])
  return plain, '\n\n'.join([markdown(table), *said, *NOTES]) + '\n'


def features(groups: Sequence[Group], folder: Path) -> list[str]:
  """What the probe found about the fine-tuned network, beside the frozen one; see `experiments.probe`."""
  frozen = [line for g in groups if g.first['method'] == 'ncm' for line in g.lines]
  pairs = []
  for line in frozen:
    path = folder / f'naive-{line["seed"]}' / probe.FILE
    if path.exists():
      pairs.append((json.loads(path.read_text())['ncm'], line['acc']))
  if not pairs:
    return []
  after, before = np.mean(pairs, axis=0)
  return [
    f'What its features still tell apart: with the means of all classes, old sentences included, they give '
    f'{after:.0%} after the ten domains and gave {before:.0%} before them (the same sentences, nearest class '
    f'mean; a measurement that looks back, not a method).'
  ]


def row(g: Group) -> tuple[str, ...]:
  # Joint training has no last domain.
  last, earlier = ([], []) if g.bound else zip(*map(split, g.lines), strict=True)
  return (
    name(g),
    ', '.join(g.first['needs']) or NONE,
    percent(g.values('acc')),
    percent(last),
    percent(earlier),
    percent(g.values('forgetting')),
    total(g),
    seconds(mean(g, 'wall_s')),
    str(len(g.lines)),
  )


def name(g: Group) -> str:
  """'LoRA (lora)'."""
  key = 'joint' if g.bound else g.first['method']
  return f'{NAMES[key]} ({key})' if key in NAMES else g.label


def split(line: dict) -> tuple[float, float]:
  """Accuracy at the end on the last task, and on the earlier ones."""
  end = matrix(line)[-1]
  return float(end[-1]), float(end[:-1].mean())


def sentences(groups: Sequence[Group]) -> list[str]:
  """The answer, as far as the methods that it needs have run."""
  by = {('joint' if g.bound else g.first['method']): g for g in groups}
  acc = {k: float(np.mean(g.values('acc'))) for k, g in by.items()}
  said = []
  if 'naive' in by:
    last, earlier = np.mean([split(line) for line in by['naive'].lines], axis=0)
    new = np.mean(by['naive'].values('learning_acc'))
    verdict = 'It forgets' if earlier < 0.9 * new else 'It hardly forgets'
    said.append(
      f'{verdict}: fine-tuned on one domain after the other, the network knows each at {new:.0%} when it '
      f'is new, and at the end the last one at {last:.0%}, the earlier ones at {earlier:.0%}.'
    )
    if 'joint' in acc:
      said[-1] += f' Trained on all at once, by the same recipe, it reaches {acc["joint"]:.0%}.'
  learners = {k: v for k, v in acc.items() if k not in ('joint', 'naive')}
  if learners:
    best = max(learners, key=lambda k: learners[k])
    said.append(
      f'Most is known at the end with {NAMES.get(best, best)}: {acc[best]:.0%} over all domains, with '
      f'{total(by[best])} of state and {seconds(mean(by[best], "wall_s"))} of time.'
    )
  return said
