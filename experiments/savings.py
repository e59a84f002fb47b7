"""What `config.update` and `config.micro_batches` save against all trained and in one piece."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cl_jax import budget
from experiments import build, limits
from experiments.update import FULL, rules

ROLES = ('trainable', 'optimiser', 'methods')


def full(config: Mapping[str, Any]) -> dict[str, Any] | None:
  """The configuration that trains everything in one piece; None where this one does.

  Its slots are those of `config`: the same budget of bytes would give another number, or not be enough.
  """
  if not rules(config) and config.get('micro_batches', 1) == 1:
    return None
  return {**config, 'update': FULL, 'micro_batches': 1, 'budget_bytes': None}


def figures(made: limits.Programs, peak: budget.Peak) -> dict[str, Any]:
  """Multiply-adds of a step by role, bytes at once, bytes of what is trained and of what is kept for it."""
  roles = budget.state_bytes(made.state)
  return {
    'macs': made.macs(),
    'peak_bytes': peak.peak,
    'temporary_bytes': peak.temporary,
    'trainable': roles['trainable'],
    'optimiser': roles['optimiser'],
    'methods': sum(n for role, n in roles.items() if role.startswith('method')),
  }


def against(
  config: Mapping[str, Any], made: limits.Programs, peak: budget.Peak, data_dir: str | None
) -> dict[str, Any] | None:
  """{'own', 'full'}: the figures of both learners, or None where they are the same one.

  Args:
    config: with the capacities that `made` is built with.
  """
  dense = full(config)
  if dense is None:
    return None
  other = build.programs(build.prepare(dense, data_dir)[0])
  return {'own': figures(made, peak), 'full': figures(other, other.peak())}


def rows(about: Mapping[str, Any]) -> list[tuple[str, str, str]]:
  """Lines of the table: this learner's figure, and the full one's with the share of it."""
  own, other = about['own'], about['full']
  pairs = {f'multiply-adds, {k}': (own['macs'][k], n) for k, n in other['macs'].items()}
  for name, key in (('bytes at once', 'peak_bytes'), ('of these temporary', 'temporary_bytes')):
    pairs[name] = own[key], other[key]
  pairs |= {f'bytes, {role}': (own[role], other[role]) for role in ROLES}
  return [('against all in one piece', 'this', 'full')] + [
    (f'  {name}', f'{a:,}', f'{b:,} ({a / b:.1%} of it)') for name, (a, b) in pairs.items() if b
  ]
