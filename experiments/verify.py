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
from typing import Any, NamedTuple

import jax
import numpy as np

from cl_jax.edge import artefact, emulate, energy, parity, ram, targets, toolchain
from cl_jax.edge.learner import Leaf
from cl_jax.errors import Fault, UserError
from cl_jax.streams.take import take
from experiments import cli, config, edge_rows, export

PROGRAM = 'experiments.verify'
TOLERANCE = 1e-5


class Verified(NamedTuple):
  """What a target gave.

  Attributes:
    target: its name.
    parity: of the state, against JAX.
    logits: the largest difference of the prediction's.
    hash: of the state.
    image: see `toolchain.Image`.
    instructions: of a step; None where they are not counted.
    stack: bytes that were touched; None with an operating system.
  """

  target: str
  parity: parity.Parity
  logits: float
  hash: str
  image: toolchain.Image
  instructions: int | None
  stack: int | None


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog=f'python -m {PROGRAM}',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('folder', metavar='DIR', type=Path, help='what experiments.export wrote')
  add('--steps', type=int, default=50, help='training steps to compare (50)')
  add('--targets', metavar='NAMES', action='append', help='default: those of the export')
  add('--accuracy', action='store_true', help='the whole stream by the C99 program on this machine')
  add('--write', metavar='FILE', type=Path, nargs='?', const=Path('results/edge.csv'),
      help='put rows into FILE (results/edge.csv)')  # fmt: skip
  add('--data_dir', metavar='DIR', help='where data sets are (default: CL_JAX_DATA)')
  add('--debug', action='store_true', help='show tracebacks')
  argv = sys.argv[1:] if argv is None else list(argv)
  return cli.guarded(PROGRAM, lambda words: command(parser, words), argv)


def command(parser: argparse.ArgumentParser, argv: list[str]) -> int:
  given = parser.parse_args(argv)
  if given.steps < 1:
    raise UserError(f'--steps must be at least 1; got {given.steps}')
  read = artefact.read(given.folder)
  wanted = targets.find(given.targets or read.manifest['targets'])
  cli.devices(1)
  verify(read, wanted, given.steps, given.write, given.accuracy, given.data_dir)
  without = [t.name for t in wanted if targets.absent(t)]
  if without and given.targets:
    raise UserError(f'not verified: {", ".join(without)}; install the tools that are named above')
  return 0


def verify(
  read: artefact.Artefact,
  wanted: Sequence[targets.Target],
  steps: int,
  write: Path | None = None,
  accuracy: bool = False,
  data_dir: str | None = None,
) -> list[Verified]:
  """Verifies on every target that has its tools, prints a table, and writes rows.

  Raises:
    UserError: the artefact is of other source or data than there are now.
    Fault: a target differs from JAX, from another target, or from the bytes that were planned.
  """
  manifest = read.manifest
  made = export.subject(config.tuples(manifest['config']), data_dir)
  same_learner(read, made)
  calls = calls_of(made, steps)
  want, logits = reference(made, calls)
  done, lines = [], []
  for target in wanted:
    if reason := targets.absent(target):
      lines.append(f'{target.name}: not verified: {reason}')
      continue
    done.append(on_target(read, target, calls, want, logits))
  right = None
  if accuracy and not targets.absent(targets.TARGETS['host']):
    right = accuracy_of(read, made)
  rows = [row(manifest, v, steps, right, done) for v in done]
  print('\n'.join([table(rows, done), *lines]), flush=True)
  wrong = complaints(done, manifest)
  if wrong:
    said = '; '.join(wrong)
    if any(v.parity.error > TOLERANCE for v in done):
      own = sensitivity(made, calls, want, manifest['state'])
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


# --- the same calls in JAX and on a target ----------------------------------------------------------


def rows_of(batch: Any, table: Sequence[Leaf]) -> list[np.ndarray]:
  """A batch as the flat programs take it."""
  leaves = jax.tree.leaves(batch)
  return [np.asarray(a, leaf.dtype) for a, leaf in zip(leaves, table, strict=True)]


def calls_of(made: export.Subject, steps: int) -> list[emulate.Call]:
  """The first half of the steps from the first leg, its boundary, the rest from the second, a prediction."""
  stream, flat = made.stream, made.flat
  lengths = leg_steps(made)
  half, calls = -(-steps // 2), []
  last = min(1, len(lengths) - 1)
  fetch = jax.jit(lambda rows, leg: take(stream, rows, leg))
  for i in range(steps):
    leg = 0 if i < half else last
    at = i if i < half else i - half
    batch = fetch(stream.index[leg, at % lengths[leg]], leg)
    calls.append(('step', rows_of(batch, flat.batch)))
    if i == half - 1 and flat.boundary is not None:
      calls.append(('boundary', ends_of(made, 0)))
  return [*calls, ('predict', tests_of(made)[0][0][0])]


def leg_steps(made: export.Subject) -> list[int]:
  stream = made.stream
  if stream.steps is None:
    return [stream.index.shape[1]] * len(stream.index)
  return [int(n) for n in np.asarray(stream.steps)]


def ends_of(made: export.Subject, leg: int) -> list[np.ndarray]:
  stream = made.stream
  ends = jax.vmap(lambda rows: take(stream, rows, leg))(stream.ends[leg])
  return rows_of(ends, made.flat.ends)


def reference(
  made: export.Subject, calls: Sequence[emulate.Call]
) -> tuple[list[Any], list[np.ndarray]]:
  """(the final leaves, the logits of every prediction) as JAX computes them."""
  flat = made.flat
  step, predict = jax.jit(flat.step), jax.jit(flat.predict)
  boundary = None if flat.boundary is None else jax.jit(flat.boundary)
  leaves: list[Any] = list(flat.leaves)
  logits = []
  for part, rows in calls:
    if part == 'step':
      leaves, _ = step(leaves, rows)
    elif part == 'boundary':
      assert boundary is not None
      leaves = boundary(leaves, rows)
    else:
      logits.append(np.asarray(predict(leaves, rows)).ravel())
  return [np.asarray(a) for a in leaves], logits


def sensitivity(
  made: export.Subject,
  calls: Sequence[emulate.Call],
  want: Sequence[np.ndarray],
  table: Sequence[Mapping[str, Any]],
) -> float:
  """How far JAX's final state moves when the last bit of about a half of the initial floats changes.

  A method that amplifies rounding (a steep gate, an ill-conditioned solve) cannot agree better than that between
  two programs that add in different orders.
  """
  draw = np.random.default_rng(0)

  def nudged(a: np.ndarray) -> np.ndarray:
    up = np.nextafter(a, np.inf) if a.dtype.kind == 'f' else a
    return np.asarray(np.where(draw.integers(0, 2, a.shape), up, a), a.dtype)

  other = made.flat._replace(leaves=[nudged(a) for a in made.flat.leaves])
  again, _ = reference(made._replace(flat=other), calls)
  return parity.compare(table, again, want).error


def on_target(
  read: artefact.Artefact,
  target: targets.Target,
  calls: Sequence[emulate.Call],
  want: Sequence[np.ndarray],
  logits: Sequence[np.ndarray],
) -> Verified:
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
  return Verified(
    target.name,
    parity.compare(manifest['state'], got, want),
    max(parity.difference(a, b) for a, b in zip(played.logits, logits, strict=True)),
    played.hash,
    image,
    instructions,
    played.stack,
  )


def complaints(done: Sequence[Verified], manifest: Mapping[str, Any]) -> list[str]:
  """What is not as it must be."""
  wrong = []
  planned = {
    'state': ram.struct_bytes(manifest['state']),
    'arena': manifest['arena_bytes'],
  }
  needed = sum(manifest['ram_bytes'].values())
  for v in done:
    if v.parity.differing:
      wrong.append(f'{v.target}: integers differ in {", ".join(v.parity.differing[:3])}')
    if v.parity.error > TOLERANCE:
      wrong.append(f'{v.target}: {v.parity.worst} differs by {v.parity.error:.1e} > {TOLERANCE}')
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


def row(
  manifest: Mapping[str, Any],
  v: Verified,
  steps: int,
  right: float | None,
  done: Sequence[Verified],
) -> dict[str, Any]:
  """The line of results/edge.csv."""
  macs = manifest['macs']['step']
  batch = sum(ram.leaf_bytes(leaf) for leaf in manifest['batch'])
  estimate = energy.estimate(macs, manifest['state_bytes'] + manifest['arena_bytes'] + batch)
  target = targets.TARGETS[v.target]
  notes = [f'state {v.hash}']
  if v.stack is not None:
    notes.append(f'stack {v.stack}')
  if v.instructions is None:
    why = 'not emulated' if not target.emulators else 'this emulator loads no plugin'
    notes.append(f'instructions not counted: {why}')
  peers = {w.hash for w in done if w.target == 'host'}
  if right is not None and v.target != 'host':
    notes.append('accuracy by host')
  return {
    'learner': manifest['learner'],
    'target': v.target,
    'parity_int': 'bitwise' if not v.parity.differing else f'{len(v.parity.differing)} differ',
    'parity_float': f'{max(v.parity.error, v.logits):.1e}',
    'code_bytes': v.image.code_bytes,
    'state_bytes': manifest['state_bytes'],
    'peak_bytes': sum(manifest['ram_bytes'].values()),
    'macs_per_step': macs,
    'instructions_per_step': '' if v.instructions is None else v.instructions,
    'energy_uj_estimate': '' if estimate.uj is None else f'{estimate.uj:.3g}',
    'accuracy': '' if right is None or peers - {v.hash} else f'{right:.4f}',
    'steps': steps,
    'note': '; '.join(notes),
  }


def table(rows: Sequence[Mapping[str, Any]], done: Sequence[Verified]) -> str:
  """Aligned text; what is the same on all targets comes above."""
  if not done:
    return 'nothing was verified'
  first = rows[0]
  number = lambda v: f'{v:,}' if isinstance(v, int) else str(v or '-')  # noqa: E731
  head = (
    f'{first["learner"]}: {first["steps"]} steps; planned: state {number(first["state_bytes"])}, peak '
    f'{number(first["peak_bytes"])} bytes; {number(first["macs_per_step"])} MACs a step, energy '
    f'{first["energy_uj_estimate"] or "-"} uJ (an estimate), accuracy {first["accuracy"] or "-"}'
  )
  names = ('target', 'integers', 'floats', 'state hash', 'code', 'state + arena', 'image RAM',
           'stack used', 'instructions/step')  # fmt: skip
  lines = [names] + [
    (
      v.target, r['parity_int'], r['parity_float'], v.hash, number(v.image.code_bytes),
      number(sum(v.image.held.values())), number(v.image.ram_bytes), number(v.stack),
      number(v.instructions),
    )
    for r, v in zip(rows, done, strict=True)
  ]  # fmt: skip
  widths = [max(len(line[k]) for line in lines) for k in range(len(names))]
  body = ['  '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines]
  return '\n'.join([head, *(f'  {line.rstrip()}' for line in body)])


# --- accuracy after the whole stream ----------------------------------------------------------------


def tests_of(made: export.Subject) -> list[list[tuple[list[np.ndarray], np.ndarray, np.ndarray]]]:
  """For every task, batches of its test examples in the size that predict was exported for: (rows, y, w)."""
  table, test = made.flat.batch, made.stream.test
  B = table[-1].shape[0]
  found = []
  for t in range(made.stream.tasks):
    own = jax.tree.map(lambda a, t=t: np.asarray(a[t]).reshape(-1, *np.shape(a)[3:]), test)
    n = len(own.y)
    parts = []
    for lo in range(0, n, B):
      at = np.arange(lo, lo + B)
      part = jax.tree.map(lambda a, at=at, n=n: a[np.minimum(at, n - 1)], own)
      part = part._replace(w=np.where(at < n, part.w, 0).astype(np.float32))
      if part.w.any():
        parts.append((rows_of(part, table), np.asarray(part.y), np.asarray(part.w)))
    found.append(parts)
  return found


def accuracy_of(read: artefact.Artefact, made: export.Subject) -> float:
  """The mean accuracy over tasks after the whole stream, learnt and predicted by the C99 program here."""
  manifest, stream = read.manifest, made.stream
  host = targets.TARGETS['host']
  fetch = jax.jit(lambda rows, leg: take(stream, rows, leg))
  calls: list[emulate.Call] = []
  for leg, n in enumerate(leg_steps(made)):
    for i in range(n):
      calls.append(('step', rows_of(fetch(stream.index[leg, i], leg), made.flat.batch)))
    if made.flat.boundary is not None:
      calls.append(('boundary', ends_of(made, leg)))
  tests = tests_of(made)
  calls += [('predict', rows) for parts in tests for rows, _, _ in parts]
  image = toolchain.build(read, host)
  played = emulate.play(image, host, read.leaves, calls, manifest['outputs'])
  guesses = iter(a.reshape(manifest['logits']).argmax(-1) for a in played.logits)
  per_task = []
  for parts in tests:
    hits = [(w * (next(guesses) == y), w) for _, y, w in parts]
    per_task.append(sum(h.sum() for h, _ in hits) / sum(w.sum() for _, w in hits))
  return float(np.mean(per_task))


if __name__ == '__main__':
  sys.exit(main())
