"""`config.budget`: a learner above one of its limits is refused, with what takes most and what would fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from cl_jax import budget
from cl_jax.errors import UserError
from cl_jax.models.quantised import BITS, quantise_tree
from cl_jax.types import Batch, State, Tree
from experiments import capacity

Make = Callable[..., 'Programs']


WHAT = {
  'state_bytes': 'the learner keeps {:,} bytes, frozen weights included',
  'peak_bytes': 'a step of one run needs {:,} bytes at once',
  'macs_per_step': 'a step takes {:,} multiply-adds',
}


class Programs(NamedTuple):
  """A learner's functions over shapes; see `build.programs`.

  Attributes:
    step: (weights, state, batch) -> (state, loss).
    predict: (weights, state, batch) -> logits.
    weights, state, batch: shapes that they take.
  """

  step: Callable
  predict: Callable
  weights: dict[str, Tree]
  state: State
  batch: Batch

  @property
  def arguments(self) -> tuple:
    return self.weights, self.state, self.batch

  def macs(self) -> dict[str, int]:
    return budget.macs(self.step, *self.arguments)

  def peak(self) -> budget.Peak:
    """Of a step that overwrites the state, as training does."""
    return budget.compiled(self.step, *self.arguments, donate=(1,))


def check(config: Mapping[str, Any], frozen: Tree, make: Make) -> None:
  """Refuses a learner above a limit of `config.budget`; without limits nothing is traced.

  Args:
    config: resolved, with the capacities that are built.
    frozen: every weight that is kept and not trained.
    make: (own=None, rows=None) -> Programs: of another configuration's methods, of so many rows a batch.

  Raises:
    UserError: a figure is above its limit.
  """
  limits = dict.fromkeys(WHAT) | config.get('budget', {})  # artefacts of earlier versions have none
  if (limit := limits['state_bytes']) is not None:
    roles = budget.state_bytes(make().state, frozen)
    total = roles.pop('total')
    if total > limit:
      raise refusal(
        'state_bytes', limit, total, roles, state_fits(config, frozen, make, limit, total)
      )
  if (limit := limits['macs_per_step']) is not None:
    roles = make().macs()
    total = roles.pop('total')
    if total > limit:
      raise refusal('macs_per_step', limit, total, roles, macs_fit(config, make, limit))
  if (limit := limits['peak_bytes']) is not None:  # the last: this one compiles
    made = make()
    peak = made.peak()
    if peak.peak > limit:
      roles = budget.state_bytes(made.state, made.weights['frozen'])
      del roles['total']
      roles |= {'temporary values': peak.temporary, 'batch': budget.tree_bytes(made.batch)}
      fits = peak_fits(config, make, limit, peak.peak)
      raise refusal('peak_bytes', limit, peak.peak, roles, fits)


def refusal(
  name: str, limit: int, total: int, parts: Mapping[str, int], fits: list[str]
) -> UserError:
  most = sorted(((n, part) for part, n in parts.items() if n), key=lambda p: (-p[0], p[1]))[:3]
  largest = ', '.join(f'{part} {n:,}' for n, part in most)
  advice = f'{" or ".join(fits)} would fit' if fits else 'take a smaller config.model'
  return UserError(
    f'config.budget.{name}={limit:,}: {WHAT[name].format(total)}, {total - limit:,} too many '
    f'(largest: {largest}); {advice}'
  )


def state_fits(
  config: Mapping[str, Any], frozen: Tree, make: Make, limit: int, total: int
) -> list[str]:
  """'config.FIELD=VALUE' of each field that alone brings the state below the limit."""
  found = []
  if (own := slots_within(config, frozen, make, limit)) is not None:
    found.append(slots(config, own, make))
  for bits, size in rounded(config, frozen).items():
    if total - budget.tree_bytes(frozen) + size <= limit:
      return [*found, f'config.frozen_bits={bits}']
  return found


def rounded(config: Mapping[str, Any], frozen: Tree) -> dict[int, int]:
  """{bits: bytes of the frozen weights rounded to so many}; {} where `frozen_bits` does not apply."""
  still = config['freeze'] or config.get('update', {}).get(
    'parts'
  )  # older artefacts have no update
  if config['frozen_bits'] or not still:
    return {}
  found = {}
  for bits in BITS:
    try:
      made = jax.eval_shape(lambda w, bits=bits: quantise_tree(w, bits), frozen)
    except UserError:  # these weights cannot be rounded to so many
      continue
    found[bits] = budget.tree_bytes(made)
  return found


def slots_within(
  config: Mapping[str, Any], frozen: Tree, make: Make, limit: int
) -> dict[str, Any] | None:
  """The configuration with the largest capacity whose state stays within the limit; None if none does."""
  if not any(capacity.SLOTS in config[name] for name in config['methods']):
    return None

  def size(own: Mapping[str, Any]) -> int:
    return budget.state_bytes(make(own).state, frozen)['total']

  try:
    return capacity.fitted({**config, 'budget_bytes': limit}, size)
  except (UserError, ValueError):
    return None


def slots(config: Mapping[str, Any], own: Mapping[str, Any], make: Make) -> str:
  """The fields that give `own` its slots: `budget_bytes`, where that one decides, or each capacity."""
  if config['budget_bytes'] is not None:
    size = lambda c: budget.state_bytes(make(c).state)['total']  # noqa: E731
    return f'config.budget_bytes={size(own) - size(capacity.without_methods(own))}'
  return ' with '.join(
    f'config.{name}.{capacity.SLOTS}={own[name][capacity.SLOTS]}'
    for name in own['methods']
    if capacity.SLOTS in own[name]
  )


def macs_fit(config: Mapping[str, Any], make: Make, limit: int) -> list[str]:
  """The largest batch whose step stays within the limit."""
  parts = config.get('micro_batches', 1)
  fits = lambda n: make(rows=n * parts).macs()['total'] <= limit  # noqa: E731
  low, high = 0, rows_of(make()) // parts  # low fits or is 0, high does not
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return [f'config.batch={low * parts}'] if low else []


def peak_fits(config: Mapping[str, Any], make: Make, limit: int, peak: int) -> list[str]:
  """A batch of a half, a quarter, ... of the rows whose step stays within; else fewer slots."""
  parts = config.get('micro_batches', 1)
  n = rows_of(make()) // parts // 2
  while n:
    if make(rows=n * parts).peak().peak <= limit:
      return [f'config.batch={n * parts}']
    n //= 2
  kept = budget.tree_bytes(
    make().state
  )  # a step that is given the state to overwrite holds it once
  own = slots_within(config, None, make, kept - (peak - limit))
  if own is not None and make(own).peak().peak <= limit:
    return [slots(config, own, make)]
  return []


def rows_of(programs: Programs) -> int:
  return programs.batch.y.shape[0]
