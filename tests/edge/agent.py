"""Runs emitted C here: compiles it into a shared library and calls it through ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cl_jax.edge.c99 import FLAGS, Program

SANITIZE = ('-fsanitize=address,undefined', '-fno-sanitize-recover=all', '-g')


def compiler() -> str:
  found = shutil.which('gcc') or shutil.which('clang')
  if found is None:
    pytest.skip('no C compiler on this machine: install gcc or clang')
  return found


def library(files: dict[str, str], place: Path, *flags: str) -> ctypes.CDLL:
  """Compiles every .c but the example, with all warnings as errors and without a library to lean on."""
  place.mkdir(parents=True, exist_ok=True)
  for name, text in files.items():
    (place / name).write_text(text)
  sources = [name for name in files if name.endswith('.c') and not name.endswith('_main.c')]
  command = [compiler(), *FLAGS, '-O1', '-shared', '-fPIC', '-nostdlib', *flags, '-o', 'lib.so', *sources]
  done = subprocess.run(command, cwd=place, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[:3000]
  return ctypes.CDLL(str(place / 'lib.so'))


def pointer(a: np.ndarray) -> ctypes.c_void_p:
  return a.ctypes.data_as(ctypes.c_void_p)


class Device:
  """A learner's C with its state in one block of memory, as a device would hold it."""

  def __init__(self, program: Program, leaves: list[np.ndarray], place: Path):
    self.name = program.manifest['name']
    self.lib = library(program.files, place)
    class Entry(ctypes.Structure):
      _fields_ = [('name', ctypes.c_char_p), ('type', ctypes.c_char_p), ('offset', ctypes.c_size_t), ('bytes', ctypes.c_size_t)]
    table = (Entry * len(leaves)).in_dll(self.lib, f'{self.name}_leaves')
    self.entries = [(e.offset, e.bytes) for e in table]
    self.memory = np.zeros(max((o + max(n, 8) for o, n in self.entries), default=8) + 64, np.uint8)
    self.like = leaves
    for (offset, n), a in zip(self.entries, leaves, strict=True):
      self.memory[offset : offset + n] = np.frombuffer(np.ascontiguousarray(a).tobytes(), np.uint8)

  def call(self, part: str, rows: list, out: np.ndarray | None = None) -> None:
    rows = [np.ascontiguousarray(np.asarray(a)) for a in rows]
    given = [pointer(self.memory), *map(pointer, rows), *([] if out is None else [pointer(out)])]
    getattr(self.lib, f'{self.name}_{part}')(*given)

  def leaves(self) -> list[np.ndarray]:
    return [
      np.frombuffer(self.memory[o : o + n].tobytes(), a.dtype).reshape(a.shape)
      for (o, n), a in zip(self.entries, self.like, strict=True)
    ]
