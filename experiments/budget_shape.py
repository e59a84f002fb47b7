"""Whether a large model fits: `python -m experiments.budget --shape=llama-8b --devices=8x80GB`."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from typing import Any

import jax
import optax

from cl_jax import footprint, shard
from cl_jax.errors import UserError

ROOM = 0.9  # of a device's memory: the rest is for XLA's own programs, collectives and fragments
UNITS = {'MB': 1e6, 'GB': 1e9, 'TB': 1e12, 'MIB': 2**20, 'GIB': 2**30}
NOTE = f"""\
parameters, gradients and optimiser: exact, by the leaf rule of cl_jax/shard.py. kept, stage: a formula, of
cl_jax/footprint.py. It fits where the total is at most {ROOM:.0%} of the device; 1 GB is 10^9 bytes."""


DEFAULTS = {  # filled in after parsing, so that --config can refuse what was given
  'devices': '8x80GB', 'rows': 1, 'length': 2048, 'optimiser': 'adamw', 'dtype': 'float32', 'shard': 'fsdp',
}  # fmt: skip
OPTIONS = (*(f'--{name}' for name in DEFAULTS), '--no-remat', '--compile')


def arguments(add: Any) -> None:
  add('--shape', metavar='NAME', help=f'a plan without a run, of {", ".join(footprint.SHAPES)}')
  add('--devices', metavar='NxSIZE', help='for --shape: how many, how large (8x80GB)')
  add('--rows', type=int, help='for --shape: examples on a device at a time (1)')
  add('--length', type=int, help='for --shape: tokens of an example (2048)')
  add('--optimiser', help='for --shape: a function of optax (adamw)')
  add('--dtype', help='for --shape: of the activations (float32)')
  add('--shard', help='for --shape: data or fsdp (fsdp)')
  add('--no-remat', action='store_true', help='for --shape: keep all activations of all layers')
  add('--compile', action='store_true', help='for --shape: compile the step, and ask XLA as well')


def command(given: argparse.Namespace) -> int:
  """Prints the plan; 1 where the step does not fit on the devices that were named."""
  given = argparse.Namespace(
    **{k: DEFAULTS.get(k) if v is None else v for k, v in vars(given).items()}
  )
  n, size = devices(given.devices)
  step = step_of(given)
  if given.compile:
    virtual(n)
  about = figures(step, given.shape, n, size)
  if given.compile:
    peak = footprint.measured(step)
    about['xla'] = {**peak._asdict(), 'peak': peak.peak}
  print(json.dumps(about) if given.json else table(about), flush=True)
  return 0 if about['fits'] else 1


def devices(text: str) -> tuple[int, float]:
  """(8, 80e9) of '8x80GB'."""
  found = re.fullmatch(r'(\d+)x(\d+(?:\.\d+)?)([KMGT]i?B)', text, re.IGNORECASE)
  if found is None or found[3].upper() not in UNITS or not int(found[1]):
    raise UserError(f'--devices must be a number and a size as in 8x80GB; got {text!r}')
  return int(found[1]), float(found[2]) * UNITS[found[3].upper()]


def step_of(given: argparse.Namespace) -> footprint.Step:
  if given.shape not in footprint.SHAPES:
    raise UserError(f'--shape: no shape {given.shape!r}: there are {", ".join(footprint.SHAPES)}')
  if given.shard not in shard.MODES:
    raise UserError(f'--shard must be {" or ".join(shard.MODES)}; got {given.shard!r}')
  factory = getattr(optax, given.optimiser, None)
  if (
    not inspect.isfunction(factory) or 'learning_rate' not in inspect.signature(factory).parameters
  ):
    raise UserError(f'--optimiser: optax has no optimiser {given.optimiser!r}')
  if given.dtype not in ('float32', 'bfloat16', 'float16'):
    raise UserError(f'--dtype must be float32, bfloat16 or float16; got {given.dtype!r}')
  shape = footprint.SHAPES[given.shape]
  if given.rows < 1 or not 1 <= given.length <= shape.positions:
    raise UserError(f'--rows must be at least 1, --length from 1 to {shape.positions}')
  return footprint.Step(
    shape, given.rows, given.length, given.optimiser, given.shard, not given.no_remat, given.dtype
  )


def figures(step: footprint.Step, name: str, n: int, size: float) -> dict[str, Any]:
  need = footprint.footprint(step, n)
  room = ROOM * size
  return {
    'shape': name,
    'parameters': footprint.parameters(step),
    'step': {k: v for k, v in step._asdict().items() if k != 'config'},
    'devices': n,
    'size': size,
    'bytes': {k: v for k, v in need._asdict().items() if k != 'largest'},
    'largest': need.largest,
    'total': need.total,
    'fits': need.total <= room,
    'fewest': footprint.fewest(step, room),
  }


def virtual(n: int) -> None:
  """Before jax first computes: n devices of a CPU, which a program is compiled for and never runs on."""
  settings: Any = jax.config
  settings.update('jax_platforms', 'cpu')
  try:
    settings.update('jax_num_cpu_devices', n)
  except RuntimeError as error:
    raise UserError('--compile must be the first thing that jax does in a process') from error


def table(about: dict[str, Any]) -> str:
  step, n = about['step'], about['devices']
  names = {
    'parameters': 'parameters', 'optimiser': f'optimiser ({step["optimiser"]})',
    'gradients': 'gradients', 'batch': 'batch',
    'kept': 'activations kept, ' + ('inputs of the layers (remat)' if step['remat'] else 'no remat'),
    'stage': f'largest stage of the step: {about["largest"]}',
  }  # fmt: skip
  size, total = about['size'], about['total']
  rows = [
    f'{about["shape"]}: {about["parameters"]:,} parameters, {step["mode"]} over {n} devices of '
    f'{size / 1e9:g} GB, on each {step["rows"]} x {step["length"]} tokens, {step["dtype"]}',
    *(f'  {names[k]:<52}{v / 1e9:10.2f} GB' for k, v in about['bytes'].items()),
    f'  {"in all on each device":<52}{total / 1e9:10.2f} GB  {total / size:.0%}',
  ]
  if 'xla' in about:
    rows += [f'  {"XLA, the step compiled for a CPU":<52}{about["xla"]["peak"] / 1e9:10.2f} GB']
  fewest = about['fewest']
  least = f'the fewest that it fits on: {fewest}' if fewest else 'it fits on no number of them'
  rows += [f'{"fits" if about["fits"] else "DOES NOT FIT"}; {least} (powers of 2)', NOTE]
  return '\n'.join(rows)
