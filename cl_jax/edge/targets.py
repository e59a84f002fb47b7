"""Where a learner can go as C99: compilers, flags, emulators. Those of IREE are in `iree_compile`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import NamedTuple

from cl_jax.errors import UserError


class Target(NamedTuple):
  """A kind of machine.

  Attributes:
    name: what the commands call it.
    compiler: a GCC.
    flags: of the compiler, after `c99.FLAGS`; a later -O wins.
    emulators: programs that run the result, the first that is installed; () runs it here. Only those that
      load plugins count instructions: Debian's static qemu-user does not.
    arguments: of the emulator.
    packages: of Debian, that hold compiler and emulator.
    external: address and bytes of the board's memory outside of the budget, for a boundary's examples; None
      of a machine with an operating system.
  """

  name: str
  compiler: str
  flags: tuple[str, ...] = ()
  emulators: tuple[str, ...] = ()
  arguments: tuple[str, ...] = ()
  packages: tuple[str, ...] = ('gcc',)
  external: tuple[int, int] | None = None

  @property
  def bare(self) -> bool:
    """No operating system: the image is linked by our own script, and memory is what the script says."""
    return self.external is not None


def _hosted(name: str, gcc: str, qemu: str, flags: tuple[str, ...], cpu: str, libc: str) -> Target:
  return Target(
    name, f'{gcc}-gcc', (*flags, '-static'), (f'qemu-{qemu}', f'qemu-{qemu}-static'), ('-cpu', cpu),
    (f'gcc-{gcc}', f'libc6-dev-{libc}-cross', 'qemu-user'),
  )  # fmt: skip


def _bare(name: str, fpu: str, board: str, external: int) -> Target:
  return Target(
    name, 'arm-none-eabi-gcc',
    (f'-mcpu={name}', '-mthumb', '-mfloat-abi=hard', f'-mfpu={fpu}', '-ffreestanding',
     '-ffunction-sections', '-fdata-sections', '-fno-unwind-tables', '-fno-asynchronous-unwind-tables'),
    ('qemu-system-arm',), ('-M', board, '-nographic', '-monitor', 'none', '-serial', 'none',
     '-semihosting-config', 'enable=on,target=native'),
    ('gcc-arm-none-eabi', 'qemu-system-arm'), (external, 16 << 20),
  )  # fmt: skip


ARMV7 = ('-march=armv7-a', '-mfpu=vfpv3-d16', '-mfloat-abi=hard')
TARGETS = {
  t.name: t
  for t in (
    Target('host', 'gcc'),
    # Any C compiler: strictly the language, and no optimisation, which must not change a bit.
    Target('c99', 'gcc', ('-O0', '-pedantic-errors')),
    _hosted('cortex-a53', 'aarch64-linux-gnu', 'aarch64', ('-mcpu=cortex-a53',), 'cortex-a53', 'arm64'),
    _hosted('cortex-a72', 'aarch64-linux-gnu', 'aarch64', ('-mcpu=cortex-a72',), 'cortex-a72', 'arm64'),
    _hosted('armv7', 'arm-linux-gnueabihf', 'arm', ARMV7, 'cortex-a7', 'armhf'),
    _hosted('riscv64', 'riscv64-linux-gnu', 'riscv64', (), 'rv64', 'riscv64'),
    _bare('cortex-m4', 'fpv4-sp-d16', 'mps2-an386', 0x21000000),
    _bare('cortex-m7', 'fpv5-sp-d16', 'mps2-an500', 0x60000000),
  )
}  # fmt: skip


def find(names: Sequence[str]) -> list[Target]:
  """The targets of these names, each once; a word may hold several with commas."""
  words = [w.strip() for name in names for w in name.split(',') if w.strip()]
  for word in words:
    if word not in TARGETS:
      raise UserError(f'--target: there is no target {word!r}: there are {", ".join(TARGETS)}')
  return [TARGETS[word] for word in dict.fromkeys(words)]


def emulator(target: Target) -> str | None:
  """The first of its emulators that is installed."""
  return next((found for name in target.emulators if (found := shutil.which(name))), None)


def absent(target: Target, run: bool = True) -> str:
  """'' where it can be compiled (and run), else which program is missing and which packages hold it."""
  missing = [] if shutil.which(target.compiler) else [target.compiler]
  if run and target.emulators and emulator(target) is None:
    missing.append(target.emulators[0])
  if not missing:
    return ''
  verb = 'is' if len(missing) == 1 else 'are'
  return f'{" and ".join(missing)} {verb} not installed (Debian: {" ".join(target.packages)})'
