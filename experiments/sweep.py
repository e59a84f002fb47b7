"""A grid of experiments: `python -m experiments.sweep --config=configs/NAME.py[:ARG] --workdir=DIR`.

`config.sweep`, or --config.sweep="{'optimizer.lr': (0.1, 0.01), 'ewc.coef': (1.0, 10.0)}", names fields and
their values; every combination is a cell, run with every seed. Cells that differ in traced floats alone
run side by side in one compiled program.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cl_jax import durable
from cl_jax.errors import Fault, UserError
from cl_jax.report.lines import flat
from cl_jax.sweep import compile_groups, grid
from experiments import build, cli, config, engine, results, rules, scalars, show, tables, workdir
from experiments.job import Job
from experiments.options import Options, parse
from experiments.watch import Interrupted, Stop

PROGRAM = 'experiments.sweep'
ABOUT = """Runs a grid of experiments, as few compiled programs, resumes when repeated:
  config.sweep, or --config.sweep="{'optimizer.lr': (0.1, 0.01), 'ewc.coef': (1.0, 10.0)}\""""
FAULTS = 'faults.jsonl'


def main(argv: Sequence[str] | None = None) -> int:
  return cli.guarded(PROGRAM, command, argv)


def command(argv: list[str]) -> int:
  options = parse(argv, PROGRAM, ABOUT)
  rules.untuned(options.config)
  build.resident(options.config, 'a sweep')
  cells = expand(options.raw, options.sweep)
  shown = show.make()
  with (
    cli.network(options.offline),
    workdir.claimed(options.workdir) as place,
    scalars.opened(options.writers, place) as out,
  ):
    if (place / workdir.LAUNCH).exists():
      raise UserError(
        f'{place} belongs to experiments.launch, which would replace what is added here: name another '
        '--workdir'
      )
    try:
      workdir.remember(place, {**options.config, 'sweep': options.sweep})
      run(options, cells, place, shown, out)
    finally:
      shown.close()
    wanted = {config.sha256(cell) for cell in cells}
    lines = [line for line in results.read(place) if line['config_sha256'] in wanted]
    out.lines(lines)
    print(tables.table(lines, options.sweep), flush=True)
    workdir.report(place, shown)
  if lost := [f for f in faults(place) if f['config_sha256'] in wanted]:
    raise Fault(f'{len(lost)} runs were stopped by NaN and have no results: see {place / FAULTS}')
  return 0


def expand(raw: Mapping[str, Any], axes: Mapping[str, Sequence]) -> list[dict[str, Any]]:
  """The resolved configuration of every cell.

  Raises:
    UserError: nothing to sweep, an axis that is not a tuple of values, a cell that is not valid.
  """
  if not axes:
    raise UserError(
      'config.sweep is empty: name fields and values, as in --config.sweep="{\'optimizer.lr\': (0.1, 0.01)}"'
    )
  check(axes)
  cells = [cell_of(raw, values) for values in grid(axes)]
  if len({config.sha256(c) for c in cells}) < len(cells):
    raise UserError('config.sweep has cells that are the same: give every value once')
  return cells


def check(axes: Mapping[str, Sequence]) -> None:
  """Raises UserError for an axis that is not a tuple of values, or cannot be one."""
  for dotted, values in axes.items():
    if not isinstance(values, tuple) or not values:
      raise UserError(f'config.sweep[{dotted!r}] must be a tuple of values; got {values!r}')
    if dotted.split('.')[0] in ('seeds', 'name', 'sweep', 'feed', 'tuning'):
      raise UserError(f'config.sweep cannot vary {dotted}: every cell has the same')


def cell_of(raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
  """The resolved configuration of one cell."""
  return config.resolve(overridden(raw, values))


def overridden(raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
  """`raw` with the values of a cell; those that decide which fields there are come first."""
  own = dict(raw)
  for dotted in sorted(values, key=lambda d: d not in ('methods', 'model.name', 'optimizer.name')):
    own = config.override(own, dotted, values[dotted])
  return own


def run(
  options: Options, cells: list[dict[str, Any]], place: Path, shown: show.Show, out: scalars.Scalars
) -> None:
  todo, kept = remaining(cells, place), len(cells) * len(cells[0]['seeds'])
  left = sum(map(len, todo.values()))
  if left < kept:
    shown.say(f'{kept - left} of {kept} runs are in {place} already')
  if not left:
    return
  groups = compile_groups([build.traced(cell) for cell in cells])
  cli.devices(max(sum(len(todo[i]) for i in g.members) for g in groups))
  if any(v is not None for cell in cells for v in cell['budget'].values()) and len(groups) > 1:
    for group in groups:  # no group is trained where another is above its budget
      if any(todo[i] for i in group.members):
        build.prepare(cells[group.members[0]], options.data_dir)
  for number, group in enumerate(groups, 1):
    members = [cells[i] for i in group.members]
    if not any(todo[i] for i in group.members):
      continue
    for setup in build.prepare(members[0], options.data_dir, shown.say):
      seeds = [todo[i] for i in group.members]
      name = f'group {number}/{len(groups)}'
      work = job(setup, members, seeds, options.sweep, place, name)._replace(width=options.width)
      if not work.seeds:
        continue
      with Stop().listening() as stop:
        outcome = engine.train(work, options.save_every, stop, shown, True, out.leg)
      results.append(place, results.lines(work, outcome, options.command))
      note(place, work, outcome)
      if stop() and (left := sum(map(len, remaining(cells, place).values()))):
        raise Interrupted(stop(), f'{work.name}: stopped, and {left} runs are still to be done')


def remaining(cells: list[dict[str, Any]], place: Path) -> dict[int, list[int]]:
  """{cell: its seeds that have neither a result nor a fault}."""
  over = results.done(place) | {(f['config_sha256'], f['seed']) for f in faults(place)}
  shas = [config.sha256(cell) for cell in cells]
  return {i: [s for s in cell['seeds'] if (shas[i], s) not in over] for i, cell in enumerate(cells)}


def job(
  setup: build.Setup,
  members: list[dict[str, Any]],
  seeds: list[list[int]],
  axes: Mapping[str, Any],
  place: Path,
  name: str,
) -> Job:
  """The runs of a group that are to be done, cell by cell."""
  pairs = [
    (cell, seed)
    for cell, wanted in zip(members, seeds, strict=True)
    for seed in setup.seeds
    if seed in wanted
  ]
  stream_of = dict(zip(setup.seeds, setup.streams, strict=True))
  key = json.dumps([(config.sha256(cell), seed) for cell, seed in pairs])
  sha = hashlib.sha256(key.encode()).hexdigest()
  method = results.method_name(setup.config)
  return Job(
    setup=setup,
    configs=[cell for cell, _ in pairs],
    seeds=[seed for _, seed in pairs],
    streams=[stream_of[seed] for _, seed in pairs],
    labels=[f'{cell_name(cell, axes)}, seed {seed}' for cell, seed in pairs],
    name=f'{setup.config["name"]} {method} {name}, {len(pairs)} runs',
    workdir=place,
    folder=place / 'checkpoints' / f'runs-{sha[:12]}',
    sha256=sha,
  )


def cell_name(cell: Mapping[str, Any], axes: Mapping[str, Any]) -> str:
  """'optimizer.lr 0.1, er.capacity 50'."""
  values = flat(cell)
  return ', '.join(f'{dotted} {values.get(dotted)!r}' for dotted in axes)


def note(place: Path, work: Job, outcome: engine.Outcome) -> None:
  """Remembers the runs that NaN stopped: they are not tried again."""
  new = [
    {'config_sha256': config.sha256(work.configs[run]), 'run': work.labels[run], **what}
    for run, what in sorted(outcome.faults.items())
  ]
  if new:
    lines = [*faults(place), *new]
    durable.write(place / FAULTS, ''.join(json.dumps(line) + '\n' for line in lines))


def faults(place: Path) -> list[dict[str, Any]]:
  path = place / FAULTS
  return [json.loads(line) for line in _lines(path)] if path.exists() else []


def _lines(path: Path) -> Iterator[str]:
  return filter(str.strip, path.read_text().splitlines())


if __name__ == '__main__':
  sys.exit(main())
