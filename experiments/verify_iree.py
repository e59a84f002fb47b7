"""Verifies an artefact for IREE: parity with JAX and the planned memory, on this machine and on aarch64."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cl_jax.edge import artefact, iree_compile, iree_device, iree_host, parity
from cl_jax.edge.emulate import Call
from cl_jax.errors import Fault, UserError
from experiments import config, edge_calls, edge_rows, export, iree_rows, verify

ROUNDS, WARM = 400, 10


class Times(NamedTuple):
  """Median microseconds of a training step, called in turn on this machine.

  Attributes:
    jit: of `jax.jit(step)`, its state donated.
    iree: of the module's step.
    jit_cpu, iree_cpu: the processor time of all threads, which other work on the machine changes less.
  """

  jit: float
  iree: float
  jit_cpu: float
  iree_cpu: float


def run(
  read: artefact.Artefact,
  names: Sequence[str],
  steps: int,
  write: Path | None = None,
  timed: bool = False,
  data_dir: str | None = None,
) -> list[iree_rows.Verified]:
  """Verifies on every machine that can be run here, prints a table, and writes rows.

  Args:
    read: see `artefact.read`.
    names: of `iree_compile.MACHINES`.
    steps: to compare, with a boundary half-way.
    write: file of the rows.
    timed: measure a step against `jax.jit` here.
    data_dir: see `streams.load.dataset`.

  Raises:
    UserError: IREE is not installed; the artefact is of other source or data.
    Fault: a machine differs from JAX, or from the bytes that were planned.
  """
  manifest = read.manifest
  for part in ('compiler', 'runtime'):
    iree_compile.extra(part)
  for name in names:
    if name not in manifest['module_bytes']:
      raise UserError(f'{read.folder} holds no module for {name}: export with --target={name}')
  made = export.subject(config.tuples(manifest['config']), data_dir)
  verify.same_learner(read, made)
  calls = edge_calls.calls_of(made, steps)
  want, logits = edge_calls.reference(made, calls)
  done, lines = [], []
  for name in names:
    if reason := iree_device.absent(name):
      lines.append(f'{name}: not verified: {reason}')
      continue
    done.append(on_machine(read, made, name, calls, want, logits))
  here = 'host' in manifest['module_bytes'] and not iree_device.absent('host')
  times = time_step(read, made, calls) if timed and here else None
  rows = [iree_rows.row(manifest, v, steps, times) for v in done]
  print('\n'.join([iree_rows.table(rows), *lines]), flush=True)
  wrong = [text for v in done for text in complaints(v)]
  if wrong:
    said = '; '.join(wrong)
    if any(max(v.parity.error, v.logits) > verify.TOLERANCE for v in done):
      own = edge_calls.sensitivity(made, calls, want, manifest['state'])
      said += f' (JAX moves by {own:.1e} itself when last bits of the initial state change)'
    raise Fault(f'{manifest["learner"]} in {read.folder}: {said}')
  if write is not None and rows:
    edge_rows.write(write, rows, iree_rows.COLUMNS)
  return done


def on_machine(
  read: artefact.Artefact,
  made: export.Subject,
  name: str,
  calls: Sequence[Call],
  want: Sequence[np.ndarray],
  logits: Sequence[np.ndarray],
) -> iree_rows.Verified:
  """Runs the calls on one machine."""
  manifest, flat = read.manifest, made.flat
  vmfb, vm = ((read.folder / f'learner-{name}.{kind}').read_bytes() for kind in ('vmfb', 'vm'))
  planned = manifest['planned'].get(name)
  if iree_compile.MACHINES[name].emulator:
    compiled = iree_compile.Compiled(vmfb, vm)
    tables = (flat.state, flat.batch, flat.ends)
    shape = tuple(manifest['logits'])
    played = iree_device.play(
      compiled, name, tables, shape, read.leaves, calls, planned is not None
    )
    apart = played.apart
  else:
    plan = vm if planned is not None else None
    played = iree_host.play(vmfb, plan, read.leaves, calls)
    apart = played.apart
    if (
      plan is not None and apart is not None
    ):  # what a prediction takes is hidden behind a step's peak
      apart += iree_host.play(vmfb, plan, read.leaves, calls[-1:]).apart or ()
  return iree_rows.Verified(
    name,
    parity.compare(manifest['state'], played.leaves, want),
    max(parity.difference(a, b) for a, b in zip(played.logits, logits, strict=True)),
    artefact.fnv(artefact.pack(played.leaves)),
    apart,
    played.peak,
  )


def complaints(v: iree_rows.Verified) -> list[str]:
  """What is not as it must be."""
  wrong = verify.differences(v.target, v.parity, v.logits)
  if v.apart:
    wrong.append(f'{v.target}: the memory is not the planned one: {v.apart[0]}')
  return wrong


def time_step(
  read: artefact.Artefact, made: export.Subject, calls: Sequence[Call], rounds: int = ROUNDS
) -> Times:
  """A step of the host's module and one of `jax.jit`, in turn, from the same batches on the host."""
  session = iree_host.Session((read.folder / 'learner-host.vmfb').read_bytes())
  session.call('load', read.leaves)
  step = jax.jit(made.flat.step, donate_argnums=0)
  leaves: list[Any] = [jax.numpy.array(a) for a in read.leaves]
  batches = [rows for part, rows in calls if part == 'step']

  def by_jit(rows: Sequence[np.ndarray]) -> None:
    nonlocal leaves
    leaves, loss = step(leaves, rows)
    float(loss)

  def clock(f: Callable, rows: Sequence[np.ndarray], name: str) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    f(rows)
    found[name].append(time.perf_counter() - wall)
    found[f'{name}_cpu'].append(time.process_time() - cpu)

  found: dict[str, list[float]] = {name: [] for name in Times._fields}
  for k in range(WARM + rounds):
    rows = batches[k % len(batches)]
    clock(by_jit, rows, 'jit')
    clock(lambda rows: session.call('step', rows), rows, 'iree')
  return Times(*(1e6 * statistics.median(found[name][WARM:]) for name in Times._fields))
