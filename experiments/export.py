"""A learner for small devices: `python -m experiments.export --config=FILE[:ARG] --target=NAMES --out=DIR`.

DIR gets C99 sources of step, prediction and boundary, an agent for every target, the initial state, the same
functions as StableHLO, and manifest.json, which has names, shapes, bytes by role, MACs and the digest of
every file. `python -m experiments.verify DIR` then compares it with JAX on every target.

A budget of --ram is checked by arithmetic first and, for Cortex-M targets, by the linker.

With --backend=iree (extra "edge") DIR gets modules of IREE instead, for host, cortex-a53 and cortex-a72.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cl_jax import loop
from cl_jax.edge import agent, artefact, device, iree_compile, ram, targets, toolchain
from cl_jax.edge.c99 import emit
from cl_jax.edge.learner import Flat, flatten, lower
from cl_jax.errors import UserError
from cl_jax.streams.take import take
from cl_jax.types import Stream
from experiments import build, cli, config, options, results

PROGRAM = 'experiments.export'
NAME = 'learner'  # prefix of what the C sources define


class Subject(NamedTuple):
  """A learner made from a configuration, and what it learns from.

  Attributes:
    flat: see `edge.learner.flatten`; `flat.leaves` is the initial state of the first seed.
    stream: of that seed.
  """

  flat: Flat
  stream: Stream


def main(argv: Sequence[str] | None = None) -> int:
  parser = cli.parser(PROGRAM, __doc__)
  add = parser.add_argument
  add('--config', metavar='FILE[:ARG]', help='as for experiments.run; the first seed is exported')
  add('--backend', choices=('c99', 'iree'), default='c99', help='C99 sources or IREE modules (c99)')
  add(
    '--target',
    '--targets',
    action='append',
    metavar='NAMES',
    help=f'of {", ".join(targets.TARGETS)} (host)',
  )
  add('--out', metavar='DIR', type=Path, help='the artefact; one that is there is replaced')
  add('--ram', metavar='BYTES', help='what the device has, as in 256K: the export fails above it')
  add(
    '--flash', metavar='BYTES', help='the same for constants and, where a Cortex-M is linked, code'
  )
  add('--stack', metavar='BYTES', help='of it, for the stack (4K)')
  add('--data_dir', metavar='DIR', help='where data sets are (default: CL_JAX_DATA)')
  argv = sys.argv[1:] if argv is None else list(argv)
  return cli.guarded(PROGRAM, lambda words: command(parser, words), argv)


def command(parser: argparse.ArgumentParser, argv: list[str]) -> int:
  given, left = parser.parse_known_args(argv)
  overrides = options.fields_of(left)
  if given.config is None or given.out is None:
    raise UserError('an export needs --config=FILE[:ARG] and --out=DIR (see --help)')
  words = given.target or ['host']
  iree = given.backend == iree_compile.BACKEND
  if iree:
    cli.refuse(given, ('--stack',), 'is of C99 sources: a module of IREE has no planned stack')
  wanted = [] if iree else targets.find(words)
  machines = iree_compile.find(words) if iree else []
  budget = {
    'ram': None if given.ram is None else ram.size(given.ram, '--ram'),
    'flash': None if given.flash is None else ram.size(given.flash, '--flash'),
    'stack': ram.STACK if given.stack is None else ram.size(given.stack, '--stack'),
  }
  resolved, _, sweep = options.overridden(config.load(given.config), overrides)
  if sweep:
    raise UserError('config.sweep holds a grid: export one configuration')
  cli.devices(1)
  if iree:
    from experiments import export_iree

    manifest = export_iree.write(resolved, machines, budget, given.out, given.data_dir)
    print(export_iree.summary(manifest, given.out), end='')
    return 0
  manifest = export(resolved, wanted, budget, given.out, given.data_dir)
  print(summary(manifest, given.out), end='')
  read = artefact.read(given.out)
  try:
    for target in wanted:
      if target.bare:
        print(linked(read, target), flush=True)
  except UserError:
    (given.out / artefact.MANIFEST).unlink()  # what does not fit is no artefact
    raise
  return 0


def export(
  resolved: Mapping[str, Any],
  wanted: Sequence[targets.Target],
  budget: Mapping[str, int | None],
  folder: Path,
  data_dir: str | None = None,
) -> dict[str, Any]:
  """Writes the artefact and returns its manifest.

  Args:
    resolved: the configuration; its first seed is taken.
    wanted: targets that `verify` will run.
    budget: {'ram', 'flash', 'stack'} in bytes; None is no limit.
    folder: of the artefact.
    data_dir: see `streams.load.dataset`.

  Raises:
    UserError: an operation without a C99 form, by name, line and method; more bytes than the budget has.
  """
  resolved = {**resolved, 'seeds': tuple(resolved['seeds'])[:1]}
  made = subject(resolved, data_dir)
  flat = made.flat
  program = emit(flat, NAME)
  logits = jax.eval_shape(flat.predict, flat.leaves, shapes_of(flat))
  manifest = {
    'learner': results.method_name(resolved),
    'backend': 'c99',
    'targets': [t.name for t in wanted],
    'config': resolved,
    'config_sha256': config.sha256(resolved),
    **program.manifest,
    'outputs': int(np.prod(logits.shape)),
    'logits': list(logits.shape),
    'budget': dict(budget),
    'versions': {'python': platform.python_version(), 'commit': results.commit()}
    | {name: results.version(name) for name in ('jax', 'jaxlib', 'numpy', 'optax')},
  }
  stack = budget['stack'] or ram.STACK
  manifest['ram_bytes'] = ram.needed(manifest, stack)
  ram.check(manifest, budget['ram'], budget['flash'], stack)
  blob = artefact.pack(flat.leaves)
  manifest['state0_fnv'] = artefact.fnv(blob)
  files: dict[str, str | bytes] = {
    **program.files,
    **agent.files(manifest),
    **device.files(manifest),
    **modules(flat),
    artefact.STATE: blob,
  }
  return artefact.write(folder, manifest, files)


def subject(resolved: Mapping[str, Any], data_dir: str | None = None) -> Subject:
  """The learner of a configuration's first seed, as `experiments.run` begins it."""
  build.resident(resolved, 'experiments.export')
  setup = build.prepare(resolved, data_dir)[0]
  stream = setup.streams[0]
  learner = setup.build(build.hyper(setup.config, stream), setup.weights)
  batch = take(stream, stream.index[0, 0], 0)
  ends = None
  if 'boundary' in stream.told:
    ends = jax.vmap(lambda rows: take(stream, rows, 0))(stream.ends[0])
  begin = jax.jit(lambda key, batch: loop.strong(learner.init(key, batch)))
  state = begin(jax.random.key(setup.seeds[0]), batch)
  return Subject(flatten(learner, state, batch, ends), stream)


def shapes_of(flat: Flat) -> list[jax.ShapeDtypeStruct]:
  return [jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype)) for leaf in flat.batch]


def modules(flat: Flat) -> dict[str, str]:
  """The StableHLO of the functions over flat lists, as text: what another backend begins with."""
  found = {
    'step.mlir': str(lower(flat.step, flat.state, flat.batch)),
    'predict.mlir': str(lower(flat.predict, flat.state, flat.batch)),
  }
  if flat.boundary is not None:
    found['boundary.mlir'] = str(lower(flat.boundary, flat.state, flat.ends))
  return found


def linked(read: artefact.Artefact, target: targets.Target) -> str:
  """A line about the image of a bare target; UserError where the linker refuses it."""
  if reason := targets.absent(target, run=False):
    return f'{target.name}: not linked: {reason}'
  image = toolchain.build(read, target)
  assert image.ram_bytes is not None
  budget = read.manifest['budget']['ram']
  of = f' of {budget:,}' if budget else ''
  return f'{target.name}: linked, {image.ram_bytes:,}{of} bytes of RAM, code {image.code_bytes:,}'


def summary(manifest: Mapping[str, Any], folder: Path) -> str:
  """What was exported, in a few lines."""
  macs = manifest['macs']
  parts = ', '.join(f'{name} {n:,}' for name, n in manifest['ram_bytes'].items() if n)
  return (
    f'{manifest["learner"]}: {len(manifest["files"])} files in {folder}\n'
    f'  RAM {sum(manifest["ram_bytes"].values()):,} bytes: {parts}\n'
    f'  constants {manifest["constant_bytes"]:,} bytes; MACs: step {macs["step"]:,}, '
    f'predict {macs["predict"]:,}\n'
  )


if __name__ == '__main__':
  sys.exit(main())
