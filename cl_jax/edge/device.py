"""The program of a device that learns from a stream and is switched off at any moment: `device.c`.

Unlike `agent.c` it gets no state: it boots from flash (see `slots`), goes on in the stream where the newest
whole state had come to, saves after every DEVICE_EVERY calls and at the end, and tells what it did. Its flash
is a file, and so is its power supply: power.bin holds the number of bytes that can still be erased or written
before the power goes, in the middle of whatever is being done then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cl_jax.edge import agent, ram, slots

RAM = 2 * 8 + 24  # flash.c's two words, the handle of its file, and `slots`
DARK = 8  # the exit code of a power cut

DEVICE = r"""/* Boots from flash, learns from the stream, saves. Generated. */
#include "NAME.h"
#include "port.h"
#include "slots.h"

#ifndef DEVICE_EVERY
#define DEVICE_EVERY 100 /* calls between two saves */
#endif

static NAME_state device_state;
BUFFERS
static float output[OUTPUTS];
static slots saved;

static int take(void *to, size_t n) { return !n || port_read(to, n); }

static int save(uint32_t position) {
  const int whole = slots_save(&saved, &device_state, sizeof device_state, position);
  port_say(whole ? "saved " : "worn ", saved.header.sequence, 8);
  return whole;
}

int main(void) {
  unsigned char part;
  if (!port_open() || !flash_open()) return 4;
  if (!slots_load(&saved, &device_state, sizeof device_state)) return 10;
  uint32_t position = saved.header.position;
  port_say("slot ", saved.slot, 1);
  port_say("sequence ", saved.header.sequence, 8);
  port_say("position ", position, 8);
  if (!port_skip(position)) return 5;
  for (uint32_t calls = 1; port_read(&part, 1); calls++) {
    position += 1;
    if (part == 's') {
      if (!(TAKE_BATCH)) return 6;
      NAME_step(&device_state, BATCH, output);
      port_write(output, sizeof output[0]);
      position += BATCH_BYTES;
    } else if (part == 'p') {
      if (!(TAKE_BATCH)) return 6;
      NAME_predict(&device_state, BATCH, output);
      port_write(output, LOGITS * sizeof output[0]);
      position += BATCH_BYTES;
BOUNDARY
    } else return 7;
    if (calls % DEVICE_EVERY == 0 && !save(position)) return 11;
  }
  if (position != saved.header.position && !save(position)) return 11;
  uint64_t hash = 14695981039346656037u; /* FNV-1a of the leaves in order */
  for (int k = 0; k < PREFIX_LEAVES; k++) {
    const unsigned char *p = (const unsigned char *)&device_state + NAME_leaves[k].offset;
    for (size_t i = 0; i < NAME_leaves[k].bytes; i++) hash = (hash ^ p[i]) * 1099511628211u;
  }
  port_close(hash);
  return 0;
}
"""

FLASH = r"""/* Flash memory in a file, and a power supply that can fail. Replace it by a flash driver. */
#include "port.h"
#include "slots.h"

static uint32_t left; /* bytes until the power goes */

int flash_open(void) {
  left = 0xffffffff;
  return port_flash_open(&left);
}

void flash_read(uint32_t at, void *to, size_t n) { port_fetch(at, to, n); }

void flash_write(uint32_t at, const void *from, size_t n) {
  const size_t lit = n < left ? n : left;
  if (lit) port_store(at, from, lit);
  if (left != 0xffffffff) left -= (uint32_t)lit;
  if (lit < n) port_dark();
}

void flash_erase(uint32_t at, size_t n) {
  unsigned char blank[64];
  for (size_t i = 0; i < sizeof blank; i++) blank[i] = 0xff;
  for (size_t i = 0; i < n; i += sizeof blank)
    flash_write(at + (uint32_t)i, blank, n - i < sizeof blank ? n - i : sizeof blank);
}
"""


def files(manifest: Mapping[str, Any]) -> dict[str, str]:
  """device.c, flash.c, slots.c and slots.h for a learner."""
  batch = sum(ram.leaf_bytes(leaf) for leaf in manifest['batch'])
  ends = sum(ram.leaf_bytes(leaf) for leaf in manifest['ends'])
  text = DEVICE.replace('BATCH_BYTES', str(batch))
  text = agent.filled(text, manifest, 'device_state', f'\n      position += {ends};')
  return {'device.c': text, 'flash.c': FLASH, **slots.files(manifest['state'])}


def needed(manifest: Mapping[str, Any]) -> int:
  """Bytes of RAM of the device's image: those of the agent's, and of saving."""
  return sum(manifest['ram_bytes'].values()) + RAM
