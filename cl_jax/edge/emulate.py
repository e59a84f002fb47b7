"""Runs an agent, here or on an emulated machine, and counts the instructions that it took."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cl_jax.edge.artefact import pack
from cl_jax.edge.targets import Target, emulator
from cl_jax.edge.toolchain import Image
from cl_jax.errors import Fault, UserError

TIMEOUT = 600.0
# What `agent.c` and its ports return.
EXITS = {
  4: 'it cannot open its files, or has too small a stack', 5: 'its input ends within the state',
  6: 'its input ends within a call', 7: 'its input holds an unknown call',
  8: 'the power went', 9: 'a fault of the processor, as by too small a stack',
  10: 'neither slot of its flash holds a whole state of this learner',
  11: 'its flash does not hold what was written', 12: 'its flash is too short',
}  # fmt: skip

# A plugin of QEMU's code generator. Debian has no header for it, so what is used of its interface is declared
# here; a QEMU of another interface refuses the plugin, and nothing is counted.
PLUGIN = r"""
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
typedef uint64_t id;
struct qemu_plugin_tb;
extern void qemu_plugin_register_vcpu_tb_trans_cb(id, void (*)(id, struct qemu_plugin_tb *));
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int, void *, uint64_t);
extern void qemu_plugin_register_atexit_cb(id, void (*)(id, void *), void *);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
__attribute__((visibility("default"))) int qemu_plugin_version = 1;
static uint64_t count;
static void block(id self, struct qemu_plugin_tb *tb) {
  (void)self;
  qemu_plugin_register_vcpu_tb_exec_inline(tb, 0, &count, qemu_plugin_tb_n_insns(tb));
}
static void leave(id self, void *data) {
  (void)self, (void)data;
  fprintf(stderr, "instructions %llu\n", (unsigned long long)count);
}
__attribute__((visibility("default")))
int qemu_plugin_install(id self, const void *info, int argc, char **argv) {
  (void)info, (void)argc, (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(self, block);
  qemu_plugin_register_atexit_cb(self, leave, NULL);
  return 0;
}
"""

Call = tuple[str, Sequence[np.ndarray]]  # 'step', 'boundary' or 'predict', and its arrays


class Played(NamedTuple):
  """What a run left.

  Attributes:
    losses: f32 of every step.
    logits: of every prediction, flat.
    state: the leaves' bytes, packed.
    hash: of the state, as the agent computed it.
    stack: bytes of stack that were touched; None with an operating system.
    instructions: of the whole program; None where they are not counted.
  """

  losses: np.ndarray
  logits: list[np.ndarray]
  state: bytes
  hash: str
  stack: int | None
  instructions: int | None


def play(
  image: Image,
  target: Target,
  leaves: Sequence[np.ndarray],
  calls: Sequence[Call],
  outputs: int,
  count: bool = True,
) -> Played:
  """Runs the calls on a target, from the state `leaves`.

  Args:
    image: see `toolchain.build`.
    target: of the image.
    leaves: the state that the agent begins with.
    calls: in order.
    outputs: floats of a prediction.
    count: count instructions where the emulator can.

  Raises:
    UserError: the emulator is not there.
    Fault: the program failed or did not end.
  """
  given = pack(leaves) + stream_of(calls)
  code, out, said = call(image, target, given, count)
  if code:
    raise Fault(failure(target, 'agent', code, said))
  return _split(target, out, said, sum(a.nbytes for a in leaves), calls, outputs)


def stream_of(calls: Sequence[Call]) -> bytes:
  """The calls as an agent reads them."""
  return b''.join(part[:1].encode() + pack(rows) for part, rows in calls)


def call(
  image: Image, target: Target, given: bytes, count: bool = False, timeout: float = TIMEOUT
) -> tuple[int, bytes, str]:
  """Runs a program with `given` as its input: its exit code, what it wrote, and what it said.

  Raises:
    UserError: the emulator is not there.
    Fault: it did not end in time.
  """
  command, place = [str(image.path)], image.path.parent
  if target.emulators:
    program = emulator(target)
    if program is None:
      raise UserError(f'{target.name}: {target.emulators[0]} is not installed')
    library = plugin(place.parent) if count and counts(program) else None
    plugged = ['-plugin', str(library)] if library else []
    kernel = ['-kernel'] if target.bare else []
    command = [program, *target.arguments, *plugged, *kernel, *command]
  if target.bare:
    (place / 'in.bin').write_bytes(given)
    (place / 'out.bin').unlink(missing_ok=True)
  try:
    done = subprocess.run(
      command, input=b'' if target.bare else given, capture_output=True, cwd=place, timeout=timeout
    )
  except subprocess.TimeoutExpired as error:
    name = image.path.name
    raise Fault(f'{target.name}: the {name} did not end within {timeout:.0f} s') from error
  said = (done.stderr + (done.stdout if target.bare else b'')).decode(errors='replace')
  out = done.stdout
  if target.bare:
    out = (place / 'out.bin').read_bytes() if (place / 'out.bin').exists() else b''
  for name in ('in.bin', 'out.bin'):
    (place / name).unlink(missing_ok=True)
  return done.returncode, out, said


def failure(target: Target, name: str, code: int, said: str) -> str:
  """Why a program ended with a code that is not 0, in words."""
  tail = ' / '.join(said.strip().splitlines()[-3:])
  why = EXITS.get(code, 'a crash; on a bare target try more --stack')
  return f'{target.name}: the {name} ended with code {code} ({why}; {tail})'


def word(said: str, label: str, base: int) -> int | None:
  """The number that a program said behind a label, as in 'hash 01ab'."""
  found = re.search(rf'^{label} ([0-9a-f]+)$', said, re.M)
  return int(found[1], base) if found else None


def _split(
  target: Target, out: bytes, said: str, size: int, calls: Sequence[Call], outputs: int
) -> Played:
  losses, logits, at = [], [], 0
  for part, _ in calls:
    n = {'step': 1, 'predict': outputs, 'boundary': 0}[part]
    values = np.frombuffer(out[at : at + 4 * n], '<f4')
    at += 4 * n
    if part == 'step':
      losses.append(values)
    elif part == 'predict':
      logits.append(values)
  if len(out) != at + size:
    raise Fault(f'{target.name}: the agent wrote {len(out):,} bytes, not {at + size:,}')
  return Played(
    np.concatenate(losses) if losses else np.zeros(0, np.float32),
    logits,
    out[at:],
    f'{word(said, "hash", 16) or 0:016x}',
    word(said, 'stack', 16),
    word(said, 'instructions', 10),
  )


def plugin(place: Path) -> Path | None:
  """The plugin that counts, compiled into a folder; None without a compiler for this machine."""
  path = place.resolve() / 'count.so'
  if path.exists():
    return path
  compiler = shutil.which('gcc')
  if compiler is None:
    return None
  command = [compiler, '-O2', '-shared', '-fPIC', '-x', 'c', '-', '-o', str(path)]
  done = subprocess.run(command, input=PLUGIN.encode(), capture_output=True)
  return path if done.returncode == 0 else None


@lru_cache
def counts(program: str) -> bool:
  """Whether an emulator loads plugins of the interface that we use."""
  done = subprocess.run([program, '--help'], capture_output=True, text=True)
  version = subprocess.run([program, '--version'], capture_output=True, text=True).stdout
  found = re.search(r'version (\d+)', version)
  return 'plugin' in done.stdout and found is not None and int(found[1]) < 9
