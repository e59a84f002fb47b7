"""Reads the header of a GGUF file without trusting it: every count is compared with what can be there.

The format is that of llama.cpp: ggml/docs/gguf.md, "File structure". The gguf library reads it as well, but
makes an object for every number of an array and follows counts and lengths beyond the file's end, so that a
few bytes make it fill the memory. Here nothing is allocated before it is known to fit.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cl_jax.errors import UserError

VERSIONS = (2, 3)
ALIGNMENT = 32  # where 'general.alignment' does not say otherwise
# More than any model has. Together with the file's size they bound what a header can take.
FIELDS, TENSORS, ELEMENTS, NAME, AXES = 2**16, 2**16, 2**22, 2**16, 4
TEXT, ARRAY = 8, 9
NUMBERS = {
  0: 'B',
  1: 'b',
  2: 'H',
  3: 'h',
  4: 'I',
  5: 'i',
  6: 'f',
  7: '?',
  10: 'Q',
  11: 'q',
  12: 'd',
}


class Tensor(NamedTuple):
  """Where a tensor is.

  Attributes:
    shape: from the slowest axis on, as NumPy has it.
    kind: of gguf.GGMLQuantizationType.
    offset, size: bytes from the file's beginning, and how many.
    row: bytes along the last axis.
  """

  shape: tuple[int, ...]
  kind: Any
  offset: int
  size: int
  row: int


class Header(NamedTuple):
  """What a GGUF file says of itself: its fields, numbers, strings and lists of them, and its tensors."""

  fields: dict[str, Any]
  tensors: dict[str, Tensor]


def header(file: Path) -> Header:
  """Reads all but the tensors' values.

  Raises:
    UserError: naming the field or the tensor, for a file that is cut off or damaged, counts that do not fit
      into it, tensors that overlap or reach beyond its end, and what is not known here.
  """
  try:
    with file.open('rb') as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
      return _header(file, data)
  except (OSError, ValueError) as e:  # an empty file cannot be mapped
    raise UserError(f'{file} cannot be read as GGUF, it may be cut off or damaged: {e}') from e


def values(file: Path, tensor: Tensor) -> np.ndarray:
  """The bytes of a tensor, u8[..., row]."""
  stored = np.fromfile(file, np.uint8, tensor.size, offset=tensor.offset)
  if len(stored) != tensor.size:  # it has been cut off since
    raise ValueError(f'{len(stored)} of {tensor.size} bytes are there')
  return stored.reshape(*tensor.shape[:-1], tensor.row)


class _Cursor:
  """Walks through a file; `what` is being read, for messages."""

  def __init__(self, file: Path, data: mmap.mmap):
    self.file, self.data, self.at, self.what = file, data, 0, 'its beginning'
    self.left = ELEMENTS

  def wrong(self, why: str) -> UserError:
    return UserError(
      f'{self.file} cannot be read as GGUF, it may be cut off or damaged: {self.what} {why}'
    )

  def take(self, size: int) -> int:
    """Where the next `size` bytes begin, all of which are there."""
    begin, self.at = self.at, self.at + size
    if self.at > len(self.data):
      raise self.wrong(f'takes {size} bytes from {begin} on, the file has {len(self.data)}')
    return begin

  def number(self, kind: str) -> Any:
    return struct.unpack_from(f'<{kind}', self.data, self.take(struct.calcsize(f'<{kind}')))[0]

  def text(self, most: int | None = None) -> str:
    size = self.number('Q')
    if most is not None and size > most:
      raise self.wrong(f'has a name of {size} bytes, {most} are the most')
    begin = self.take(size)
    try:
      return self.data[begin : begin + size].decode('utf-8')
    except UnicodeDecodeError as e:
      raise self.wrong(f'is not UTF-8: {e.reason}') from e

  def count(self, of: str, most: int, smallest: int) -> int:
    """A number of things that follow, each of which takes at least `smallest` bytes."""
    n = self.number('Q')
    left = len(self.data) - self.at
    if n > most or n * smallest > left:
      raise self.wrong(f'says there are {n} {of}, in {left} bytes, of {most} at most')
    return n

  def value(self, kind: int) -> Any:
    if kind == TEXT:
      return self.text()
    if kind in NUMBERS:
      return self.number(NUMBERS[kind])
    if kind != ARRAY:
      raise self.wrong(f'is of type {kind}, which is not known')
    kind = self.number('I')
    if kind == TEXT:
      n = self.count('strings', self.left, 8)
      self.left -= n
      return [self.text() for _ in range(n)]
    if kind not in NUMBERS:
      raise self.wrong(f'is an array of type {kind}, which is not read here')
    size = struct.calcsize(NUMBERS[kind])
    n = self.count('numbers', self.left, size)
    self.left -= n
    return list(struct.unpack_from(f'<{n}{NUMBERS[kind]}', self.data, self.take(n * size)))


def _header(file: Path, data: mmap.mmap) -> Header:
  c = _Cursor(file, data)
  begin = c.take(4)
  if data[begin : begin + 4] != b'GGUF':
    raise c.wrong('is not GGUF')
  version = c.number('I')
  if version not in VERSIONS:
    why = ' with the bytes of every number in the other order' if version & 65535 == 0 else ''
    raise c.wrong(f'says version {version}{why}; versions {VERSIONS} are read here')
  c.what = 'the number of tensors'
  tensors = c.count('tensors', TENSORS, 8 + 4 + 8 + 4 + 8)
  c.what = 'the number of fields'
  count = c.count('fields', FIELDS, 8 + 4 + 1)
  fields: dict[str, Any] = {}
  for i in range(count):
    c.what = f'field {i}'
    name = c.text(NAME)
    c.what = f'field {name}'
    if name in fields:
      raise c.wrong('is there twice')
    fields[name] = c.value(c.number('I'))
  found = {}
  for i in range(tensors):
    c.what = f'tensor {i}'
    name = c.text(NAME)
    c.what = f'tensor {name}'
    if name in found:
      raise c.wrong('is there twice')
    found[name] = _tensor(c)
  return Header(fields, _placed(c, fields, found))


def _tensor(c: _Cursor) -> Tensor:
  """One whose offset is still from the beginning of the tensors."""
  from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

  axes = c.number('I')
  if not 1 <= axes <= AXES:
    raise c.wrong(f'has {axes} axes, {AXES} are the most')
  shape = tuple(c.number('Q') for _ in range(axes))[::-1]
  kind, offset = c.number('I'), c.number('Q')
  try:
    kind = GGMLQuantizationType(kind)
    block, size = GGML_QUANT_SIZES[kind]
  except (ValueError, KeyError):
    raise c.wrong(f'is of type {kind}, which the gguf library does not know') from None
  if min(shape) < 1 or shape[-1] % block:
    raise c.wrong(f'has the shape {shape}, whose last axis is not of blocks of {block}')
  row, rows = shape[-1] // block * size, 1
  for n in shape[:-1]:
    rows *= n
  if row * rows > len(c.data):
    raise c.wrong(f'of shape {shape} takes {row * rows} bytes, the file has {len(c.data)}')
  return Tensor(shape, kind, offset, row * rows, row)


def _placed(c: _Cursor, fields: dict[str, Any], found: dict[str, Tensor]) -> dict[str, Tensor]:
  """The tensors with their offsets in the file, which they must share out between them."""
  c.what = 'field general.alignment'
  step = fields.get('general.alignment', ALIGNMENT)
  if type(step) is not int or step < 1 or step & (step - 1):
    raise c.wrong(f'must be a power of two, not {step!r}')
  start = -(-c.at // step) * step
  placed = {name: t._replace(offset=start + t.offset) for name, t in found.items()}
  end = start
  for name, t in sorted(placed.items(), key=lambda item: item[1].offset):
    c.what = f'tensor {name}'
    if t.offset % step:
      raise c.wrong(f'begins at {t.offset}, which is not a multiple of {step}')
    if t.offset < end:
      raise c.wrong(f'begins at {t.offset}, inside of the one before')
    end = t.offset + t.size
    if end > len(c.data):
      raise UserError(
        f'{c.file} is cut off: it has {len(c.data)} bytes, tensor {name} ends at {end}'
      )
  return placed
