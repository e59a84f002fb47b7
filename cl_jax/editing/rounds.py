"""The rounds of one edit: loops whose carry can be saved, so that a long edit can be stopped and goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar('T')


class Rounds(Protocol):
  """carry = step(i, carry) for i = 0, 1, ..., n - 1; returns the last carry.

  A carry is a pytree of arrays, and a step depends on nothing but i, the carry and what the whole edit is
  given: a carry that was saved after round i - 1 goes on with round i in another process.

  Args:
    name: of what a round is, for messages; an edit has one loop of a name.
  """

  def __call__(self, name: str, n: int, carry: T, step: Callable[[int, T], T]) -> T: ...


def straight(name: str, n: int, carry: T, step: Callable[[int, T], T]) -> T:
  """All rounds at once; nothing is saved."""
  del name
  for i in range(n):
    carry = step(i, carry)
  return carry
