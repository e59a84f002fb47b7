"""The two slots of a device: wherever a save is cut, the newest whole state is found."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_jax.edge import slots
from cl_jax.edge.c99 import FLAGS

TABLE = [
  {'name': 'flag', 'dtype': 'bool', 'shape': [3], 'bytes': 3},
  {'name': 'w', 'dtype': 'float32', 'shape': [2, 2], 'bytes': 16},
  {'name': 'count', 'dtype': 'int64', 'shape': [], 'bytes': 8},
]
LEAVES = [np.array([True, False, True]), np.arange(4, dtype=np.float32).reshape(2, 2), np.int64(7)]
N = 32  # 3, padding, 16, padding, 8
KIND = slots.kind(TABLE)
SAVE = slots.size(N) + N + slots.HEADER.size  # bytes that a save erases and writes


def state(k: int) -> bytes:
  """The state after k saves."""
  return np.random.default_rng(k).bytes(N)


def first() -> bytes:
  return slots.pack(TABLE, LEAVES)


def test_struct_is_that_of_c():
  block = slots.struct_of(TABLE, LEAVES)
  assert slots.offsets(TABLE) == [0, 4, 24] and len(block) == N
  packed = slots.leaves_of(TABLE, block)
  assert packed == b'\1\0\1' + LEAVES[1].tobytes() + LEAVES[2].tobytes()


def test_a_flash_of_another_learner_is_none():
  assert slots.newest(first(), KIND, N) == (0, 1, 0, slots.struct_of(TABLE, LEAVES))
  assert slots.kind([*TABLE[:2], {**TABLE[2], 'dtype': 'int32'}]) != KIND
  assert slots.newest(first(), KIND + 1, N) is None
  assert slots.newest(b'\xff' * 2 * slots.size(N), KIND, N) is None


@settings(max_examples=300, deadline=None)
@given(cut=st.integers(0, SAVE), noise=st.binary(min_size=0, max_size=9), newer=st.booleans())
def test_a_torn_slot_is_passed_over_by_this_machine(cut, noise, newer):
  """As flash is left by a save in `slots_save`'s order, with garbage where the power went."""
  slot = int(newer)
  flash = bytearray(first() if slot else first()[slots.size(N) :] + first()[: slots.size(N)])
  old = slots.newest(bytes(flash), KIND, N)
  assert old is not None and old.slot != slot
  at, new = slot * slots.size(N), slots.sealed(KIND, 2, 99, state(1))
  flash[at : at + slots.size(N)] = b'\x5a' * slots.size(N)  # an old state, or anything
  work = [(at + i, 0xFF) for i in range(slots.size(N))]
  work += [(at + slots.AHEAD + i, b) for i, b in enumerate(state(1))]
  work += [(at + i, b) for i, b in enumerate(new[: slots.HEADER.size])]
  assert len(work) == SAVE
  for where, value in work[:cut]:
    flash[where] = value
  for (where, value), other in zip(work[cut:], noise, strict=False):
    flash[where] = value ^ other
  found = slots.newest(bytes(flash), KIND, N)
  whole = bytes(flash[at : at + slots.AHEAD - 12]) == new[: slots.AHEAD - 12]
  whole &= bytes(flash[at + slots.AHEAD : at + slots.AHEAD + N]) == state(1)
  assert found == ((slot, 2, 99, state(1)) if whole else old)
  assert whole or cut < SAVE


# --- the C, with a flash in this process ------------------------------------------------------------

BOARD = r"""
#include <setjmp.h>
#include <string.h>
#include "slots.h"
/* A flash that only an erase sets bits in, and whose power goes after `left` bytes. */
unsigned char flash[2 * SIZE];
static long left, bad = -1; /* a byte that keeps what it is */
static int faults, noise;
static jmp_buf dark;
static void lit(uint32_t at, unsigned char value) {
  if (left == 0) {
    flash[at] = noise ? (unsigned char)(value ^ 0xa5) : flash[at];
    longjmp(dark, 1);
  }
  left -= left > 0;
  if ((long)at != bad) flash[at] = value;
}
void wear(long at) { bad = at; }
void flash_read(uint32_t at, void *to, size_t n) { memcpy(to, flash + at, n); }
void flash_erase(uint32_t at, size_t n) { for (size_t i = 0; i < n; i++) lit(at + (uint32_t)i, 0xff); }
void flash_write(uint32_t at, const void *from, size_t n) {
  for (size_t i = 0; i < n; i++) {
    const unsigned char value = ((const unsigned char *)from)[i];
    if (flash[at + i] != 0xff) faults++; /* not erased */
    lit(at + (uint32_t)i, value);
  }
}
/* Loads, checks nothing, saves `state` with power for so many bytes: 0 no slot, 1 saved, 2 dark, 3 worn. */
int turn(unsigned char *state, slots *s, unsigned char *found, size_t n, long power, int garbage) {
  left = -1, noise = garbage, faults = 0;
  if (!slots_load(s, found, n)) return 0;
  left = power;
  if (setjmp(dark)) return 2;
  return slots_save(s, state, n, s->header.position + 5) ? 1 : 3;
}
int misused(void) { return faults; }
"""


class Slots(ctypes.Structure):
  _fields_ = [  # noqa: RUF012 (ctypes wants it so)
    (name, ctypes.c_uint32) for name in ('kind', 'sequence', 'position', 'bytes', 'crc', 'slot')
  ]


@pytest.fixture(scope='module')
def board(tmp_path_factory):
  if not shutil.which('gcc'):
    pytest.skip('needs a C compiler: gcc is not installed')
  folder = tmp_path_factory.mktemp('slots')
  for name, text in slots.files(TABLE).items():
    (folder / name).write_text(text)
  (folder / 'board.c').write_text(BOARD + 'int flash_open(void) { return 1; }\n')
  words = [
    *FLAGS,
    f'-DSIZE={slots.size(N)}',
    '-shared',
    '-fPIC',
    'board.c',
    'slots.c',
    '-o',
    'board.so',
  ]
  subprocess.run(['gcc', *words], cwd=folder, check=True)
  return ctypes.CDLL(str(folder / 'board.so'))


def test_c_finds_the_newest_whole_state_wherever_the_power_goes(board):
  """Every byte of a save, from either slot, with and without garbage; then the next save works."""
  flash = (ctypes.c_ubyte * (2 * slots.size(N))).in_dll(board, 'flash')
  found = (ctypes.c_ubyte * N)()
  now = Slots()

  def turn(new: bytes, power: int, noise: int = 0) -> int:
    given_ = (ctypes.c_ubyte * N).from_buffer_copy(new)
    return board.turn(given_, ctypes.byref(now), found, N, ctypes.c_long(power), noise)

  def put(data: bytes) -> None:
    flash[:] = list(data)

  put(first())
  assert turn(state(1), -1) == 1 and board.misused() == 0
  one = bytes(flash)
  assert slots.newest(one, KIND, N) == (1, 2, 5, state(1))
  header = slots.HEADER.unpack_from(one, slots.size(N))
  assert header[4] == zlib.crc32(state(1), zlib.crc32(one[slots.size(N) :][:16]))
  for begin, was in ((first(), slots.struct_of(TABLE, LEAVES)), (one, state(1))):
    held = slots.newest(begin, KIND, N)
    assert held is not None
    for cut in range(SAVE):
      put(begin)
      assert turn(state(2), cut, cut % 2) == 2
      torn = bytes(flash)
      assert slots.newest(torn, KIND, N) == held, cut
      assert turn(state(2), -1) == 1 and board.misused() == 0
      assert bytes(found) == was, cut
      assert slots.newest(bytes(flash), KIND, N) == (
        1 - held.slot,
        held.sequence + 1,
        held.position + 5,
        state(2),
      )
    put(begin)
    assert turn(state(2), SAVE) == 1


@settings(max_examples=60, deadline=None)
@given(powers=st.lists(st.one_of(st.integers(0, SAVE), st.just(-1)), min_size=1, max_size=12))
def test_c_never_loses_more_than_the_save_that_was_cut(board, powers):
  """Cuts one after the other: what is there is always the state of the last save that came to its end."""
  flash = (ctypes.c_ubyte * (2 * slots.size(N))).in_dll(board, 'flash')
  flash[:] = list(first())
  found, now, last = (ctypes.c_ubyte * N)(), Slots(), slots.struct_of(TABLE, LEAVES)
  for k, power in enumerate(powers):
    new = (ctypes.c_ubyte * N).from_buffer_copy(state(k))
    code = board.turn(new, ctypes.byref(now), found, N, ctypes.c_long(power), k % 2)
    assert bytes(found) == last
    assert code == (2 if 0 <= power < SAVE else 1)
    last = state(k) if code == 1 else last
    there = slots.newest(bytes(flash), KIND, N)
    assert there is not None and there.state == last


@pytest.mark.parametrize('slot', [0, 1])
def test_flash_that_keeps_nothing_is_no_save(board, slot):
  """Each byte of the header and of the state, worn out: the save says so and the older slot stays the one."""
  flash = (ctypes.c_ubyte * (2 * slots.size(N))).in_dll(board, 'flash')
  begin = first() if slot else first()[slots.size(N) :] + first()[: slots.size(N)]
  held = slots.newest(begin, KIND, N)
  found, now = (ctypes.c_ubyte * N)(), Slots()
  new = (ctypes.c_ubyte * N).from_buffer_copy(state(3))
  seal = [*range(slots.HEADER.size), *range(slots.AHEAD, slots.AHEAD + N)]
  for at in seal:
    flash[:] = list(begin)
    flash[slot * slots.size(N) + at] ^= 0x5A  # what it keeps is nothing that would be right
    board.wear(ctypes.c_long(slot * slots.size(N) + at))
    try:
      for _ in range(2):  # the next save must not go to the slot that is left
        code = board.turn(new, ctypes.byref(now), found, N, ctypes.c_long(-1), 0)
        written = slots.sealed(KIND, now.sequence + 1, now.position + 5, state(3))
        kept = flash[slot * slots.size(N) + at]
        assert (code == 3) == (kept != written[at]), at
        if code == 3:
          assert slots.newest(bytes(flash), KIND, N) == held, at
    finally:
      board.wear(ctypes.c_long(-1))
