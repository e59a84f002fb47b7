"""Docstrings on the site of `make site`: an asterisk in them is an asterisk, as in theta*_i and h*w.

An extension of griffe, which reads the docstrings for mkdocstrings (see mkdocs.yml).
"""

from __future__ import annotations

import re
from typing import Any

import griffe  # pyright: ignore[reportMissingImports]

KEPT = re.compile(
  r'`[^`]*`|^\s*\*+|\*', re.MULTILINE
)  # code, `*names` of arguments; or an asterisk


class Plain(griffe.Extension):
  def on_object(self, *, obj: Any, **others: Any) -> None:
    if obj.docstring:
      escaped = lambda found: r'\*' if found[0] == '*' else found[0]  # noqa: E731
      obj.docstring.value = KEPT.sub(escaped, obj.docstring.value)
