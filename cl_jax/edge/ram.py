"""The memory of a device, to the byte: what a learner needs, by role, and whether that fits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cl_jax.edge.arena import BYTES
from cl_jax.edge.c99_file import MLIR
from cl_jax.errors import UserError

STACK = 4096
AGENT = 8  # the two file handles of the agent


def aligned(n: int) -> int:
  """As our linker script places every object: on 8 bytes."""
  return -(-n // 8) * 8


def struct_bytes(state: Sequence[Mapping[str, Any]]) -> int:
  """sizeof of the struct of the state: its leaves in order, each aligned to its type."""
  at, widest = 0, 1
  for leaf in state:
    width = BYTES[MLIR[leaf['dtype']]]
    widest = max(widest, width)
    at = -(-at // width) * width + max(leaf['bytes'], width)
  return -(-at // widest) * widest


def role(name: str) -> str:
  """The role of a leaf, as in `budget.state_bytes`."""
  first, *rest = name.split('/')
  if first == 'method' and rest:
    return f'method/{rest[0]}'
  names = {'params': 'trainable', 'stats': 'statistics', 'opt': 'optimiser', 'method': 'method'}
  return names.get(first, 'loop')


def roles(state: list[dict[str, Any]]) -> dict[str, int]:
  """Bytes of the state's leaves by role."""
  found: dict[str, int] = {}
  for leaf in state:
    found[role(leaf['name'])] = found.get(role(leaf['name']), 0) + leaf['bytes']
  return found


def needed(manifest: Mapping[str, Any], stack: int) -> dict[str, int]:
  """Bytes of RAM by role while the agent runs; their sum is what the linker finds, to the byte.

  State, arena, one batch, what the functions return, the stack. The examples that a boundary looks at are
  not in it: a device reads them from where it keeps its data (external memory in the emulated boards).
  """
  held = roles(manifest['state'])
  padding = aligned(struct_bytes(manifest['state'])) - sum(held.values())
  batch = sum(aligned(max(leaf_bytes(leaf), 1)) for leaf in manifest['batch'])
  return {
    **held,
    'arena': aligned(manifest['arena_bytes']),
    'batch': batch,
    'output': aligned(4 * max(manifest['outputs'], 1)),
    'stack': aligned(stack),
    'agent': AGENT,
    'padding': padding,
  }


def leaf_bytes(leaf: Mapping[str, Any]) -> int:
  n = BYTES[MLIR[leaf['dtype']]]
  for d in leaf['shape']:
    n *= d
  return n


def check(manifest: Mapping[str, Any], ram: int | None, flash: int | None, stack: int) -> None:
  """Raises UserError when it cannot fit, naming what takes most. The linker has the last word."""
  parts = needed(manifest, stack)
  total = sum(parts.values())
  if ram is not None and total > ram:
    largest = sorted(parts.items(), key=lambda item: -item[1])[:4]
    named = ', '.join(f'{name} {n:,}' for name, n in largest)
    raise UserError(
      f'the learner needs {total:,} bytes of RAM and --ram gives {ram:,}, {total - ram:,} too few '
      f'(largest: {named}): take a smaller memory, model or batch'
    )
  if flash is not None and manifest['constant_bytes'] > flash:
    raise UserError(
      f'the constants alone are {manifest["constant_bytes"]:,} bytes and --flash gives {flash:,}: '
      'frozen weights are constants; take fewer or smaller ones'
    )


def size(text: str, option: str) -> int:
  """'256K', '1M' or a number of bytes."""
  found = re.fullmatch(r'(\d+)([KM]?)B?', text.strip(), re.IGNORECASE)
  if not found or not int(found[1]):
    raise UserError(f'{option} must be a number of bytes such as 262144, 256K or 1M; got {text!r}')
  return int(found[1]) << {'': 0, 'K': 10, 'M': 20}[found[2].upper()]
