"""Continual-learning methods, in the folders of De Lange et al.'s taxonomy; one module a method.

There is no registry: `find('er')` is the function `er` of the module `er` in one of the folders.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable

from cl_jax.errors import UserError
from cl_jax.types import Method


def names() -> dict[str, str]:
  """{'er': 'cl_jax.methods.replay.er', ...} for every module below this package."""
  found = {}
  for folder in pkgutil.iter_modules(__path__, f'{__name__}.'):
    if folder.ispkg:
      package = importlib.import_module(folder.name)
      for module in pkgutil.iter_modules(package.__path__, f'{folder.name}.'):
        found[module.name.rsplit('.', 1)[1]] = module.name
  return dict(sorted(found.items()))


def find(name: str) -> Callable[..., Method]:
  """The factory of a method by its module's name.

  Raises:
    UserError: no such method; names close to it are offered.
  """
  known = names()
  if name not in known:
    close = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f'did you mean {" or ".join(close)}?' if close else f'there are {", ".join(known)}'
    raise UserError(f'no method {name!r}: {hint}')
  return getattr(importlib.import_module(known[name]), name)
