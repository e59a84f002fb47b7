"""The lines of results.jsonl: read, checked, and grouped into what may be compared."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cl_jax.errors import UserError
from cl_jax.idle import idle

Line = dict[str, Any]

NUMBERS = (
  'acc forgetting bwt fwt learning_acc aaa min_acc flops_per_step steps wall_s compile_s'
  ' peak_rss_bytes'
).split()
SEPARATE = ('task', 'class', 'domain')
# Needs that make a question easier: the task is told at test time, or test batches are answered as a whole,
# and a batch of one task, as evaluation has them, tells it.
ORACLES = ('task_test', 'batch_test')
MIXED = ('online', 'blurry')  # schedules that have no tasks to learn one by one
BOUNDS = ('joint', 'cumulative')  # not continual learning, but what it is measured against

# What a comparison must have in common, besides dataset, scenario and number of tasks.
PROTOCOL = ('by', 'transform', 'task_sizes', 'blurry', 'told', 'evaluate')


class Problem(NamedTuple):
  """A line that was left out: its file, its number counted from 1, and why."""

  path: str
  number: int
  why: str


class Group(NamedTuple):
  """Runs of one configuration that differ in their seed alone.

  Attributes:
    label: the method, and what tells it from others of that method in its section.
    lines: one per seed, ascending.
  """

  label: str
  lines: tuple[Line, ...]

  @property
  def first(self) -> Line:
    return self.lines[0]

  @property
  def oracle(self) -> str:
    """What tells the task at test time: one of `ORACLES`, or ''."""
    return next((n for n in ORACLES if n in self.first['needs']), '')

  @property
  def bound(self) -> bool:
    return self.first['scenario'] in BOUNDS

  def values(self, key: str) -> list[float]:
    """The numbers of that name over seeds; [] where a seed has none."""
    found = [line.get(key) for line in self.lines]
    return [] if None in found else [float(v) for v in found if v is not None]

  def R(self) -> np.ndarray:
    """The mean accuracy matrix over seeds, f64[rows, T], NaN where nothing was evaluated."""
    return np.mean([matrix(line) for line in self.lines], axis=0)


class Section(NamedTuple):
  """Groups that learnt the same thing: one dataset, scenario and protocol.

  Attributes:
    title: in words. slug: for file names.
    groups: best accuracy first; bounds after the others.
  """

  title: str
  slug: str
  groups: tuple[Group, ...]


def read(path: Path) -> tuple[list[Line], list[Problem]]:
  """The usable lines of a results.jsonl, and what is wrong with the others.

  Where a run (configuration and seed) has several lines, the last one counts.

  Raises:
    UserError: there is no such file, or it is not text.
  """
  try:
    rows = path.read_text('utf-8').split('\n')
  except FileNotFoundError as error:
    raise UserError(
      f'{path} does not exist: it is written by experiments.run; name its --workdir'
    ) from error
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'{path} cannot be read as text: {error}') from error
  kept: dict[tuple[str, int], tuple[int, Line]] = {}
  problems = []
  for number, row in enumerate(rows, 1):
    if not row.strip():
      continue
    try:
      line = check(json.loads(row))
    except json.JSONDecodeError as error:
      problems.append(Problem(str(path), number, f'not JSON: {error.msg} at column {error.colno}'))
      continue
    except (UserError, RecursionError) as error:
      problems.append(Problem(str(path), number, str(error)))
      continue
    run = identity(line), line['seed']
    if run in kept:
      earlier = kept.pop(run)[0]
      why = f'the same run as line {number}, which is later and counts'
      problems.append(Problem(str(path), earlier, why))
    kept[run] = number, line
  return [line for _, line in kept.values()], sorted(problems)


def check(line: Any) -> Line:
  """The line with every number that is not finite as None.

  Raises:
    UserError: it is not a result, or contradicts itself.
  """
  if not isinstance(line, dict):
    raise UserError(f'not a result: {type(line).__name__} in place of an object')
  line = dict(line)
  for key in ('method', 'scenario', 'dataset'):
    if not isinstance(line.get(key), str):
      raise UserError(f'not a result: {key!r} must be a text, not {line.get(key)!r}')
  for key in ('seed', 'tasks'):
    if type(line.get(key)) is not int:
      raise UserError(f'not a result: {key!r} must be a whole number, not {line.get(key)!r}')
  for key in ('config', 'state_bytes', 'passes', 'backbone', 'versions'):
    if not isinstance(line.setdefault(key, {}), dict):
      raise UserError(f'{key!r} must be an object, not {line[key]!r}')
  for key, kind in (('transform', dict), ('update', dict), ('told', list), ('methods', list)):
    if not isinstance(line['config'].get(key), kind | tuple | None):
      raise UserError(f"'config' has {line['config'][key]!r} for {key!r}")
  needs = line.setdefault('needs', [])
  if not isinstance(needs, list) or not all(isinstance(n, str) for n in needs):
    raise UserError(f"'needs' must be a list of texts, not {needs!r}")
  by_task = line.get('state_bytes_by_task')
  if by_task is not None and not isinstance(by_task, list):
    raise UserError(f"'state_bytes_by_task' must be a list of numbers, not {by_task!r}")
  line['state_bytes_by_task'] = [number('state_bytes_by_task', v) for v in by_task or ()]
  counts = ('state_bytes', 'passes', 'backbone')
  for owner, keys in ((line, NUMBERS), *((line[k], line[k]) for k in counts)):
    for key in [*keys]:
      owner[key] = number(key, owner.get(key))
  R = matrix(line)
  last = float(R[-1].mean())
  if line['acc'] is None:
    raise UserError("'acc' is missing")
  if not math.isclose(line['acc'], last, abs_tol=1e-4):
    raise UserError(f"'acc' is {line['acc']} but the last row of 'R' has the mean {last:.6f}")
  return line


def number(key: str, value: Any) -> float | None:
  if value is None:
    return None
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise UserError(f'{key!r} must be a number, not {value!r}')
  if isinstance(value, int) and abs(value) > 1e300:
    raise UserError(f'{key!r} must be a number; {str(value)[:20]}... is beyond all')
  return value if math.isfinite(value) else None


def matrix(line: Mapping[str, Any], key: str = 'R') -> np.ndarray:
  """f64[rows, T]; NaN for null.

  Raises:
    UserError: it is no table of `tasks` columns, or its last row has a hole.
  """
  try:
    R = np.array(line.get(key), np.float64)
  except (TypeError, ValueError, OverflowError) as error:
    raise UserError(f'{key!r} is not a table of numbers') from error
  if R.ndim != 2 or R.shape[1] != line['tasks'] or not len(R):
    raise UserError(
      f'{key!r} must have a column for each of {line["tasks"]} tasks, it has {R.shape}'
    )
  if not np.isfinite(R[-1]).all():
    raise UserError(f'the last row of {key!r} is not complete')
  return R


def curves(line: Mapping[str, Any]) -> np.ndarray | None:
  """f64[L, K, T], the accuracies inside the legs where the line has them under 'curve'."""
  try:
    curve = np.array(line.get('curve'), np.float64)
  except (TypeError, ValueError):
    return None
  return curve if curve.ndim == 3 and curve.size and curve.shape[2] == line['tasks'] else None


def backbone(line: Mapping[str, Any]) -> dict[str, float | None] | None:
  """What the cached features of a line stand for, see `experiments.results`; None where none are cached.

  Lines without it, from before there was one, do not say its FLOPs, and of their passes in training only what
  the configuration does: every example is seen in each epoch.
  """
  config = line['config']
  if not config.get('cache_features'):
    return None
  plain = config.get('iterations') is None and line['scenario'] in (*SEPARATE, 'joint')
  guess = 1 / config['epochs'] if plain and config.get('epochs') else None
  return {'train_forward': guess, 'predict_forward': 1.0, **(line.get('backbone') or {})}


def setting(line: Mapping[str, Any]) -> dict[str, Any]:
  """The configuration without what is allowed to differ within a group; limits change nothing of a run."""
  config = line['config']
  free = {'seed', 'seeds', 'budget'} | idle(config)
  return {k: v for k, v in config.items() if k not in free}


def identity(line: Mapping[str, Any]) -> str:
  """Equal for the runs of one group."""
  own = [line[k] for k in ('method', 'scenario', 'dataset', 'tasks', 'needs')]
  return json.dumps([*own, line.get('model'), setting(line)], sort_keys=True)


def base(line: Mapping[str, Any]) -> str:
  """The scenario; for bounds and schedules, the one that they start from."""
  start = line['config'].get('base')
  return start if line['scenario'] in BOUNDS and start else line['scenario']


def answers(line: Mapping[str, Any]) -> str:
  """What a schedule without tasks is asked at the end, as its base says: 'class', 'domain'; else ''."""
  if line['scenario'] not in MIXED:
    return ''
  kind = (line['config'].get('transform') or {}).get('name', 'none')
  return line['config'].get('base') or ('class' if kind == 'none' else 'domain')


def sections(lines: Iterable[Line]) -> list[Section]:
  """What may be ranked together, in order of first appearance."""
  found: dict[str, list[Line]] = {}
  for line in lines:
    common = {k: line['config'].get(k) for k in PROTOCOL}
    own = [line['dataset'], base(line), answers(line), line['tasks'], line.get('metric')]
    key = json.dumps([*own, common], sort_keys=True)
    found.setdefault(key, []).append(line)
  out: list[Section] = []
  for members in found.values():
    words = f'{members[0]["dataset"]}-{base(members[0])}'.lower()
    slug = re.sub(r'[\W_]+', '-', words)  # no two hyphens in a row, which come before a number
    n = sum(s.slug.partition('--')[0] == slug for s in out)
    out.append(Section(title(members[0]), f'{slug}--{n + 1}' if n else slug, grouped(members)))
  return out


def title(line: Mapping[str, Any]) -> str:
  """'clinc150, class-incremental, 10 tasks by domain'."""
  config, scenario = line['config'], base(line)
  named = f'{scenario}-incremental' if scenario in ('task', 'class', 'domain') else scenario
  parts = [line['dataset'], named, f'{line["tasks"]} tasks']
  if answers(line):
    parts[1] += f' ({answers(line)}-incremental)'
  if config.get('by') not in (None, 'label'):
    parts[-1] += f' by {config["by"]}'
  kind = (config.get('transform') or {}).get('name', 'none')
  if kind != 'none':
    parts.append(kind)
  if config.get('told') is not None:
    parts.append(f'told: {", ".join(config["told"]) or "nothing"}')
  if config.get('evaluate', 'test') != 'test':
    parts.append(f'evaluated on {config["evaluate"]}')
  return ', '.join(parts)


def grouped(lines: Sequence[Line]) -> tuple[Group, ...]:
  """The groups of a section, labelled, the best first and bounds last."""
  found: dict[str, list[Line]] = {}
  for line in lines:
    found.setdefault(identity(line), []).append(line)
  members = [sorted(group, key=lambda line: line['seed']) for group in found.values()]
  names = labels([group[0] for group in members])
  groups = [Group(n, tuple(g)) for n, g in zip(names, members, strict=True)]
  return tuple(sorted(groups, key=lambda g: (g.bound, -np.mean(g.values('acc')), g.label)))


def labels(firsts: Sequence[Line]) -> list[str]:
  """A label per group: its method, its schedule if it is a bound, and the fields that tell it apart."""
  plain = [*map(method, firsts)]
  out = []
  for i, line in enumerate(firsts):
    peers = [flat(setting(other)) for other, p in zip(firsts, plain, strict=True) if p == plain[i]]
    own = flat(setting(line))
    apart = [f'{k.rsplit(".", 1)[-1]}={own.get(k)}' for k in differing(peers)]
    out.append(f'{plain[i]} [{", ".join(apart)}]' if apart else plain[i])
  return out


def method(line: Line) -> str:
  """'er'; for bounds 'joint (bound)', or 'er, joint (bound)' where it is not plain training."""
  if line['scenario'] not in BOUNDS:
    return line['method']
  own = '' if line['method'] == 'naive' else f'{line["method"]}, '
  return f'{own}{line["scenario"]} (bound)'


def flat(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'optimizer.lr': 0.1, ...}."""
  out = {}
  for key, value in config.items():
    if isinstance(value, Mapping):
      out |= flat(value, f'{prefix}{key}.')
    else:
      out[f'{prefix}{key}'] = value
  return out


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
  """The fields that do not have the same value in all of them."""
  names = dict.fromkeys(name for s in settings for name in s)
  return [n for n in names if any(s.get(n) != settings[0].get(n) for s in settings)]
