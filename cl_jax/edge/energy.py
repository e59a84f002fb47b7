"""Energy of a training step: an ESTIMATE from operation counts, not a measurement.

  E = MACs * e_mac(dtype) + bytes * e_mem(level)

Static power is left out, since it needs a latency and emulators have none. Every byte of the state, of the
step's part of the arena and of the batch counts once.
"""

from __future__ import annotations

from typing import NamedTuple

SOURCE = 'M. Horowitz, "Computing\'s energy problem (and what we can do about it)", ISSCC 2014, 45 nm, 0.9 V'


class Constant(NamedTuple):
  """Picojoules of one operation.

  Attributes:
    pj: the figure; None where we have no source for it.
    factor: the true figure of a given chip is taken to lie within pj / factor and pj * factor. Our own
      judgement for another 45 nm design: the source gives rough values without an interval, and other
      processes differ by more.
    source: where it is from.
  """

  pj: float | None
  factor: float | None
  source: str


def _known(pj: float) -> Constant:
  return Constant(pj, 2.0, SOURCE)


UNKNOWN = Constant(None, None, 'no figure that we have checked')
ADD = {'float32': _known(0.9), 'int32': _known(0.1), 'int8': UNKNOWN, 'float16': UNKNOWN}
MUL = {'float32': _known(3.7), 'int32': _known(3.1), 'int8': UNKNOWN, 'float16': UNKNOWN}
# Of a byte; the source has reads of 64 bits.
MEMORY = {
  'cache_8KB': _known(10.0 / 8), 'sram_256KB': UNKNOWN, 'dram': UNKNOWN, 'flash': UNKNOWN,
}  # fmt: skip


class Profile(NamedTuple):
  """A kind of device: the dtype of its multiply-adds, and the memory that their operands come from."""

  dtype: str
  level: str


# The targets' memories have no figure that we have checked: their estimates are null until there is one.
PROFILES = {
  '45nm-cache': Profile('float32', 'cache_8KB'),
  'cortex-m4': Profile('float32', 'sram_256KB'),
  'cortex-m7': Profile('float32', 'sram_256KB'),
  'cortex-a53': Profile('float32', 'dram'),
  'cortex-a72': Profile('float32', 'dram'),
}


class Estimate(NamedTuple):
  """Microjoules, and between what they may lie; None where a constant is unknown."""

  uj: float | None
  low: float | None
  high: float | None


def estimate(macs: int, moved: int, dtype: str = 'float32', level: str = 'cache_8KB') -> Estimate:
  """The energy of so many multiply-adds and bytes.

  Args:
    macs: multiply-adds.
    moved: bytes read or written.
    dtype: of the multiply-adds.
    level: of the memory. 'cache_8KB' is the only one with a figure: a device whose state is in a larger SRAM
      uses more.
  """
  low = mid = high = 0.0
  for n, constant in ((macs, ADD[dtype]), (macs, MUL[dtype]), (moved, MEMORY[level])):
    if n and (constant.pj is None or constant.factor is None):
      return Estimate(None, None, None)
    pj, factor = constant.pj or 0.0, constant.factor or 1.0
    low, mid, high = low + n * pj / factor, mid + n * pj, high + n * pj * factor
  return Estimate(mid * 1e-6, low * 1e-6, high * 1e-6)
