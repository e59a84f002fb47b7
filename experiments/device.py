"""A device learns, loses its power while it saves, and goes on: `python -m experiments.device --out=DIR`.

The learner of a configuration is exported within --ram, put on the emulated device with its first state in
flash, and learns from the configuration's stream, saving every few calls. Then the same with a power cut at
several moments of a save, and with a supply that fails in every boot: each time the device must find the
older state, go on from where that had come to, and end with the state of the run that was never interrupted,
bit for bit. With --whole also the whole stream and the test examples: what the device answers, against JAX.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cl_jax import durable
from cl_jax.edge import artefact, device, emulate, parity, power, ram, slots, targets, toolchain
from cl_jax.errors import Fault, UserError
from experiments import cli, config, edge_calls, export, options, results

PROGRAM = 'experiments.device'
TOLERANCE = 1e-5  # of floats, after the short run
# Of the accuracy after a whole stream. Rounding differs between programs, and a ReLU whose input is within
# rounding of 0 can be on in one and off in the other: from then on they are two runs that are close.
NEAR = 0.01


def main(argv: Sequence[str] | None = None) -> int:
  parser = cli.parser(PROGRAM, __doc__)
  add = parser.add_argument
  add('--config', default='configs/spoken_digits.py', metavar='FILE[:ARG]', help='its first seed')
  add('--out', type=Path, default=Path('runs/device'), metavar='DIR', help='(runs/device)')
  add('--target', default='cortex-m7', metavar='NAME', help=f'of {", ".join(targets.TARGETS)}')
  add('--ram', default='256K', metavar='BYTES', help='all that the device has (256K)')
  add('--stack', default='4K', metavar='BYTES', help='of it, for the stack (4K)')
  add('--steps', type=int, default=40, help='of the runs with cuts (40)')
  add('--every', type=int, default=10, help='calls between two saves there (10)')
  add('--whole', action='store_true', help='the whole stream as well, with a save every 100 calls')
  add('--write', type=Path, metavar='FILE', help='append what was found, a JSON line')
  add('--data_dir', metavar='DIR', help='where data sets are (default: CL_JAX_DATA)')
  argv = sys.argv[1:] if argv is None else list(argv)
  return cli.guarded(PROGRAM, lambda words: command(parser, words), argv)


def command(parser: argparse.ArgumentParser, argv: list[str]) -> int:
  given, left = parser.parse_known_args(argv)
  if given.steps < 2 * given.every or given.every < 1:
    raise UserError('--steps must be at least twice --every, or there is no second save to cut')
  wanted = targets.find([given.target])
  if len(wanted) != 1:
    raise UserError(f'--target={given.target}: a device is one target')
  (target,) = wanted
  if reason := targets.absent(target):
    raise UserError(f'{target.name}: {reason}')
  overrides = options.fields_of(left)
  resolved, _, sweep = options.overridden(config.load(given.config), overrides)
  if sweep:
    raise UserError('config.sweep holds a grid: a device learns by one configuration')
  cli.devices(1)
  limits = {
    'ram': ram.size(given.ram, '--ram'),
    'flash': None,
    'stack': ram.size(given.stack, '--stack'),
  }
  manifest = export.export(resolved, [target], limits, given.out, given.data_dir)
  print(export.summary(manifest, given.out), end='', flush=True)
  read = artefact.read(given.out)
  made = export.subject(resolved, given.data_dir)
  found = {
    'learner': manifest['learner'],
    'config_sha256': manifest['config_sha256'],
    'seed': resolved['seeds'][0],
    'scenario': resolved['scenario'],
    'target': target.name,
    **cuts(read, made, target, given.steps, given.every),
    **(stream(read, made, target) if given.whole else {}),
    'versions': manifest['versions'],
    'device': f'{targets.emulator(target) or "this machine"}; {results.device()}',
    'command': shlex.join(['python', '-m', PROGRAM, *argv]),
  }
  if given.write is not None:
    old = given.write.read_text() if given.write.exists() else ''
    given.write.parent.mkdir(parents=True, exist_ok=True)
    durable.write(given.write, old + json.dumps(found) + '\n')
  return 0


def built(
  read: artefact.Artefact, target: targets.Target, every: int
) -> tuple[toolchain.Image, dict[str, Any]]:
  """The image, and its memory as planned and as the linker has it; Fault where these differ."""
  planned, budget = device.needed(read.manifest), read.manifest['budget']['ram']
  if planned > budget:
    raise UserError(
      f'the device needs {planned:,} bytes of RAM, {device.RAM} of them to save, and --ram gives {budget:,}: '
      'take a smaller memory, model or batch'
    )
  image = toolchain.build(read, target, program='device', defines=(f'DEVICE_EVERY={every}',))
  if image.ram_bytes not in (None, planned):
    raise Fault(f'{target.name}: {image.ram_bytes} bytes of RAM in the image, {planned} planned')
  return image, {
    'ram_budget': budget, 'ram_planned': planned, 'ram_linked': image.ram_bytes,
    'state_bytes': read.manifest['state_bytes'], 'arena_bytes': read.manifest['arena_bytes'],
    'code_bytes': image.code_bytes, 'macs_per_step': read.manifest['macs']['step'],
  }  # fmt: skip


def cuts(
  read: artefact.Artefact,
  made: export.Subject,
  target: targets.Target,
  steps: int,
  every: int,
) -> dict[str, Any]:
  """Runs without and with power cuts, and a line about each; Fault where a run ends otherwise."""
  image, memory = built(read, target, every)
  linked = '' if memory['ram_linked'] is None else f', {memory["ram_linked"]:,} linked'
  print(f'{target.name}: {memory["ram_planned"]:,} bytes of RAM planned{linked}', flush=True)
  table = read.manifest['state']
  n, kind = ram.struct_bytes(table), slots.kind(table)
  calls = edge_calls.calls_of(made, steps)
  flash, stream = slots.pack(table, read.leaves), emulate.stream_of(calls)
  plain = power.boot(image, target, flash, stream)
  last = slots.newest(plain.flash, kind, n)
  assert last is not None
  if artefact.fnv(slots.leaves_of(table, last.state)) != plain.hash:
    raise Fault(f'{target.name}: the saved state is not the one that was hashed')
  apart = parity.compare(table, leaves(read, last), edge_calls.reference(made, calls)[0])
  if apart.differing or apart.error > TOLERANCE:
    raise Fault(
      f'{target.name}: {", ".join(apart.differing[:3]) or apart.worst} differs from JAX by {apart.error:.1e}'
    )
  print(
    f'never cut: {last.sequence - 1} saves, state {plain.hash}; against JAX integers bitwise, floats '
    f'{apart.error:.1e}',
    flush=True,
  )

  def same(what: str, boots: Sequence[power.Boot]) -> dict[str, Any]:
    end = boots[-1]
    after = slots.newest(end.flash, kind, n)
    if end.dark or end.hash != plain.hash or after is None or after.state != last.state:
      raise Fault(f'{what}: the run ended with state {end.hash or "(none)"}, not {plain.hash}')
    if not plain.out.endswith(end.out):
      raise Fault(f'{what}: the last boot computed other results')
    began = f'slot {end.slot}, save {end.sequence - 1}, byte {end.position:,} of the stream'
    print(f'{what}: boots {len(boots)}, went on from {began}; state {end.hash}', flush=True)
    return {'cut': what, 'boots': len(boots), 'slot': end.slot, 'sequence': end.sequence,
            'position': end.position, 'hash': end.hash}  # fmt: skip

  done = []
  for what, bytes_ in power.moments(n, 2):
    boots = power.lasting(image, target, flash, stream, [bytes_])
    torn = slots.newest(boots[0].flash, kind, n)
    if not boots[0].dark or torn is None or torn.slot != boots[-1].slot:
      raise Fault(f'{what}: the device did not go on from the slot that was whole')
    done.append(same(what, boots))
  one = slots.size(n) + n + slots.HEADER.size
  supply = [one + one // 2] * (steps // every + 2)
  done.append(
    same('every second save of a boot', power.lasting(image, target, flash, stream, supply))
  )
  return {
    **memory, 'stack_used': plain.stack, 'float_error': apart.error, 'steps': steps, 'every': every,
    'hash': plain.hash, 'cuts': done,
  }  # fmt: skip


def stream(read: artefact.Artefact, made: export.Subject, target: targets.Target) -> dict[str, Any]:
  """The whole stream with the power cut once, half-way, and the test examples.

  Raises:
    Fault: another state than this machine's program has, which is never cut; other integers or accuracy than
      JAX.
  """
  image, _ = built(read, target, 100)
  manifest, table = read.manifest, read.manifest['state']
  calls, tests = edge_calls.whole(made)
  learnt = [c for c in calls if c[0] != 'predict']
  n = ram.struct_bytes(table)
  one = slots.size(n) + n + slots.HEADER.size
  saves = len(learnt) // 100
  started = time.monotonic()
  boots = power.lasting(
    image, target, slots.pack(table, read.leaves), emulate.stream_of(calls),
    [saves // 2 * one + slots.size(n) + n // 2] if saves else [],
  )  # fmt: skip
  took = time.monotonic() - started
  want, logits = edge_calls.reference(made, calls)
  out = np.frombuffer(boots[-1].out, '<f4')
  predicted = list(out[len(out) - len(logits) * manifest['outputs'] :].reshape(len(logits), -1))
  here, there = (
    edge_calls.accuracies(tests, rows, manifest['logits']) for rows in (predicted, logits)
  )
  end = slots.newest(boots[-1].flash, slots.kind(table), n)
  assert end is not None
  host = targets.TARGETS['host']
  if not targets.absent(host):  # never cut, on this machine
    plain = emulate.play(toolchain.build(read, host), host, read.leaves, calls, manifest['outputs'])
    if plain.hash != boots[-1].hash:
      raise Fault(f'{target.name}: state {boots[-1].hash}, and {plain.hash} of the host, never cut')
  apart = parity.compare(table, leaves(read, end), want)
  print(
    f'whole stream: {len(learnt)} calls and {len(logits)} predictions in {took:.0f} s of emulation, '
    f'{len(boots)} boots (power cut once); accuracy {np.mean(here):.4f}, in JAX {np.mean(there):.4f}; '
    f'integers {"differ" if apart.differing else "bitwise"}, floats {apart.error:.1e}; state '
    f'{boots[-1].hash}',
    flush=True,
  )
  if apart.differing:
    raise Fault(f'{target.name}: integers differ from JAX in {", ".join(apart.differing[:3])}')
  if abs(np.mean(here) - np.mean(there)) > NEAR:
    raise Fault(f'{target.name}: the accuracy differs from JAX by more than {NEAR}')
  return {
    'calls': len(learnt), 'accuracy': here, 'accuracy_jax': there, 'float_error_end': apart.error,
    'boots': len(boots), 'end_hash': boots[-1].hash, 'emulation_s': round(took, 1),
  }  # fmt: skip


def leaves(read: artefact.Artefact, saved: slots.Saved) -> list[np.ndarray]:
  """The leaves of a state that was saved."""
  table = read.manifest['state']
  return artefact.unpack(slots.leaves_of(table, saved.state), table)


if __name__ == '__main__':
  sys.exit(main())
