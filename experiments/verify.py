"""Compares an exported learner with JAX: `python -m experiments.verify DIR --steps=50 [--targets=NAMES]`.

The steps of the configuration's own stream are computed by JAX and by the exported program on every target,
with a boundary half-way and a prediction at the end. Integers of the state (memory, labels, counters, keys)
must be equal bit for bit, floats to 1e-5 of max(1, |x|), and the whole state must have the same hash on all
targets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cl_jax.edge import (
  artefact,
  emulate,
  iree_compile,
  iree_device,
  parity,
  ram,
  targets,
  toolchain,
)
from cl_jax.errors import Fault, UserError
from experiments import cli, config, edge_calls, edge_rows, export

PROGRAM = 'experiments.verify'
TOLERANCE = 1e-5


def main(argv: Sequence[str] | None = None) -> int:
  parser = cli.parser(PROGRAM, __doc__)
  add = parser.add_argument
  add('folder', metavar='DIR', type=Path, help='what experiments.export wrote')
  add('--steps', type=int, default=50, help='training steps to compare (50)')
  add(
    '--targets', '--target', metavar='NAMES', action='append', help='default: those of the export'
  )
  add('--accuracy', action='store_true', help='the whole stream by the C99 program on this machine')
  add('--write', metavar='FILE', type=Path, nargs='?', const=Path(),
      help='put rows into FILE (results/edge.csv; of IREE results/edge_iree.csv)')  # fmt: skip
  add('--time', action='store_true', help="IREE: a step here against jax.jit's, in turn")
  add('--install', action='store_true', help='IREE: fetch its runtime for aarch64 by pip, once')
  add('--data_dir', metavar='DIR', help='where data sets are (default: CL_JAX_DATA)')
  argv = sys.argv[1:] if argv is None else list(argv)
  return cli.guarded(PROGRAM, lambda words: command(parser, words), argv)


def command(parser: argparse.ArgumentParser, argv: list[str]) -> int:
  given = parser.parse_args(argv)
  if given.steps < 1:
    raise UserError(f'--steps must be at least 1; got {given.steps}')
  read = artefact.read(given.folder)
  iree = read.manifest['backend'] == iree_compile.BACKEND
  if given.write == Path():
    given.write = Path('results/edge_iree.csv' if iree else 'results/edge.csv')
  if iree:
    return of_iree(read, given)
  cli.refuse(given, ('--time', '--install'), 'is of IREE: export with --backend=iree')
  wanted = targets.find(given.targets or read.manifest['targets'])
  cli.devices(1)
  verify(read, wanted, given.steps, given.write, given.accuracy, given.data_dir)
  without = [t.name for t in wanted if targets.absent(t)]
  if without and given.targets:
    raise UserError(f'not verified: {", ".join(without)}; install the tools that are named above')
  return 0


def of_iree(read: artefact.Artefact, given: argparse.Namespace) -> int:
  from experiments import verify_iree

  cli.refuse(given, ('--accuracy',), 'is of the C99 program: export with --backend=c99')
  if given.time and 'host' not in read.manifest['targets']:
    raise UserError('--time is of a module for this machine: export with --target=host')
  names = iree_compile.find(given.targets or read.manifest['targets'])
  if given.install:
    iree_device.install()
  cli.devices(1)
  verify_iree.run(read, names, given.steps, given.write, given.time, given.data_dir)
  without = [name for name in names if iree_device.absent(name)]
  if without and given.targets:
    raise UserError(f'not verified: {", ".join(without)}; see above for what is missing')
  return 0


def verify(
  read: artefact.Artefact,
  wanted: Sequence[targets.Target],
  steps: int,
  write: Path | None = None,
  accuracy: bool = False,
  data_dir: str | None = None,
) -> list[edge_rows.Verified]:
  """Verifies on every target that has its tools, prints a table, and writes rows.

  Raises:
    UserError: the artefact is of other source or data than there are now.
    Fault: a target differs from JAX, from another target, or from the bytes that were planned.
  """
  manifest = read.manifest
  made = export.subject(config.tuples(manifest['config']), data_dir)
  same_learner(read, made)
  calls = edge_calls.calls_of(made, steps)
  want, logits = edge_calls.reference(made, calls)
  done, lines = [], []
  for target in wanted:
    if reason := targets.absent(target):
      lines.append(f'{target.name}: not verified: {reason}')
      continue
    done.append(on_target(read, target, calls, want, logits))
  right = None
  if accuracy and not targets.absent(targets.TARGETS['host']):
    right = accuracy_of(read, made)
  rows = [edge_rows.row(manifest, v, steps, right, done) for v in done]
  print('\n'.join([edge_rows.table(rows, done), *lines]), flush=True)
  wrong = complaints(done, manifest)
  if wrong:
    said = '; '.join(wrong)
    if any(max(v.parity.error, v.logits) > TOLERANCE for v in done):
      own = edge_calls.sensitivity(made, calls, want, manifest['state'])
      said += f' (JAX moves by {own:.1e} itself when last bits of the initial state change)'
    raise Fault(f'{manifest["learner"]} in {read.folder}: {said}')
  if write is not None and rows:
    edge_rows.write(write, rows)
  return done


def same_learner(read: artefact.Artefact, made: export.Subject) -> None:
  """The configuration must still give the learner and the state that were exported."""
  table = [(leaf['name'], tuple(leaf['shape']), leaf['dtype']) for leaf in read.manifest['state']]
  now = [(leaf.name, tuple(leaf.shape), leaf.dtype) for leaf in made.flat.state]
  if table != now:
    raise UserError(
      f'{read.folder} was exported by another version (the leaves of the state differ): export again'
    )
  apart = parity.compare(read.manifest['state'], read.leaves, made.flat.leaves)
  if apart.differing or apart.error > TOLERANCE:
    named = ', '.join((*apart.differing, apart.worst))
    raise UserError(
      f'{read.folder} holds another initial state than its configuration gives now ({named}): export again'
    )


def on_target(
  read: artefact.Artefact,
  target: targets.Target,
  calls: Sequence[emulate.Call],
  want: Sequence[np.ndarray],
  logits: Sequence[np.ndarray],
) -> edge_rows.Verified:
  """Builds and runs one target. Instructions are those beyond a run of the same calls without the steps."""
  manifest = read.manifest
  image = toolchain.build(read, target)
  play = lambda calls: emulate.play(image, target, read.leaves, calls, manifest['outputs'])  # noqa: E731
  played = play(calls)
  instructions = None
  if played.instructions is not None:
    rest = play([call for call in calls if call[0] != 'step'])
    steps = len(played.losses)
    instructions = round((played.instructions - (rest.instructions or 0)) / steps)
  got = artefact.unpack(played.state, manifest['state'])
  if artefact.fnv(played.state) != played.hash:
    raise Fault(f'{target.name}: the state that arrived is not the state that was hashed')
  return edge_rows.Verified(
    target.name,
    parity.compare(manifest['state'], got, want),
    max(parity.difference(a, b) for a, b in zip(played.logits, logits, strict=True)),
    played.hash,
    image,
    instructions,
    played.stack,
  )


def complaints(done: Sequence[edge_rows.Verified], manifest: Mapping[str, Any]) -> list[str]:
  """What is not as it must be."""
  wrong = []
  planned = {
    'state': ram.struct_bytes(manifest['state']),
    'arena': manifest['arena_bytes'],
  }
  needed = sum(manifest['ram_bytes'].values())
  for v in done:
    wrong += differences(v.target, v.parity, v.logits)
    if v.image.held != planned:
      wrong.append(f'{v.target}: {v.image.held} bytes in the image, {planned} planned')
    if v.image.ram_bytes not in (None, needed):
      wrong.append(f'{v.target}: {v.image.ram_bytes} bytes of RAM in the image, {needed} planned')
    if v.stack is not None and v.stack >= manifest['ram_bytes']['stack']:
      wrong.append(
        f'{v.target}: the stack of {v.stack} bytes was used up: export with more --stack'
      )
  hashes = {v.hash for v in done}
  if len(hashes) > 1:
    wrong.append('targets differ: ' + ', '.join(f'{v.target} {v.hash}' for v in done))
  return wrong


def differences(target: str, found: parity.Parity, logits: float) -> list[str]:
  """Where a state, and the logits of a prediction, are not JAX's."""
  wrong = []
  if found.differing:
    wrong.append(f'{target}: integers differ in {", ".join(found.differing[:3])}')
  if found.error > TOLERANCE:
    wrong.append(f'{target}: {found.worst} differs by {found.error:.1e} > {TOLERANCE}')
  if logits > TOLERANCE:
    wrong.append(f'{target}: the prediction differs by {logits:.1e} > {TOLERANCE}')
  return wrong


def accuracy_of(read: artefact.Artefact, made: export.Subject) -> float:
  """The mean accuracy over tasks after the whole stream, learnt and predicted by the C99 program here."""
  host = targets.TARGETS['host']
  calls, tests = edge_calls.whole(made)
  image = toolchain.build(read, host)
  played = emulate.play(image, host, read.leaves, calls, read.manifest['outputs'])
  per_task = edge_calls.accuracies(tests, played.logits, read.manifest['logits'])
  return float(np.mean(per_task))


if __name__ == '__main__':
  sys.exit(main())
