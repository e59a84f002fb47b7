"""The goals, a file a theme and a function a goal; each returns the rows of its table.

Targets are ratios of the other's cost to ours, so a tax of at most 1.05 is a ratio of at least 1/1.05.
"""

from __future__ import annotations

from typing import NamedTuple


class Setup(NamedTuple):
  """What a goal may use.

  Attributes:
    quick: small sizes and few turns: shows that everything runs, measures nothing.
    runs: interleaved turns.
    peers: the interpreter of the peers' environment; '' when it is not there.
    env: environment variables with which the peers are at their best.
    missing: why `peers` is empty.
  """

  quick: bool
  runs: int
  peers: str
  env: dict[str, str]
  missing: str
