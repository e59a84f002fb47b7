"""`config.budget_bytes`: every method gets the memory slots that fit: comparisons are fair in bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cl_jax.errors import UserError

SLOTS = 'capacity'
MOST = 1 << 24


def fitted(config: Mapping[str, Any], added: Callable[[Mapping[str, Any]], int]) -> dict[str, Any]:
  """The configuration with the largest `capacity`, the same for all of its methods that have one.

  Args:
    added: configuration -> bytes of state beyond plain fine-tuning (ValueError: too few slots for it).

  Raises:
    UserError: the budget is too small for the methods, whatever their capacity.
  """
  budget = config['budget_bytes']
  if budget is None:
    return dict(config)
  names = [name for name in config['methods'] if SLOTS in config[name]]

  def with_slots(n: int) -> dict[str, Any]:
    return {**config, **{name: {**config[name], SLOTS: n} for name in names}}

  def size(n: int) -> int | None:
    """None where a method needs more slots."""
    try:
      return added(with_slots(n))
    except (ValueError, UserError):
      return None

  if not names:
    needed = added(config)
    if needed > budget:
      raise UserError(
        f'config.budget_bytes={budget:,}: {"+".join(config["methods"])} adds {needed:,} bytes to plain '
        'fine-tuning, and has no capacity that could be less'
      )
    return dict(config)
  least = next((n for n in (2**k for k in range(25)) if size(n) is not None), None)
  if least is None:
    added(with_slots(MOST))  # says itself what is wrong
    raise AssertionError('it fits at no capacity')
  low = least // 2 + 1
  while low < least:  # the least capacity that works at all
    middle = (low + least) // 2
    low, least = (middle + 1, least) if size(middle) is None else (low, middle)
  if (needed := size(low) or 0) > budget:
    raise UserError(
      f'config.budget_bytes={budget:,} is too small: {"+".join(config["methods"])} adds {needed:,} bytes to '
      f'plain fine-tuning with {low} slots'
    )
  high = low
  while high < MOST and (size(2 * high) or 0) <= budget:
    high *= 2
  low, high = high, 2 * high  # low fits, high does not
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if (size(middle) or 0) <= budget else (low, middle)
  return with_slots(low)


def without_methods(config: Mapping[str, Any]) -> dict[str, Any]:
  """Plain fine-tuning, without codes for memories and states that it does not have."""
  plain = {**config.get('compress', {}), 'memory': '', 'state': ()}
  return {**config, 'methods': (), 'compress': plain}
