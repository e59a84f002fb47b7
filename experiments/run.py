"""One experiment: `python -m experiments.run --config=configs/NAME.py[:ARG] --workdir=DIR`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from cl_jax import checkpoint
from cl_jax.errors import UserError
from cl_jax.types import Method, State, Tree
from experiments import (
  build,
  cli,
  config,
  devices,
  engine,
  processes,
  results,
  rules,
  scalars,
  show,
  tables,
  workdir,
)
from experiments.chain import chain_of
from experiments.job import Job, blank, spread
from experiments.options import Options, parse
from experiments.watch import Interrupted, Stop

PROGRAM = 'experiments.run'
ABOUT = 'Runs one experiment (every seed of it in one program), resumes when repeated.'


def main(argv: Sequence[str] | None = None) -> int:
  return cli.guarded(PROGRAM, command, argv)


def command(argv: list[str]) -> int:
  options = parse(argv, PROGRAM, ABOUT)
  rules.untuned(options.config)
  if options.sweep:
    raise UserError('config.sweep holds a grid: use python -m experiments.sweep')
  spread = options.spread
  if spread.processes > 1 and not spread.coordinator:
    return processes.watched(argv, spread.processes, options.workdir)
  if devices.joined(spread):
    devices.start(spread)
    # jax takes SIGTERM for itself while it connects; from here on it is noted, as late as in the first step.
    with Stop().listening() as stop:
      if devices.first():
        return lead(options, stop)
      # The first process reads and writes the directory for all.
      with cli.network(options.offline), Path(os.devnull).open('w') as nowhere:
        run(options, options.workdir, show.Show(nowhere), stop=stop)
      return 0
  return lead(options)


def lead(options: Options, stop: Stop | None = None) -> int:
  """The command in the only process, or in the first."""
  shown = show.make()
  with (
    cli.network(options.offline),
    workdir.claimed(options.workdir) as place,
    scalars.opened(options.writers, place) as out,
  ):
    try:
      workdir.remember(place, options.config)
      finished = run(options, place, shown, out.leg, stop)
      out.lines(finished)
    finally:
      shown.close()
    print(tables.table(finished), flush=True)
    workdir.report(place, shown)
  return 0


def run(
  options: Options,
  place: Path,
  shown: show.Show,
  leg: Callable[..., None] = engine.ignore,
  stop: Stop | None = None,
) -> list[dict[str, Any]]:
  """The lines of all seeds, of this process and of those before it; `leg` is for `engine.train`.

  Args:
    stop: what listens to signals already; None where only the work is to be stopped by them.
  """
  resolved = options.config
  sha = config.sha256(resolved)
  if {(sha, seed) for seed in resolved['seeds']} <= results.done(place):
    count = len(resolved['seeds'])
    shown.say(f'{resolved["name"]} is finished: {count} runs are in {place / results.FILE}')
  else:
    mode = options.spread.shard
    if mode:
      build.resident(resolved, f'--shard={mode}')
    if not mode:
      cli.devices(len(resolved['seeds']))
    elif not devices.joined(options.spread):
      devices.start(options.spread)
    with devices.aside(mode):
      setups = build.prepare(resolved, options.data_dir, shown.say)
    seeds = {s for s in resolved['seeds'] if (sha, s) not in results.done(place)}
    for setup in [one for s in setups for one in (devices.alone(s) if mode else [s])]:
      if {(sha, seed) for seed in setup.seeds} <= results.done(place):
        continue
      work = job(setup, place, sha)._replace(width=options.width)
      if mode:
        work = devices.spread(work, mode)
      with nullcontext(stop) if stop is not None else Stop().listening() as asked:
        outcome = engine.train(work, options.save_every, asked, shown, leg=leg)
      lines = results.lines(work, outcome, options.command)
      if not mode or devices.first():
        results.append(place, lines)
      seeds -= set(setup.seeds)
      if seeds and (signum := devices.agreed(asked(), False)[0]):
        raise Interrupted(
          signum, f'{work.name}: stopped, and {len(seeds)} seeds are still to be run'
        )
  if not devices.joined(options.spread) or devices.first():
    (place / 'fault.json').unlink(missing_ok=True)
  return [line for line in results.read(place) if line['config_sha256'] == sha]


class End(NamedTuple):
  """A run of one seed at its end.

  Attributes:
    setup: of its program.
    folder: of its checkpoints.
    state: the last one.
    hp: its floats.
    method: the chain of its methods, for the hooks that read a state.
  """

  setup: build.Setup
  folder: Path
  state: State
  hp: Tree
  method: Method


def end_of(
  resolved: dict[str, Any], place: Path, data_dir: str | None, tell: Callable[[str], None]
) -> End | None:
  """The run of one seed in the directory `place`; None where its checkpoint is not there any more.

  Raises:
    UserError: the run is not at its end.
  """
  setup = build.prepare(resolved, data_dir, tell)[0]
  of = job(setup, place, config.sha256(resolved))
  like = blank(of, spread(of), resolved['eval_every'])
  restored = checkpoint.restore(of.folder, like, of.sha256, tell, tidy=False)
  if restored is None:
    return None
  if (leg := int(restored.tree.leg)) < len(setup.streams[0].index):
    raise UserError(
      f'{place} is not at its end, it has finished {leg} of its legs: run it on first'
    )
  hp = build.hyper(resolved, setup.streams[0])
  method = chain_of(resolved, setup.streams[0], hp, setup.model(setup.weights).wires)
  return End(setup, of.folder, restored.tree.state, hp, method)


def job(setup: build.Setup, place: Path, sha: str) -> Job:
  seeds = list(setup.seeds)
  name = f'{setup.config["name"]} {results.method_name(setup.config)}'
  return Job(
    setup=setup,
    configs=[setup.config] * len(seeds),
    seeds=seeds,
    streams=setup.streams,
    labels=[f'seed {seed}' for seed in seeds],
    name=name,
    workdir=place,
    folder=place / 'checkpoints' / f'seeds-{span(seeds)}',
    sha256=f'{sha}/{",".join(map(str, seeds))}',
  )


def span(seeds: Sequence[int]) -> str:
  """'0-4', or '1_5_7'."""
  if len(seeds) > 1 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
    return f'{seeds[0]}-{seeds[-1]}'
  return '_'.join(map(str, seeds[:8])) + ('_etc' if len(seeds) > 8 else '')


if __name__ == '__main__':
  sys.exit(main())
