"""IREE's compiler: a module of a learner becomes a program for a machine, with what plans its memory."""

from __future__ import annotations

import importlib
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from cl_jax.errors import UserError

BACKEND = 'iree'


class Machine(NamedTuple):
  """What IREE compiles for.

  Attributes:
    triple, cpu: as LLVM calls them.
    emulator: the -cpu of qemu-aarch64; '' runs here.
  """

  triple: str
  cpu: str
  emulator: str = ''


# The host is any x86-64 with AVX2 and FMA, so that an artefact runs on another machine than it was made on.
MACHINES = {
  'host': Machine('x86_64-linux-gnu', 'x86-64-v3'),
  'cortex-a53': Machine('aarch64-linux-gnu', 'cortex-a53', 'cortex-a53'),
  'cortex-a72': Machine('aarch64-linux-gnu', 'cortex-a72', 'cortex-a72'),
}


class Compiled(NamedTuple):
  """A program for a machine.

  Attributes:
    vmfb: what IREE's runtime loads.
    vm: its host program as MLIR bytecode; see `iree_plan`.
  """

  vmfb: bytes
  vm: bytes


def find(names: list[str]) -> list[str]:
  """The machines of these names, each once; a word may hold several with commas."""
  words = [w.strip() for name in names for w in name.split(',') if w.strip()]
  for word in words:
    if word not in MACHINES:
      raise UserError(
        f'--target: the backend iree has no target {word!r}: there are {", ".join(MACHINES)}'
      )
  return list(dict.fromkeys(words))


def extra(part: str) -> Any:
  """The module iree.PART, or the one line that says how to get it."""
  try:
    return importlib.import_module(f'iree.{part}')
  except ImportError as error:
    raise UserError(
      f'the backend iree needs the extra "edge": pip install "cl_jax[edge]" ({error})'
    ) from error


def version() -> str:
  """Of the compiler."""
  extra('compiler')
  return metadata.version('iree-base-compiler')


def compile(text: str, name: str, dialect: str = 'stablehlo') -> Compiled:
  """Compiles a module.

  Args:
    text: see `iree_module.module`.
    name: of a machine.
    dialect: that the module is in; 'none' of IREE's own.

  Raises:
    UserError: no compiler; an operation that it does not take (its words).
  """
  machine = MACHINES[name]
  flags = [
    f'--iree-input-type={dialect}',
    '--iree-hal-target-device=local',
    '--iree-hal-local-target-device-backends=llvm-cpu',
    f'--iree-llvmcpu-target-triple={machine.triple}',
    f'--iree-llvmcpu-target-cpu={machine.cpu}',
  ]
  with tempfile.TemporaryDirectory() as folder:
    place = Path(folder)
    (place / 'in.mlir').write_text(text)
    _run(
      ['in.mlir', *flags, '--compile-to=vm', '--emit-mlir-bytecode', '-o', 'vm.mlirbc'], place, name
    )
    _run(
      ['vm.mlirbc', '--compile-from=vm', '--output-format=vm-bytecode', '-o', 'out.vmfb'],
      place,
      name,
    )
    return Compiled((place / 'out.vmfb').read_bytes(), (place / 'vm.mlirbc').read_bytes())


def _run(words: list[str], place: Path, name: str) -> None:
  tool = extra('compiler.tools.binaries').find_tool('iree-compile')
  done = subprocess.run([tool, *words], cwd=place, capture_output=True, text=True)
  if done.returncode:
    lines = [line for line in done.stderr.splitlines() if 'error:' in line] or [done.stderr[:300]]
    said = lines[0].split('error:')[-1].strip()
    raise UserError(f'{name}: IREE does not compile this learner: {said[:300]}')
