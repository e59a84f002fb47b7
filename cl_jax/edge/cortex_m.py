"""A bare Cortex-M: the agent's port for it, and the linker script that holds it to its memory."""

from __future__ import annotations

from collections.abc import Sequence

PORT = r"""/* The port for a bare Cortex-M: start-up; in.bin and out.bin through semihosting. */
#include "port.h"

extern uint32_t load_data, begin_data, end_data, begin_bss, end_bss, begin_stack, end_stack;
int main(void);
static int32_t files[2]; /* in, out */
static int32_t flash;

/* GCC calls these by name, also in freestanding code. */
void *memcpy(void *restrict to, const void *restrict from, size_t n) {
  unsigned char *d = to;
  const unsigned char *s = from;
  while (n--) *d++ = *s++;
  return to;
}

void *memmove(void *to, const void *from, size_t n) {
  unsigned char *d = to;
  const unsigned char *s = from;
  if (d < s) while (n--) *d++ = *s++;
  else while (n--) d[n] = s[n];
  return to;
}

void *memset(void *to, int value, size_t n) {
  unsigned char *d = to;
  while (n--) *d++ = (unsigned char)value;
  return to;
}

static int32_t semihost(int32_t operation, const void *argument) {
  register int32_t r0 __asm__("r0") = operation;
  register const void *r1 __asm__("r1") = argument;
  __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
  return r0;
}

static void leave(int32_t code) {
  const uint32_t block[2] = {0x20026, (uint32_t)code};
  semihost(0x20, block);
  for (;;) {}
}

static int32_t open_file(const char *name, uint32_t mode, uint32_t length) {
  const uint32_t block[3] = {(uint32_t)name, mode, length};
  return semihost(0x01, block);
}

int port_open(void) {
  files[0] = open_file("in.bin", 1, 6);
  files[1] = open_file("out.bin", 5, 7);
  return files[0] != -1 && files[1] != -1;
}

int port_read(void *to, size_t n) {
  const uint32_t block[3] = {(uint32_t)files[0], (uint32_t)to, n};
  return semihost(0x06, block) == 0;
}

void port_write(const void *from, size_t n) {
  const uint32_t block[3] = {(uint32_t)files[1], (uint32_t)from, n};
  semihost(0x05, block);
}

void port_say(const char *label, uint64_t value, int digits) {
  char text[48];
  int n = 0;
  while (*label) text[n++] = *label++;
  while (digits--) text[n++] = "0123456789abcdef"[(value >> (4 * digits)) & 15];
  text[n++] = '\n';
  text[n] = 0;
  semihost(0x04, text);
}

void port_close(uint64_t hash) {
  const uint32_t *p = &begin_stack;
  while (p < &end_stack && *p == 0x5afe5afeu) p++;
  port_say("hash ", hash, 16);
  port_say("stack ", (uint64_t)((&end_stack - p) * 4), 8);
  const uint32_t block = (uint32_t)files[1];
  semihost(0x02, &block);
}

static int seek_to(int32_t file, uint32_t at) {
  const uint32_t block[2] = {(uint32_t)file, at};
  return semihost(0x0A, block) == 0;
}

int port_skip(uint32_t n) { return seek_to(files[0], n); }

int port_flash_open(uint32_t *power) {
  const int32_t supply = open_file("power.bin", 1, 9);
  if (supply != -1) {
    const uint32_t block[3] = {(uint32_t)supply, (uint32_t)power, sizeof *power};
    if (semihost(0x06, block)) return 0;
  }
  flash = open_file("flash.bin", 3, 9);
  return flash != -1;
}

void port_fetch(uint32_t at, void *to, size_t n) {
  const uint32_t block[3] = {(uint32_t)flash, (uint32_t)to, n};
  if (!seek_to(flash, at) || semihost(0x06, block)) leave(12);
}

void port_store(uint32_t at, const void *from, size_t n) {
  const uint32_t block[3] = {(uint32_t)flash, (uint32_t)from, n};
  if (!seek_to(flash, at) || semihost(0x05, block)) leave(12);
}

void port_dark(void) { leave(8); }

void reset(void) {
  *(volatile uint32_t *)0xE000ED88 |= 0xFu << 20; /* the floating-point unit */
  __asm__ volatile("dsb\nisb");
  const uint32_t *from = &load_data;
  for (uint32_t *to = &begin_data; to < &end_data;) *to++ = *from++;
  for (uint32_t *to = &begin_bss; to < &end_bss;) *to++ = 0;
  uint32_t *top;
  __asm__ volatile("mov %0, sp" : "=r"(top));
  for (uint32_t *to = &begin_stack; to < top - 16;) *to++ = 0x5afe5afeu; /* to see how deep it gets */
  leave(main());
}

static void fault(void) {
  semihost(0x04, "fault\n");
  leave(9);
}

__attribute__((section(".vectors"), used)) static void *const vectors[16] = {
  &end_stack, (void *)reset, (void *)fault, (void *)fault, (void *)fault, (void *)fault, (void *)fault, 0,
  0, 0, 0, (void *)fault, (void *)fault, 0, (void *)fault, (void *)fault,
};
"""

# The stack comes first: what is deeper than planned faults below the memory instead of writing over state.
SCRIPT = """/* The memory of the device. The linker refuses what does not fit. */
MEMORY {
  FLASH (rx) : ORIGIN = 0x00000000, LENGTH = @FLASH@
  RAM (rw) : ORIGIN = 0x20000000, LENGTH = @RAM@
  EXTERNAL (rw) : ORIGIN = @ORIGIN@, LENGTH = @LENGTH@
}
ENTRY(reset)
SECTIONS {
  .text : { KEEP(*(.vectors)) *(.text*) *(.rodata*) } > FLASH
  .stack (NOLOAD) : { begin_stack = .; . += @STACK@; end_stack = .; } > RAM
  .data : SUBALIGN(8) { begin_data = .; *(.data*) end_data = .; } > RAM AT > FLASH
  load_data = LOADADDR(.data);
  .external (NOLOAD) : { *(.bss.external) } > EXTERNAL
  .bss (NOLOAD) : SUBALIGN(8) { begin_bss = .; *(.bss*) *(COMMON) . = ALIGN(8); end_bss = .; } > RAM
  /DISCARD/ : { *(.ARM.exidx*) *(.ARM.attributes) *(.comment) }
}
"""


def script(ram: int, flash: int, stack: int, external: Sequence[int]) -> str:
  """The linker script of a bare Cortex-M with so much memory."""
  text = SCRIPT
  origin, length = external
  for key, value in (
    ('RAM', ram), ('FLASH', flash), ('STACK', -(-stack // 8) * 8), ('ORIGIN', origin),
    ('LENGTH', length),
  ):  # fmt: skip
    text = text.replace(f'@{key}@', hex(value) if key == 'ORIGIN' else str(value))
  return text
