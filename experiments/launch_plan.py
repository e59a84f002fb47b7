"""What a launch consists of: cells, all checked before anything starts, and the parts that are run."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from cl_jax.errors import UserError
from cl_jax.sweep import compile_groups, grid
from experiments import build, config, show, sweep
from experiments.launch_part import PROCESS, Part, estimate
from experiments.options import Options

SHOWN = 20  # mistakes that are listed


class Cell(NamedTuple):
  """A configuration of the grid: its values on the axes, resolved, and its hash."""

  label: str
  values: dict[str, Any]
  config: dict[str, Any]
  sha256: str


def cells(raw: Mapping[str, Any], axes: Mapping[str, Sequence]) -> list[Cell]:
  """Every cell; without a sweep there is one.

  Raises:
    UserError: an axis or a cell that is not valid; with several such cells the others are printed before.
  """
  sweep.check(axes)
  found, wrong = [], []
  everything = grid(axes)
  for number, values in enumerate(everything, 1):
    label = ', '.join(f'{dotted} {value!r}' for dotted, value in values.items())
    try:
      resolved = sweep.cell_of(raw, values)
      found.append(Cell(label, values, resolved, config.sha256(resolved)))
    except UserError as error:
      wrong.append(f'{called(number, len(everything), label)}{error}')
  refuse(wrong)
  if len({c.sha256 for c in found}) < len(found):
    raise UserError('config.sweep has cells that are the same: give every value once')
  return found


def called(number: int, n: int, label: str) -> str:
  """What goes before a mistake in a cell of a grid; nothing where there is no grid."""
  return f'cell {number} of {n} ({label}): ' if label else ''


def refuse(wrong: Sequence[str]) -> None:
  """Raises UserError where there are mistakes, each on a line of its own."""
  if not wrong:
    return
  more = f'; {len(wrong)} cells are wrong' if len(wrong) > 1 else ''
  if more:
    show.make().say('\n'.join(wrong[1:SHOWN]))
  raise UserError(f'{wrong[0]}{more}; nothing was started')


def products(members: Sequence[Cell], most: int) -> list[list[Cell]]:
  """Members in pieces of at most `most` cells, each all combinations of some values: a grid of its own."""
  axes = varied(members)
  size = math.prod(map(len, axes.values()))
  if size == len(members) <= most:
    return [list(members)]
  longest = max(axes, key=lambda dotted: len(axes[dotted]))
  keys = [repr(v) for v in axes[longest]]
  n = len(keys) if size != len(members) else min(len(keys), -(-size // most))
  bounds = [len(keys) * i // n for i in range(n + 1)]
  chunks = [set(keys[lo:hi]) for lo, hi in itertools.pairwise(bounds)]
  return [
    piece
    for chunk in chunks
    for piece in products([c for c in members if repr(c.values[longest]) in chunk], most)
  ]


def varied(members: Sequence[Cell]) -> dict[str, tuple]:
  """{axis: its different values, in the order of the grid}; 0 and 0.0 are different."""
  return {
    dotted: tuple({repr(c.values[dotted]): c.values[dotted] for c in members}.values())
    for dotted in members[0].values
  }


def source(raw: Mapping[str, Any], members: Sequence[Cell]) -> dict[str, Any]:
  """The configuration file, as JSON, of a part whose sweep is exactly these cells."""
  axes = varied(members)
  fixed = {dotted: values[0] for dotted, values in axes.items() if len(values) == 1}
  own = sweep.overridden(raw, fixed)
  moving = {dotted: values for dotted, values in axes.items() if dotted not in fixed}
  if axes:
    own['sweep'] = moving or dict(itertools.islice(axes.items(), 1))
  try:
    read = config.tuples(json.loads(json.dumps(own)))
  except (TypeError, ValueError) as error:
    raise UserError(f'--config cannot be kept as JSON: {error}') from error
  values = read.pop('sweep', {})
  if {config.sha256(sweep.cell_of(read, v)) for v in grid(values)} != {c.sha256 for c in members}:
    raise UserError('--config changes when it is kept as JSON: use plain numbers, texts and tuples')
  return own


def parts(
  options: Options,
  wanted: Sequence[Cell],
  first: int,
  most: int,
  cpus: int,
  wide: bool,
  tell: Callable[[str], None],
) -> list[tuple[Part, dict[str, Any]]]:
  """Every part and its configuration file, all of its cells checked as far as can be without running them.

  Args:
    first: number of the first part.
    most: cells in a part.
    cpus: of a process.
    wide: all runs of a part are computed at once, as on a GPU.
    tell: gets a line about what takes long.

  Raises:
    UserError: cells whose data, model or methods do not go together.
  """
  made, wrong, pieces = [], [], []
  order = {c.sha256: i for i, c in enumerate(wanted, 1)}
  named = lambda c: called(order[c.sha256], len(wanted), c.label)  # noqa: E731
  groups = [
    [wanted[i] for i in g.members] for g in compile_groups([build.traced(c.config) for c in wanted])
  ]
  for number, members in enumerate(groups, 1):
    if len(groups) > 1:
      tell(f'checking program {number} of {len(groups)}: {len(members)} cells')
    try:
      setup = build.prepare(members[0].config, options.data_dir, tell)[0]
    except UserError as error:
      wrong.append(f'{named(members[0])}{error}')
      continue
    good = len(wrong)
    for cell in members:
      try:  # floats are looked at where the learner is made
        setup.build(build.hyper(cell.config, setup.streams[0]), setup.weights)
      except (UserError, ValueError, TypeError) as error:
        wrong.append(f'{named(cell)}{error}')
    if len(wrong) == good:
      cost = estimate(setup)
      pieces += [(piece, cost) for piece in products(members, most)]
  refuse(wrong)
  for number, (piece, cost) in enumerate(pieces, first):
    seeds = tuple(piece[0].config['seeds'])
    runs = len(piece) * len(seeds)
    # A run that is spread over devices has all cores of its job, its processes each their share.
    own = cpus // options.spread.processes if options.spread.shard else min(cpus, runs)
    devices = max(1, own)
    at_once = runs if wide else min(runs, (options.width or 1) * devices)
    size = PROCESS + cost['shared'] + runs * cost['state'] + at_once * cost['temporary']
    program = 'sweep' if piece[0].values else 'run'
    shas = tuple(c.sha256 for c in piece)
    flops = runs * cost['flops']
    part = Part(f'{number:03}', named_part(piece), program, shas, seeds, devices, size, flops)
    made.append((part, source(options.raw, piece)))
  return made


def named_part(piece: Sequence[Cell]) -> str:
  """'er.capacity 30, optimizer.lr (0.01 ... 0.1), 2 seeds'."""
  words = [
    f'{dotted} {values[0]!r}' if len(values) == 1 else f'{dotted} {len(values)} values'
    for dotted, values in varied(piece).items()
  ]
  seeds = len(piece[0].config['seeds'])
  return ', '.join([*words, f'{seeds} seed{"s" * (seeds > 1)}'])
