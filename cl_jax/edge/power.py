"""A device that is switched on and off: boots of `device.c` whose flash and power supply are files."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from cl_jax.edge import device, emulate, slots
from cl_jax.edge.targets import Target
from cl_jax.edge.toolchain import Image
from cl_jax.errors import Fault

TIMEOUT = 3600.0


class Boot(NamedTuple):
  """What was left when the device was off again.

  Attributes:
    dark: whether the power went before it was done.
    flash: its contents.
    out: losses and logits, since this boot.
    slot, sequence, position: of the state that it began with.
    hash: of the state at the end, '' where the power went.
    stack: bytes that were touched; None with an operating system or where the power went.
  """

  dark: bool
  flash: bytes
  out: bytes
  slot: int
  sequence: int
  position: int
  hash: str
  stack: int | None


def boot(
  image: Image, target: Target, flash: bytes, stream: bytes, power: int | None = None
) -> Boot:
  """Switches the device on; it learns until the stream ends, or the power goes.

  Args:
    image: of the program `device`; see `toolchain.build`.
    target: of the image.
    flash: its contents, as `slots.pack` or an earlier boot left them.
    stream: see `emulate.stream_of`; always the whole one.
    power: bytes of flash that can be erased or written until the power goes; None = it stays.

  Raises:
    Fault: the program failed otherwise.
  """
  place = image.path.parent
  (place / 'flash.bin').write_bytes(flash)
  (place / 'power.bin').unlink(missing_ok=True)
  if power is not None:
    (place / 'power.bin').write_bytes(struct.pack('<I', power))
  code, out, said = emulate.call(image, target, stream, timeout=TIMEOUT)
  left = (place / 'flash.bin').read_bytes()
  for name in ('flash.bin', 'power.bin'):
    (place / name).unlink(missing_ok=True)
  if code not in (0, device.DARK):
    raise Fault(emulate.failure(target, 'device', code, said))
  word = lambda label, base: emulate.word(said, label, base)  # noqa: E731
  ended = word('hash', 16)
  return Boot(
    code == device.DARK,
    left,
    out,
    word('slot', 10) or 0,
    word('sequence', 16) or 0,
    word('position', 16) or 0,
    '' if ended is None else f'{ended:016x}',
    word('stack', 16),
  )


def moments(n: int, saves: int) -> list[tuple[str, int]]:
  """(what happens then, bytes of power): moments to cut a save of a state of n bytes, one save after another.

  A save erases a slot, writes n bytes of state, and seals them with a header.
  """
  erased, whole = slots.size(n), slots.size(n) + n + slots.HEADER.size
  within = (
    ('half of the slot is erased', erased // 2),
    ('nothing is written yet', erased),
    ('half of the state is written', erased + n // 2),
    ('the last byte of the state is missing', erased + n - 1),
    ('half of the header is written', erased + n + slots.HEADER.size // 2),
    ('the last byte of the header is missing', whole - 1),
  )
  return [
    (f'save {k % saves + 1}: {name}', k % saves * whole + at) for k, (name, at) in enumerate(within)
  ]


def lasting(
  image: Image, target: Target, flash: bytes, stream: bytes, powers: Sequence[int]
) -> list[Boot]:
  """Boots one after the other, each with so much power, and at last one whose power stays."""
  boots = []
  for power in (*powers, None):
    boots.append(boot(image, target, boots[-1].flash if boots else flash, stream, power))
    if not boots[-1].dark:
      break
  return boots
