"""What a learner would cost: `python -m experiments.budget --config=FILE[:ARG]`. Nothing is trained.

Bytes of state by role and after each task, the memory of a compiled step, multiply-adds and bytes moved of a
step and of a prediction, passes, an estimate of energy, and the largest arrays; what a sparse update or
micro-batches save against all in one piece. `config.budget` makes limits
of three of the figures, which all commands that train refuse to exceed.

With --shape instead of --config: the memory of a large model's step over many devices; see docs/devices.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_jax import budget, durable
from cl_jax.edge import energy
from cl_jax.errors import UserError
from cl_jax.report.figures import LIGHT, canvas
from cl_jax.report.tables import scaled
from experiments import budget_shape, build, cli, config, limits, options, results, savings

PROGRAM = 'experiments.budget'
LARGEST = 10
OF_CONFIG = ('--data_dir', '--profile', '--plot')  # what a plan of --shape has no use for
HERE = Path(__file__).resolve().parent.parent
NOTE = (
  'bytes read, written: the whole inputs and outputs of every equation, once each time it runs; nothing is '
  'fused or\nupdated in place. multiply-adds: matrix products and convolutions. energy: AN ESTIMATE from '
  'these counts and\npublished constants, not a measurement; - where a constant is unknown.'
)


def main(argv: Sequence[str] | None = None) -> int:
  parser = cli.parser(PROGRAM, __doc__)
  add = parser.add_argument
  add('--config', metavar='FILE[:ARG]', help='as for experiments.run, with --config.FIELD=VALUE')
  add('--data_dir', metavar='DIR', help='where data sets are (default: CL_JAX_DATA)')
  add('--profile', metavar='NAME', help=f'of {", ".join(energy.PROFILES)} (all of them)')
  add('--json', action='store_true', help='print one JSON object instead')
  add('--plot', metavar='FILE.png', type=Path, help='bytes after each task, stacked by role')
  budget_shape.arguments(add)
  argv = sys.argv[1:] if argv is None else list(argv)
  return cli.guarded(PROGRAM, lambda words: command(parser, words), argv)


def command(parser: argparse.ArgumentParser, argv: list[str]) -> int:
  given, left = parser.parse_known_args(argv)
  overrides = options.fields_of(left)
  if given.shape:
    if given.config or overrides:
      raise UserError('--shape is a plan without a configuration: leave --config out')
    cli.refuse(given, OF_CONFIG, 'is of a run: leave it out of --shape')
    return budget_shape.command(given)
  if given.config is None:
    raise UserError('--config is missing: name a configuration, for example configs/edge.py:er')
  cli.refuse(given, budget_shape.OPTIONS, 'is for --shape: with --config the configuration says it')
  if given.profile not in (None, *energy.PROFILES):
    raise UserError(
      f'--profile: no profile {given.profile!r}: there are {", ".join(energy.PROFILES)}'
    )
  resolved, _, sweep = options.overridden(config.load(given.config), overrides)
  if sweep:
    raise UserError('config.sweep holds a grid: take one configuration')
  cli.devices(1)
  profiles = [given.profile] if given.profile else list(energy.PROFILES)
  about = figures(resolved, profiles, given.data_dir)
  print(json.dumps(about) if given.json else table(about), flush=True)
  if given.plot:
    picture = drawn(about)
    durable.replace(given.plot, lambda file: file.write(picture))
  return 0


def figures(
  resolved: Mapping[str, Any], profiles: Sequence[str], data_dir: str | None = None
) -> dict[str, Any]:
  """All that is known of a learner's cost before it is trained, ready for JSON; of the first seed.

  Args:
    resolved: a configuration; a learner above its `budget` is measured as well.
    profiles: names in `energy.PROFILES`.
    data_dir: see `streams.load.dataset`.
  """
  free = dict.fromkeys(resolved['budget'])
  own = {**resolved, 'seeds': tuple(resolved['seeds'])[:1], 'budget': free}
  say = lambda line: print(line, file=sys.stderr)  # noqa: E731
  setup = build.prepare(own, data_dir, say)[0]
  made, cost = build.programs(setup), results.costs(setup)
  work = {name: Work.of(getattr(made, name), made) for name in ('step', 'predict')}
  peak = made.peak()
  saved = savings.against(build.slotted(setup), made, peak, data_dir)
  tasks = setup.streams[0].tasks
  reached = {
    'state_bytes': cost['state_bytes']['total'],
    'peak_bytes': peak.peak,
    'macs_per_step': work['step'].macs['total'],
  }
  return {
    'learner': results.method_name(own),
    'model': own['model']['name'],
    'dataset': own['dataset'],
    'config_sha256': config.sha256(resolved),
    'device': results.device(),
    'batch': limits.rows_of(made),
    **({'slots': setup.slots} if setup.slots else {}),
    **reached,
    'limits': resolved['budget'],
    'exceeded': [k for k, v in resolved['budget'].items() if v is not None and reached[k] > v],
    'state_bytes_by_role': cost['state_bytes'],
    'state_bytes_by_task': [results.bytes_after(setup, t + 1) for t in range(tasks)],
    'peak': peak._asdict(),
    'passes': cost['passes'],
    'flops_per_step': cost['flops_per_step'],
    **({'backbone': cost['backbone']} if 'backbone' in cost else {}),
    **({'savings': saved} if saved else {}),
    **{name: w.line(profiles) for name, w in work.items()},
    'largest': [leaf._asdict() for leaf in budget.leaves(made.state, setup.frozen)[:LARGEST]],
  }


@dataclass(frozen=True)
class Work:
  """What one call of a function takes."""

  macs: dict[str, int]
  traffic: budget.Traffic

  @staticmethod
  def of(f, made: limits.Programs) -> Work:
    return Work(budget.macs(f, *made.arguments), budget.traffic(f, *made.arguments))

  def line(self, profiles: Sequence[str]) -> dict[str, Any]:
    def guess(name: str) -> dict[str, float | None]:
      of = energy.PROFILES[name]
      return energy.estimate(self.macs['total'], self.traffic.moved, of.dtype, of.level)._asdict()

    return {
      'macs': self.macs,
      'bytes_read': self.traffic.read,
      'bytes_written': self.traffic.written,
      'unbounded_loops': [line.removeprefix(f'{HERE}/') for line in self.traffic.unbounded],
      'energy_estimate': {name: guess(name) for name in profiles},
    }


# --- what is printed --------------------------------------------------------------------------------


def table(about: Mapping[str, Any]) -> str:
  """The figures as aligned text."""
  roles, by_task, peak = about['state_bytes_by_role'], about['state_bytes_by_task'], about['peak']
  total, step, predict = roles['total'], about['step'], about['predict']
  rows: list[tuple[str, ...]] = [('bytes kept between steps', '', '')]
  rows += [
    (f'  {role}', f'{n:,}', f'{n / total:.1%}' if total else '') for role, n in roles.items() if n
  ]
  rows += [('bytes after task', '', '')]
  sizes = [sizes['total'] for sizes in by_task]
  if len(set(sizes)) == 1:
    rows += [(f'  1 to {len(sizes)}', f'{sizes[0]:,}', 'no growth')]
  else:
    before = [0, *sizes]
    rows += [
      (f'  {t + 1}', f'{n:,}', f'+{n - before[t]:,}' if t else '') for t, n in enumerate(sizes)
    ]
  rows += [('memory of a compiled step', f'{about["peak_bytes"]:,}', '')]
  rows += [(f'  {name}', f'{peak[name]:,}', '') for name in ('arguments', 'results', 'temporary')]
  rows += [('  shared by arguments and results', f'-{peak["shared"]:,}', '')]
  rows += [(f'a batch of {about["batch"]}', 'step', 'prediction')]
  for role in ('forward', 'backward', 'other', 'total'):
    rows += [(f'  multiply-adds, {role}', f'{step["macs"][role]:,}', f'{predict["macs"][role]:,}')]
  for name in ('read', 'written'):
    rows += [(f'  bytes {name}', f'{step[f"bytes_{name}"]:,}', f'{predict[f"bytes_{name}"]:,}')]
  for name in step['energy_estimate']:
    rows += [(f'  energy, estimate, {name}', *(joules(w, name) for w in (step, predict)))]
  once = about['passes']
  rows += [('  forward passes', f'{once["train_forward"]:g}', f'{once["predict_forward"]:g}')]
  rows += [('  backward passes', f'{once["train_backward"]:g}', '0')]
  if below := about.get('backbone'):
    name = '  forward passes behind cached features'
    rows += [(name, *(f'{below[f"{k}_forward"]:g}' for k in ('train', 'predict')))]
    name = '  multiply-adds of these'
    rows += [(name, *(f'{below[f"flops_per_{k}"] // 2:,}' for k in ('step', 'prediction')))]
  if 'savings' in about:
    rows += savings.rows(about['savings'])
  rows += [('where every byte goes', '', '')]
  rows += [
    (f'  {leaf["name"]}', f'{leaf["bytes"]:,}', f'{leaf["dtype"]}{list(leaf["shape"])}')
    for leaf in about['largest']
  ]
  first, second = (max(len(row[k]) for row in rows) for k in (0, 1))
  lines = [f'{a:<{first}}  {b:>{second}}  {c}'.rstrip() for a, b, c in rows]
  head = f'{about["learner"]}: {about["model"]} on {about["dataset"]}'
  return '\n'.join([head, *lines, *warnings_of(about), NOTE])


def joules(work: Mapping[str, Any], profile: str) -> str:
  found = work['energy_estimate'][profile]
  return '-' if found['uj'] is None else f'{found["uj"]:.3g} uJ'


def warnings_of(about: Mapping[str, Any]) -> list[str]:
  """Lines about limits, and about loops that make the counts no bound."""
  found = []
  for name, limit in about['limits'].items():
    if limit is not None:
      verb = 'EXCEEDED by' if name in about['exceeded'] else 'kept, with room for'
      found.append(f'config.budget.{name}={limit:,}: {verb} {abs(about[name] - limit):,}')
  for name in ('step', 'predict'):
    for line in about[name]['unbounded_loops']:
      found.append(f'UNBOUNDED: {name} has a loop of unknown length, counted once: {line}')
  return found


def drawn(about: Mapping[str, Any]) -> bytes:
  """A PNG: bytes after each task, stacked by role."""
  by_task = about['state_bytes_by_task']
  roles = [r for r in by_task[-1] if r != 'total' and any(sizes[r] for sizes in by_task)]
  with canvas(LIGHT, 7.6, 4.4) as (fig, png):
    ax = fig.subplots()
    x, below = list(range(1, len(by_task) + 1)), [0] * len(by_task)
    colours = LIGHT.cycle
    for i, role in enumerate(roles):
      heights = [sizes[role] for sizes in by_task]
      hatch = ('', '//', '..')[i // len(colours) % 3]
      ax.bar(x, heights, 0.8, below, color=colours[i % len(colours)], hatch=hatch, label=role)
      below = [a + b for a, b in zip(below, heights, strict=True)]
    ax.set(xlabel='tasks learnt', ylabel='bytes of state', ylim=(0, 1.05 * max(below)))
    ax.set_xticks(x[:: math.ceil(len(x) / 20)])
    ax.yaxis.set_major_formatter(lambda v, _: scaled(v, 'B', '.3g'))
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(
      handles[::-1], labels[::-1], frameon=False, loc='center left', bbox_to_anchor=(1.0, 0.5)
    )
    return png()


if __name__ == '__main__':
  sys.exit(main())
