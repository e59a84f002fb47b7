"""Where intermediate results live: one static array per type, offsets by lifetimes, nothing allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

BYTES = {
  'i1': 1,
  **{f'i{n}': n // 8 for n in (8, 16, 32, 64)},
  **{f'ui{n}': n // 8 for n in (8, 16, 32, 64)},
  'f32': 4,
}


@dataclasses.dataclass(eq=False)
class Place:
  """Memory that holds a tensor, row-major.

  Attributes:
    size, dtype: elements and their type.
    text: (offset expression) -> the C lvalue of an element.
    owned: it may be written.
    inside: it is in the arena.
    first, last: positions in the program between which it is needed; None of what the caller holds.
    offset: in the arena of its type, once planned.
  """

  size: int
  dtype: str
  text: Callable[[str], str]
  owned: bool = True
  inside: bool = False
  first: int | None = None
  last: int | None = None
  offset: int | None = None

  @property
  def bytes(self) -> int:
    return self.size * BYTES[self.dtype]


def member_of(dtype: str) -> str:
  """The array of the arena that holds a type: truth values are bytes."""
  return 'u8' if dtype == 'i1' else dtype.replace('ui', 'u')


class Arena:
  """The places of one function, by the position of the kernel that touches them."""

  def __init__(self):
    self.places: list[Place] = []
    self.position = 0
    self.loops: list[tuple[int, set[Place]]] = []

  def new(self, size: int, dtype: str) -> Place:
    """A place whose offset `plan` decides; until then the text holds a mark in its stead."""
    mark = f'@{len(self.places)}@'
    member = member_of(dtype)

    def text(index: str) -> str:
      return f'arena.{member}[{mark}]' if index == '0' else f'arena.{member}[{mark} + {index}]'

    place = Place(size, dtype, text, inside=True)
    self.places.append(place)
    return place

  def touch(self, place: Place) -> None:
    """The place is read or written here; in a loop it is needed until the loop ends."""
    if place.first is None:
      place.first = self.position
    place.last = max(place.last or 0, self.position)
    for start, touched in self.loops:
      if place.first < start:
        touched.add(place)

  def enter(self) -> None:
    self.position += 1
    self.loops.append((self.position, set()))

  def leave(self) -> None:
    self.position += 1
    _, touched = self.loops.pop()
    for place in touched:
      self.touch(place)


def plan(places: list[Place]) -> dict[str, int]:
  """Sets the offsets: the largest first, each in the smallest gap of those that live at the same time.

  Arrays of different types do not share bytes: C99 forbids to read memory as another type than it was
  written in, and compilers rely on that.

  Returns:
    The elements that each array needs: 'f32', 'u8', ...
  """
  sizes: dict[str, int] = {}
  done: list[Place] = []
  for place in sorted((p for p in places if p.first is not None), key=lambda p: -p.size):
    kind = member_of(place.dtype)
    beside = sorted(
      (p for p in done if member_of(p.dtype) == kind and _meet(p, place)),
      key=lambda p: p.offset or 0,
    )
    best, gap, free = None, 0, 0
    for other in beside:
      start = other.offset or 0
      if start - free >= place.size and (best is None or start - free < gap):
        best, gap = free, start - free
      free = max(free, start + other.size)
    place.offset = free if best is None else best
    sizes[kind] = max(sizes.get(kind, 0), place.offset + place.size)
    done.append(place)
  return sizes


def _meet(a: Place, b: Place) -> bool:
  assert a.first is not None and a.last is not None and b.first is not None and b.last is not None
  return a.first <= b.last and b.first <= a.last
