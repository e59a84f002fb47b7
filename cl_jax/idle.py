"""Fields of a configuration that older runs do not have, where they do nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def idle(config: Mapping[str, Any]) -> set[str]:
  """The younger fields that change nothing of this run: with and without them it is the same run.

  What is told from others by its configuration (a checkpoint, a group of a report) leaves them out. A new
  field of configs/common.py that does nothing by default belongs here.
  """
  nothing = {
    'budget': all(v is None for v in config.get('budget', {}).values()),
    'update': not config.get('update', {}).get('parts'),
    'micro_batches': config.get('micro_batches', 1) == 1,
    'feed': True,  # the same bytes from wherever they come
    'compress': not any(config.get('compress', {}).values()),
  }
  return {name for name, is_idle in nothing.items() if is_idle}
