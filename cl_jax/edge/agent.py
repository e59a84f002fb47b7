"""The program around a learner: one `agent.c` for every target, and a small port for each kind of machine.

It reads the state's leaves, then calls until its input ends, and writes what they return and at last the
leaves again. A call is a byte, 's' (step), 'b' (boundary) or 'p' (predict), and the arrays that it takes.
Files come through the C library where there is one, through semihosting (a debugger's, or the emulator's) on
a Cortex-M. Replace the port by a sensor and a flash driver and the same agent is an application.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cl_jax.edge import cortex_m
from cl_jax.edge.c99_expr import ctype
from cl_jax.edge.c99_file import MLIR, identifiers
from cl_jax.edge.learner import Leaf

AGENT = r"""/* Reads the state, then calls until the input ends; writes results and the state. Generated. */
#include "NAME.h"
#include "port.h"

static NAME_state agent_state;
BUFFERS
static float output[OUTPUTS];

static int take(void *to, size_t n) { return !n || port_read(to, n); }

int main(void) {
  unsigned char part;
  uint64_t hash = 14695981039346656037u; /* FNV-1a of the leaves in order */
  if (!port_open()) return 4;
  for (int k = 0; k < PREFIX_LEAVES; k++)
    if (!take((char *)&agent_state + NAME_leaves[k].offset, NAME_leaves[k].bytes)) return 5;
  while (port_read(&part, 1)) {
    if (part == 's') {
      if (!(TAKE_BATCH)) return 6;
      NAME_step(&agent_state, BATCH, output);
      port_write(output, sizeof output[0]);
    } else if (part == 'p') {
      if (!(TAKE_BATCH)) return 6;
      NAME_predict(&agent_state, BATCH, output);
      port_write(output, LOGITS * sizeof output[0]);
BOUNDARY
    } else return 7;
  }
  for (int k = 0; k < PREFIX_LEAVES; k++) {
    const unsigned char *p = (const unsigned char *)&agent_state + NAME_leaves[k].offset;
    for (size_t i = 0; i < NAME_leaves[k].bytes; i++) hash = (hash ^ p[i]) * 1099511628211u;
    port_write(p, NAME_leaves[k].bytes);
  }
  port_close(hash);
  return 0;
}
"""

PORT = r"""/* What the agent asks of a machine. */
#ifndef PORT_H
#define PORT_H
#include <stddef.h>
#include <stdint.h>

/* Where a boundary's examples are: outside of the budget, if the machine has such a place. */
#ifdef PORT_BARE
#define PORT_EXTERNAL __attribute__((section(".bss.external")))
#else
#define PORT_EXTERNAL
#endif

int port_open(void);                       /* whether there is input */
int port_read(void *to, size_t n);         /* whether there were n bytes */
void port_write(const void *from, size_t n);
void port_close(uint64_t hash);            /* reports the hash of the state */

/* What device.c asks for as well. */
int port_skip(uint32_t n);                 /* passes over n bytes of the input */
void port_say(const char *label, uint64_t value, int digits);
int port_flash_open(uint32_t *power);      /* the flash, and how long the power lasts where that is known */
void port_fetch(uint32_t at, void *to, size_t n);
void port_store(uint32_t at, const void *from, size_t n);
void port_dark(void);                      /* the power goes: ends the program with code 8 */

#endif
"""

HOSTED = r"""/* The port for a machine with a C library: standard input and output. */
#include <stdio.h>
#include <stdlib.h>
#include "port.h"

static FILE *flash;

int port_open(void) { return 1; }

int port_read(void *to, size_t n) { return fread(to, 1, n, stdin) == n; }

void port_write(const void *from, size_t n) { fwrite(from, 1, n, stdout); }

void port_say(const char *label, uint64_t value, int digits) {
  fprintf(stderr, "%s%0*llx\n", label, digits, (unsigned long long)value);
}

void port_close(uint64_t hash) { port_say("hash ", hash, 16); }

int port_skip(uint32_t n) {
  while (n && getchar() != EOF) n--;
  return !n;
}

int port_flash_open(uint32_t *power) {
  FILE *supply = fopen("power.bin", "rb");
  if (supply) {
    if (fread(power, sizeof *power, 1, supply) != 1) return 0;
    fclose(supply);
  }
  flash = fopen("flash.bin", "r+b");
  return flash != NULL;
}

void port_fetch(uint32_t at, void *to, size_t n) {
  if (fseek(flash, (long)at, SEEK_SET) || fread(to, 1, n, flash) != n) exit(12);
}

void port_store(uint32_t at, const void *from, size_t n) {
  if (fseek(flash, (long)at, SEEK_SET) || fwrite(from, 1, n, flash) != n) exit(12);
}

void port_dark(void) { exit(8); }
"""


def files(manifest: Mapping[str, Any]) -> dict[str, str]:
  """agent.c, port.h and the two ports for a learner."""
  return {
    'agent.c': filled(AGENT, manifest, 'agent_state'),
    'port.h': PORT,
    'port_hosted.c': HOSTED,
    'port_cortex_m.c': cortex_m.PORT,
  }


def filled(text: str, manifest: Mapping[str, Any], state: str, after: str = '') -> str:
  """A program's text with a learner's names, buffers and calls in it.

  Args:
    text: with BUFFERS, BOUNDARY, TAKE_BATCH, BATCH, OUTPUTS, LOGITS, PREFIX and NAME for what differs.
    manifest: of the learner.
    state: the name of the program's state.
    after: what follows the call of the boundary.
  """
  ends = manifest['ends'] if 'boundary' in manifest['macs'] else []
  buffers, calls, takes = [], {}, {}
  for kind, table, place in (('batch', manifest['batch'], ''), ('ends', ends, ' PORT_EXTERNAL')):
    leaves = [Leaf(**{**leaf, 'shape': tuple(leaf['shape'])}) for leaf in table]
    names = [f'{kind}_{name}' for name in identifiers(leaves)]
    for name, leaf in zip(names, leaves, strict=True):
      n = max(math.prod(leaf.shape), 1)
      buffers.append(f'static {ctype(MLIR[leaf.dtype])} {name}[{n}]{place};')
    calls[kind] = ', '.join(names)
    takes[kind] = ' && '.join(f'take({name}, sizeof {name})' for name in names)
  boundary = ''
  if ends:
    boundary = (
      f"    }} else if (part == 'b') {{\n      if (!({takes['ends']})) return 6;\n"
      f'      NAME_boundary(&{state}, {calls["ends"]});{after}'
    )
  for key, value in (
    ('BUFFERS', '\n'.join(buffers)),
    ('BOUNDARY\n', boundary and f'{boundary}\n'),
    ('TAKE_BATCH', takes['batch']),
    ('BATCH', calls['batch']),
    ('OUTPUTS', str(max(manifest['outputs'], 1))),
    ('LOGITS', str(manifest['outputs'])),
    ('PREFIX', manifest['name'].upper()),
    ('NAME', manifest['name']),
  ):
    text = text.replace(key, value)
  return text
