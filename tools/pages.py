"""Generated parts of Markdown pages: what stands between two comments that name their maker."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def lines_of(path: Path) -> list[dict[str, Any]]:
  """The objects of a file of JSON lines; none where there is no file."""
  return [json.loads(r) for r in path.read_text().splitlines() if r] if path.exists() else []


def commits(lines: Iterable[Mapping[str, Any]]) -> str:
  """'commits 4ffa32a, 47cca8e': those of all the lines, shortened, in their order."""
  found = dict.fromkeys(line['commit'][:7] for line in lines)
  return f'commit{"s" if len(found) > 1 else ""} {", ".join(found)}'


def commands(lines: Iterable[Mapping[str, Any]]) -> str:
  """'Commands: `python -m a`, `python -m b`': those of all the lines, in their order."""
  found = dict.fromkeys(f'`{line["command"]}`' for line in lines)
  return f'Command{"s" if len(found) > 1 else ""}: {", ".join(found)}'


def marks(maker: str) -> tuple[str, str]:
  """The comments around what `maker` writes."""
  return f'<!-- made by {maker}: -->', f'<!-- :made by {maker} -->'


def fill(text: str, maker: str, content: str) -> str:
  """`text` with `content` between the marks of `maker`, which must be there once."""
  begin, end = marks(maker)
  if text.count(begin) != 1 or text.count(end) != 1:
    raise SystemExit(f'a page must hold {begin} and {end} once, for what {maker} writes')
  head, _, rest = text.partition(begin)
  return f'{head}{begin}\n\n{content.strip()}\n\n{end}{rest.partition(end)[2]}'


def update(pages: dict[Path, str], write: bool, target: str) -> int:
  """Writes the pages that changed, or says which are not current; the exit code."""
  old = {path for path, text in pages.items() if path.read_text() != text}
  for path in sorted(old):
    if write:
      path.write_text(pages[path])
      print(f'{path.name} written')
    else:
      print(f'{path.name} is not current: run make {target}', file=sys.stderr)
  return int(bool(old) and not write)
