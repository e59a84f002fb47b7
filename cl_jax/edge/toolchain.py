"""C compilers: an exported learner and its agent become a program for a target, and its sizes are read."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cl_jax.edge import cortex_m
from cl_jax.edge.artefact import BUILD, Artefact
from cl_jax.edge.c99 import FLAGS
from cl_jax.edge.targets import Target, absent
from cl_jax.errors import UserError

BOARD = 4 << 20  # of RAM and of flash on the emulated boards: what there is without a budget


class Image(NamedTuple):
  """A program for a target.

  Attributes:
    path: of the program.
    code_bytes: .text and .rodata of the learner's own object.
    held: {'state', 'arena'}: bytes as the linker has them; with an operating system, as the object files.
    ram_bytes: of the whole image, stack included; None with an operating system.
  """

  path: Path
  code_bytes: int
  held: dict[str, int]
  ram_bytes: int | None


# Programs around a learner: the units that each is made of, beside the learner's own and the port.
PROGRAMS = {'agent': ('agent',), 'device': ('device', 'slots', 'flash')}


def build(
  artefact: Artefact,
  target: Target,
  ram: int | None = None,
  flash: int | None = None,
  program: str = 'agent',
  defines: Sequence[str] = (),
) -> Image:
  """Compiles and links for a target, below FOLDER/build.

  Args:
    artefact: see `artefact.read`.
    target: see `targets`.
    ram, flash: instead of those of the export, for a bare target.
    program: of PROGRAMS.
    defines: NAME=VALUE, for the program's units.

  Raises:
    UserError: no compiler; the image does not fit into RAM or flash (the linker's words); warnings.
  """
  if reason := absent(target, run=False):
    raise UserError(f'{target.name}: {reason}')
  manifest, source = artefact.manifest, artefact.folder.resolve()
  name = manifest['name']
  place = artefact.folder / BUILD / target.name
  place.mkdir(parents=True, exist_ok=True)
  place = place.resolve()
  port = 'port_cortex_m' if target.bare else 'port_hosted'
  define = ('-DPORT_BARE', '-fno-tree-loop-distribute-patterns') if target.bare else ()
  flags = [*FLAGS, *(f for f in target.flags if f != '-static')]
  units = (name, *PROGRAMS[program], port)
  for unit in units:
    extra = (*define, *(f'-D{d}' for d in defines)) if unit != name else ()
    _gcc(target, [*flags, *extra, '-c', str(source / f'{unit}.c'), '-o', f'{unit}.o'], place)
  objects = [f'{unit}.o' for unit in units]
  if target.external is not None:
    budget = manifest['budget']
    text = cortex_m.script(
      ram or budget['ram'] or BOARD,
      flash or budget['flash'] or BOARD,
      budget['stack'],
      target.external,
    )
    (place / 'link.ld').write_text(text)
    link = [
      '-nostdlib',
      '-T',
      'link.ld',
      f'-Wl,--gc-sections,-Map={program}.map',
      *objects,
      '-lgcc',
    ]
  else:
    link = [*(['-static'] if '-static' in target.flags else []), *objects]
  _gcc(target, [*flags, *link, '-o', program], place)
  held = {}
  for path in [place / program] if target.bare else [place / f'{program}.o', place / f'{name}.o']:
    held |= symbols(target, path)
  return Image(
    place / program,
    section_bytes(target, place / f'{name}.o', ('.text', '.rodata')),
    {'state': held.get(f'{program}_state', 0), 'arena': held.get('arena', 0)},
    section_bytes(target, place / program, ('.stack', '.data', '.bss')) if target.bare else None,
  )


def _tool(target: Target, tool: str) -> str:
  """A tool beside the compiler: 'arm-none-eabi-size'."""
  return target.compiler.removesuffix('gcc') + tool


def _gcc(target: Target, words: list[str], place: Path) -> None:
  done = subprocess.run([target.compiler, *words], cwd=place, capture_output=True, text=True)
  if not done.returncode:
    return
  over = re.findall(r"region `(\w+)' overflowed by (\d+) byte", done.stderr)
  if over:
    region, n = over[0]
    region = {'EXTERNAL': "the board's external memory"}.get(region, region)
    raise UserError(
      f'{target.name}: the linker refuses the image: {region} overflowed by {int(n):,} bytes: give more, '
      'or take a smaller memory, model or batch'
    )
  lines = [line for line in done.stderr.splitlines() if 'error' in line] or [done.stderr[:300]]
  raise UserError(f'{target.name}: {target.compiler} failed: {lines[0][:300]}')


def _read(command: list[str]) -> str:
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    raise UserError(f'{command[0]} failed: {done.stderr.strip()[:200]}')
  return done.stdout


def section_bytes(target: Target, path: Path, names: tuple[str, ...]) -> int:
  """Bytes of the sections of these names, or of names that begin with one and a dot."""
  total = 0
  for section, n in re.findall(
    r'^(\.\S+)\s+(\d+)\s', _read([_tool(target, 'size'), '-A', str(path)]), re.M
  ):
    if any(section == name or section.startswith(f'{name}.') for name in names):
      total += int(n)
  return total


def symbols(target: Target, path: Path) -> dict[str, int]:
  """Bytes of every symbol that has a size."""
  text = _read([_tool(target, 'nm'), '-S', str(path)])
  return {name: int(n, 16) for n, name in re.findall(r'^\S+ (\S+) \w (\S+)$', text, re.M)}
