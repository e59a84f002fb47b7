"""Runs emitted C here: as a shared library through ctypes, or as a program under the sanitizers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cl_jax.edge import targets
from cl_jax.edge.c99 import FLAGS, Program

SANITIZE = ('-fsanitize=address,undefined', '-fno-sanitize-recover=all', '-O0')

# Reads the state, then batches until its input ends; writes the state. Whatever is read is kept in heap
# blocks of exactly the right size, so that the address sanitizer sees one byte too far.
HARNESS = """
#include <stdio.h>
#include <stdlib.h>
#include "NAME.h"
static void *take(size_t n) {
  void *p = malloc(n);
  if (!p || fread(p, 1, n, stdin) != n) { free(p); return 0; }
  return p;
}
int main(void) {
  NAME_state *s = take(sizeof *s);
  int part;
  while ((part = getchar()) != EOF) {
    void *rows[ROWS];
    float *out = malloc(OUT);
    const size_t *sizes = part == 'b' ? (size_t[]){ENDS} : (size_t[]){BATCH};
    for (int k = 0; k < ROWS; k++) if (!(rows[k] = take(sizes[k]))) return 3;
    if (part == 's') NAME_step(s, ARGS, out);
    if (part == 'b') NAME_boundary(s, ARGS);
    if (part == 'p') NAME_predict(s, ARGS, out);
    for (int k = 0; k < ROWS; k++) free(rows[k]);
    free(out);
  }
  fwrite(s, sizeof *s, 1, stdout);
  free(s);
  return 0;
}
"""


class Entry(ctypes.Structure):
  """A line of the emitted table of leaves."""

  _fields_ = [
    ('name', ctypes.c_char_p),
    ('type', ctypes.c_char_p),
    ('offset', ctypes.c_size_t),
    ('bytes', ctypes.c_size_t),
  ]


def need(*names: str) -> None:
  """Skips, with the reason, where a target has no tools here."""
  for name in names:
    if reason := targets.absent(targets.TARGETS[name]):
      pytest.skip(f'needs a cross compiler and an emulator: {name}: {reason}')


def run(capsys, main, *argv) -> tuple[int, str, str]:
  """(exit code, stdout, stderr) of a command in this process."""
  capsys.readouterr()
  code = main([str(word) for word in argv])
  return code, *capsys.readouterr()


def build(files: dict[str, str], place: Path, target: str, *flags: str) -> Path:
  """Compiles every .c but the example, all warnings being errors."""
  compiler = shutil.which('gcc') or shutil.which('clang')
  if compiler is None:
    pytest.skip('no C compiler on this machine: install gcc or clang')
  place.mkdir(parents=True, exist_ok=True)
  for name, text in files.items():
    (place / name).write_text(text)
  sources = [n for n in files if n.endswith('.c') and not n.endswith('_main.c')]
  command = [compiler, *FLAGS, *flags, '-o', target, *sources]
  done = subprocess.run(command, cwd=place, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[:3000]
  return place / target


def library(files: dict[str, str], place: Path, *flags: str) -> ctypes.CDLL:
  """A shared library that needs no other."""
  return ctypes.CDLL(str(build(files, place, 'lib.so', '-shared', '-fPIC', '-nostdlib', *flags)))


def pointer(a: np.ndarray) -> ctypes.c_void_p:
  return a.ctypes.data_as(ctypes.c_void_p)


class Device:
  """A learner's C with its state in one block of memory, as a device would hold it."""

  def __init__(self, program: Program, leaves: Sequence[np.ndarray], place: Path, *flags: str):
    self.name, self.like = program.manifest['name'], leaves
    self.lib = library(program.files, place, *(flags or ('-O1',)))
    table = (Entry * len(leaves)).in_dll(self.lib, f'{self.name}_leaves')
    self.entries = [(e.offset, e.bytes) for e in table]
    self.memory = image(self.entries, leaves)

  def call(self, part: str, rows: Sequence, out: np.ndarray | None = None) -> None:
    rows = [np.ascontiguousarray(np.asarray(a)) for a in rows]
    given = [self.memory, *rows, *([] if out is None else [out])]
    getattr(self.lib, f'{self.name}_{part}')(*map(pointer, given))

  def leaves(self) -> list[np.ndarray]:
    return [
      np.frombuffer(self.memory[o : o + n].tobytes(), a.dtype).reshape(a.shape)
      for (o, n), a in zip(self.entries, self.like, strict=True)
    ]


def image(entries: Sequence[tuple[int, int]], leaves: Sequence[np.ndarray]) -> np.ndarray:
  """The struct that holds these leaves."""
  widest = max(a.itemsize for a in leaves)
  memory = np.zeros(-(-max(o + n for o, n in entries) // widest) * widest, np.uint8)
  for (offset, n), a in zip(entries, leaves, strict=True):
    memory[offset : offset + n] = np.frombuffer(np.ascontiguousarray(a).tobytes(), np.uint8)
  return memory


def sanitized(
  program: Program, memory: np.ndarray, calls: Sequence, out: int, place: Path
) -> bytes:
  """The state's bytes after the calls [(part, rows), ...] under the address and undefined sanitizers."""
  name = program.manifest['name']
  rows = len(program.manifest['batch'])
  sizes = {'BATCH': [], 'ENDS': []}
  for part, given in calls:
    sizes['ENDS' if part == 'boundary' else 'BATCH'] = [np.asarray(a).nbytes for a in given]
  words = {
    'NAME': name,
    'ROWS': rows,
    'OUT': out,
    'ARGS': ', '.join(f'rows[{k}]' for k in range(rows)),
  }
  words |= {k: ', '.join(map(str, v or [0])) for k, v in sizes.items()}
  harness = HARNESS
  for key, value in words.items():
    harness = harness.replace(key, str(value))
  program_file = build({**program.files, 'harness.c': harness}, place, 'harness', *SANITIZE)
  stdin = memory.tobytes()
  for part, given in calls:
    stdin += part[:1].encode() + b''.join(
      np.ascontiguousarray(np.asarray(a)).tobytes() for a in given
    )
  done = subprocess.run([program_file], input=stdin, capture_output=True)
  assert done.returncode == 0, done.stderr.decode()[:3000]
  return done.stdout
