"""A module of a learner on an emulated aarch64 machine: IREE's own tool, from the wheel for that machine.

`iree-run-module` calls one function of one module, so a second module, the driver, calls the functions of the
learner's in turn: load, steps, boundary, steps, prediction, save. The learner's module is the one that was
exported, unchanged; its constants are mapped from the file. The tool prints what its allocator counted.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cl_jax.edge.emulate import TIMEOUT, Call
from cl_jax.edge.iree_compile import MACHINES, Compiled, compile, extra
from cl_jax.edge.iree_driver import driver
from cl_jax.edge.iree_host import DRIVER
from cl_jax.edge.iree_module import NAME
from cl_jax.edge.iree_plan import Host
from cl_jax.edge.learner import Leaf
from cl_jax.errors import Fault, UserError
from cl_jax.streams import cache

SYSROOT = Path('/usr/aarch64-linux-gnu')  # Debian's libc6-arm64-cross and libstdc++6-arm64-cross
EMULATORS = ('qemu-aarch64', 'qemu-aarch64-static')
PACKAGES = 'libc6-arm64-cross libstdc++6-arm64-cross qemu-user'
WHEEL = 'manylinux_2_28_aarch64'
TOOL = 'iree/_runtime_libs/iree-run-module'


class Ran(NamedTuple):
  """What a run on a device left; see `iree_host.Played`."""

  losses: np.ndarray
  logits: list[np.ndarray]
  leaves: list[np.ndarray]
  apart: tuple[str, ...] | None
  peak: int


def absent(name: str) -> str:
  """'' where a machine can be run, else what is missing and how to get it."""
  if not MACHINES[name].emulator:
    here, built = platform.machine(), MACHINES[name].triple.partition('-')[0]
    if here.lower() in (built, 'amd64'):
      return ''
    return f'its module is for {built} and this machine is {here or "unknown"}: verify it on one of that kind'
  if emulator() is None or not (SYSROOT / 'lib/libstdc++.so.6').exists():
    return f'qemu-aarch64 or the libraries for aarch64 are not installed (Debian: {PACKAGES})'
  if not tool(name).is_file():
    return "IREE's runtime for aarch64 is not here: run again with --install"
  return ''


def emulator() -> str | None:
  return next((found for e in EMULATORS if (found := shutil.which(e))), None)


def tool(name: str) -> Path:
  """iree-run-module for a machine."""
  if not MACHINES[name].emulator:
    return Path(extra('_runtime_libs').__path__[0]) / 'iree-run-module'
  return cache.directory() / f'iree-aarch64-{metadata.version("iree-base-runtime")}' / TOOL


def install() -> None:
  """Fetches the aarch64 wheel of the runtime that is installed here, by pip, and unpacks it into the cache.

  Raises:
    UserError: pip cannot.
  """
  extra('runtime')
  place = next(tool(name) for name, m in MACHINES.items() if m.emulator)
  if place.is_file():
    return
  version = metadata.version('iree-base-runtime')
  with tempfile.TemporaryDirectory() as folder:
    words = [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'download', '--quiet',
             '--no-deps', '--only-binary=:all:', f'--platform={WHEEL}', f'--dest={folder}',
             f'iree-base-runtime=={version}']  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True)
    wheels = list(Path(folder).glob('*.whl'))
    if done.returncode or not wheels:
      lines = done.stderr.strip().splitlines() or ['no wheel came']
      raise UserError(
        f'pip cannot fetch iree-base-runtime=={version} for aarch64 ({lines[-1][:200]}): '
        f'put its {TOOL} at {place}'
      )
    place.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheels[0]) as wheel:
      fresh = place.with_suffix('.new')
      fresh.write_bytes(wheel.read(TOOL))
  fresh.chmod(0o755)
  fresh.replace(place)


def play(
  compiled: Compiled,
  name: str,
  tables: tuple[Sequence[Leaf], Sequence[Leaf], Sequence[Leaf]],
  logits: tuple[int, ...],
  leaves: Sequence[np.ndarray],
  calls: Sequence[Call],
  planned: bool = True,
) -> Ran:
  """Runs the calls on a machine from the state `leaves`.

  Args:
    compiled: the learner's module for that machine.
    name: of the machine; 'host' runs here, by the same tool.
    tables: leaves of the state, of a batch and of a boundary's batches.
    logits: shape of a prediction.
    leaves: the initial state.
    calls: steps, a boundary at most, more steps, one prediction.
    planned: compare the allocator's peak with the plan.

  Raises:
    Fault: the program failed.
  """
  state, batch, ends = tables
  steps = [rows for part, rows in calls if part == 'step']
  at = next((k for k, (part, _) in enumerate(calls) if part == 'boundary'), None)
  half = len(steps) if at is None else at
  text = driver(
    state, batch, ends if at is not None else (), Leaf('', logits, 'float32', ''), len(steps), half
  )
  whole = compile(text, name, 'none')
  given = [*leaves, *(np.stack(rows) for rows in zip(*steps, strict=True))]
  given += calls[at][1] if at is not None else []
  given += calls[-1][1]
  command = [str(tool(name)), f'--device={DRIVER}', '--module=learner.vmfb', '--module=driver.vmfb',
             '--module_mode=mmap', '--function=main', '--print_statistics']  # fmt: skip
  if cpu := MACHINES[name].emulator:
    program = emulator()
    if program is None:
      raise UserError(f'{name}: {absent(name)}')
    command = [program, '-L', str(SYSROOT), '-cpu', cpu, *command]
  outs = 2 + len(state)
  with tempfile.TemporaryDirectory() as folder:
    place = Path(folder)
    (place / 'learner.vmfb').write_bytes(compiled.vmfb)
    (place / 'driver.vmfb').write_bytes(whole.vmfb)
    for k, a in enumerate(given):
      np.save(place / f'in{k}.npy', a)
    command += [f'--input=@in{k}.npy' for k in range(len(given))]
    command += [f'--output=@out{k}.npy' for k in range(outs)]
    try:
      done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
      raise Fault(f'{name}: the module did not end within {TIMEOUT:.0f} s') from error
    said = done.stdout + done.stderr
    if done.returncode:
      tail = ' / '.join(said.strip().splitlines()[-3:])
      raise Fault(f'{name}: the module ended with code {done.returncode} ({tail[:300]})')
    results = [np.load(place / f'out{k}.npy') for k in range(outs)]
  found = re.search(r'DEVICE_LOCAL:\s+(\d+)B peak', said)
  if found is None:
    raise Fault(f'{name}: iree-run-module printed no statistics')
  apart = _apart(compiled, whole, [a.nbytes for a in given], int(found[1])) if planned else None
  kept = [a.view(b.dtype).reshape(b.shape) for a, b in zip(results[2:], leaves, strict=True)]
  return Ran(results[0], [results[1].ravel()], kept, apart, int(found[1]))


def _apart(compiled: Compiled, whole: Compiled, given: list[int], measured: int) -> tuple[str, ...]:
  plan = Host(whole.vm, {NAME: Host(compiled.vm)})
  results = plan.call('main', given)
  want = plan.heap.peak['device']
  del results
  return (
    () if measured == want else (f'{measured:,} bytes at most were allocated and {want:,} planned',)
  )
