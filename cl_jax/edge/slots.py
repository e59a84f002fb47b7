"""A state in flash that survives a power cut: two slots, a sequence number and a CRC, in C and in Python.

A save erases and writes the slot that does not hold the newest whole state: first the state, then, as its
seal, a header with the CRC-32 of both. Wherever the power goes, the other slot is untouched; a torn one has
no CRC that fits and is passed over. Nothing is copied in RAM. The C is what the device runs; `pack` makes its
first flash, `newest` reads one on this machine.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cl_jax.edge.arena import BYTES
from cl_jax.edge.artefact import pack as packed
from cl_jax.edge.c99_file import MLIR
from cl_jax.edge.ram import struct_bytes

HEADER = struct.Struct('<5I')  # as `slots_header` in C
AHEAD = (
  32  # bytes of a slot before its state: a word of flash, so that the seal is a write of its own
)
PAGE = 4096  # a slot is whole pages of so many bytes: flash is erased by pages

SOURCE = r"""/* Two slots in flash: the state of a save that was cut short is never the only one. */
#include "slots.h"

/* CRC-32 of IEEE 802.3 (zlib's), half a byte at a time. */
static uint32_t crc32(uint32_t crc, const void *data, size_t n) {
  static const uint32_t table[16] = {
    0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,
    0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c,
  };
  const unsigned char *p = data;
  crc = ~crc;
  while (n--) {
    crc ^= *p++;
    crc = crc >> 4 ^ table[crc & 15];
    crc = crc >> 4 ^ table[crc & 15];
  }
  return ~crc;
}

/* The seal of a slot: over the header, without the CRC itself, and the state. */
static uint32_t seal(const slots_header *h, const void *state) {
  return crc32(crc32(0, h, offsetof(slots_header, crc)), state, h->bytes);
}

static uint32_t size_of_slot(size_t n) {
  return (uint32_t)((SLOTS_AHEAD + n + SLOTS_PAGE - 1) / SLOTS_PAGE * SLOTS_PAGE);
}

static int ours(const slots_header *h, size_t n) { return h->kind == SLOTS_KIND && h->bytes == n; }

/* Reads the newest whole state; 0 where neither slot holds one. */
int slots_load(slots *s, void *state, size_t n) {
  slots_header h[2];
  for (uint32_t k = 0; k < 2; k++) flash_read(k * size_of_slot(n), &h[k], sizeof h[k]);
  const uint32_t newer = !ours(&h[0], n) || (ours(&h[1], n) && h[1].sequence > h[0].sequence);
  for (uint32_t i = 0; i < 2; i++) {
    const uint32_t k = newer ^ i;
    if (!ours(&h[k], n)) continue;
    flash_read(k * size_of_slot(n) + SLOTS_AHEAD, state, n);
    if (seal(&h[k], state) != h[k].crc) continue; /* torn */
    s->header = h[k];
    s->slot = k;
    return 1;
  }
  return 0;
}

/* Saves into the other slot; 0 where what is read back is not what was written, and the old slot stays. */
int slots_save(slots *s, const void *state, size_t n, uint32_t position) {
  const uint32_t at = !s->slot * size_of_slot(n);
  slots_header h = {SLOTS_KIND, s->header.sequence + 1, position, (uint32_t)n, 0};
  h.crc = seal(&h, state);
  flash_erase(at, size_of_slot(n));
  flash_write(at + SLOTS_AHEAD, state, n);
  flash_write(at, &h, sizeof h);
  unsigned char back[64];
  flash_read(at, back, sizeof h);
  if (crc32(0, back, sizeof h) != crc32(0, &h, sizeof h)) return 0;
  uint32_t crc = crc32(0, back, offsetof(slots_header, crc));
  for (size_t i = 0; i < n;) {
    const size_t m = n - i < sizeof back ? n - i : sizeof back;
    flash_read(at + SLOTS_AHEAD + (uint32_t)i, back, m);
    crc = crc32(crc, back, m);
    i += m;
  }
  if (crc != h.crc) return 0;
  s->header = h;
  s->slot = !s->slot;
  return 1;
}
"""

INCLUDE = r"""/* Two slots in flash for the state; see slots.c. */
#ifndef SLOTS_H
#define SLOTS_H
#include <stddef.h>
#include <stdint.h>

#define SLOTS_KIND @KIND@u /* the layout of the state: the CRC of the table of its leaves */
#define SLOTS_AHEAD @AHEAD@u
#define SLOTS_PAGE @PAGE@u

typedef struct {
  uint32_t kind, sequence; /* a save has the number after the last one's */
  uint32_t position;       /* bytes of the stream that the state has learnt from */
  uint32_t bytes;          /* of the state */
  uint32_t crc;
} slots_header;

/* The slot that holds the newest whole state. */
typedef struct {
  slots_header header;
  uint32_t slot;
} slots;

int slots_load(slots *s, void *state, size_t n);
int slots_save(slots *s, const void *state, size_t n, uint32_t position);

/* What the board has to give. A write goes to bytes that were erased before. */
int flash_open(void);
void flash_read(uint32_t at, void *to, size_t n);
void flash_erase(uint32_t at, size_t n);
void flash_write(uint32_t at, const void *from, size_t n);

#endif
"""


class Saved(NamedTuple):
  """A whole slot: its number, its save's number, bytes of the stream that were learnt, the struct's bytes."""

  slot: int
  sequence: int
  position: int
  state: bytes


def files(state: Sequence[Mapping[str, Any]]) -> dict[str, str]:
  """slots.c and slots.h for a learner; `state` is the manifest's table."""
  text = INCLUDE
  for key, value in (('KIND', hex(kind(state))), ('AHEAD', str(AHEAD)), ('PAGE', str(PAGE))):
    text = text.replace(f'@{key}@', value)
  return {'slots.c': SOURCE, 'slots.h': text}


def kind(state: Sequence[Mapping[str, Any]]) -> int:
  """A number for the layout of a state: one with other leaves is not loaded."""
  return zlib.crc32(';'.join(f'{a["name"]} {a["dtype"]} {a["bytes"]}' for a in state).encode())


def size(n: int) -> int:
  """Bytes of a slot for a state of n: whole pages."""
  return -(-(AHEAD + n) // PAGE) * PAGE


def sealed(kind: int, sequence: int, position: int, state: bytes) -> bytes:
  """A slot with a state in it."""
  words = (kind, sequence, position, len(state))
  crc = zlib.crc32(state, zlib.crc32(struct.pack('<4I', *words)))
  whole = HEADER.pack(*words, crc).ljust(AHEAD, b'\xff') + state
  return whole.ljust(size(len(state)), b'\xff')


def pack(state: Sequence[Mapping[str, Any]], leaves: Sequence[np.ndarray]) -> bytes:
  """The flash of a device that was never on: the first state in slot 0, slot 1 erased."""
  slot = sealed(kind(state), 1, 0, struct_of(state, leaves))
  return slot + b'\xff' * len(slot)


def newest(flash: bytes, kind: int, n: int) -> Saved | None:
  """The newest whole state in a flash, as `slots_load` finds it; None where there is none."""
  found = []
  for k in (0, 1):
    slot = flash[k * size(n) : (k + 1) * size(n)]
    header = HEADER.unpack_from(slot)
    state = slot[AHEAD : AHEAD + n]
    if header[0] == kind and header[3] == n:
      if zlib.crc32(state, zlib.crc32(slot[: HEADER.size - 4])) == header[4]:
        found.append(Saved(k, header[1], header[2], state))
  return max(found, key=lambda s: s.sequence, default=None)


def struct_of(state: Sequence[Mapping[str, Any]], leaves: Sequence[np.ndarray]) -> bytes:
  """The leaves as the C struct of the state has them, little-endian, zeros between them."""
  out = bytearray()
  for at, a in zip(offsets(state), leaves, strict=True):
    out += bytes(at - len(out)) + packed([a])
  return bytes(out.ljust(struct_bytes(state), b'\0'))


def leaves_of(state: Sequence[Mapping[str, Any]], block: bytes) -> bytes:
  """The packed leaves (see `artefact.pack`) of a struct."""
  return b''.join(
    block[at : at + leaf['bytes']] for leaf, at in zip(state, offsets(state), strict=True)
  )


def offsets(state: Sequence[Mapping[str, Any]]) -> list[int]:
  """Where each leaf is in the struct."""
  found, at = [], 0
  for leaf in state:
    width = BYTES[MLIR[leaf['dtype']]]
    at = -(-at // width) * width
    found.append(at)
    at += max(leaf['bytes'], width)
  return found
