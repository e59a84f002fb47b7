"""What works alone and not together: methods beside others, in part of a network, in mixed batches."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cl_jax.errors import UserError

MIXED = ('joint', 'cumulative')
# Methods of which one at most, by what the second of two would get wrong.
APART: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
  (('imm',), ('ewc', 'mas', 'lwf', 'ebll', 'slca'),
   'the network that is read at a boundary is the merged one of earlier tasks, not the one that was trained'),
  (('hat', 'packnet'), ('dgr', 'dreamnet'),
   'dreams have no task, and gates or masks of none of the tasks would read them'),
  (('cwr',), ('rehearsal', 'der', 'derpp', 'er_ace', 'mir', 'agem'),
   'it keeps of a task what the classes of the stream and of mixed batches have learnt: take er'),
  (('mer',), ('er', 'icarl', 'latent', 'remind'),
   "rows from the other's memory would be stored as if the stream had brought them"),
)  # fmt: skip
# Methods that take the output layer for the whole one.
WHOLE_HEAD = ('cwr', 'slca', 'sprompts', 'ebll')


def check(c: Mapping[str, Any]) -> None:
  """Raises UserError for a method that does not go with another one, with a part of a network, or with the
  tasks of a batch."""
  chosen, parts = c['methods'], c['update']['parts']
  for ones, others, why in APART:
    one, other = (next((n for n in names if n in chosen), '') for names in (ones, others))
    if one and other:
      raise UserError(f'config.methods: {one} beside {other}: {why}: take one of the two')
  head = next((words for pattern, words in parts if re.fullmatch(pattern, 'head/w')), '')
  if head.startswith(('in ', 'out ')) and (found := [n for n in chosen if n in WHOLE_HEAD]):
    raise UserError(
      f"config.update.parts: {found[0]} needs all of the output layer: begin with ('head/.*', 'all')"
    )
  if any(w.startswith('last ') for _, w in parts) and (
    found := [n for n in chosen if n in ('hat', 'partial')]
  ):
    raise UserError(
      f"config.update.parts: {found[0]} counts layers from the first, and with 'last N' only the upper ones "
      'are trained: leave one of the two out'
    )
  if 'hat' in chosen and c['scenario'] in MIXED:
    raise UserError(
      f'config.scenario={c["scenario"]!r}: a batch has several tasks, and hat opens the gates of one: take '
      'another scenario'
    )
