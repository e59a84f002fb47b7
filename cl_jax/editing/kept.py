"""Arrays that took long to compute, in one .npz file that says what they belong to and is proved whole.

Nothing is pickled. The same contents give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cl_jax import durable
from cl_jax.checkpoint import digest
from cl_jax.errors import UserError

ABOUT = 'about'  # the name of the JSON among the arrays
# What reading a damaged archive can raise; RuntimeError where a flipped bit says that it is encrypted.
DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, struct.error)
DAMAGE += (zipfile.BadZipFile, zlib.error)


def save(path: Path, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
  """Replaces the file by one with these arrays; a process that is killed leaves the one before.

  Args:
    about: plain JSON.

  Raises:
    UserError: it cannot be written.
  """
  text = json.dumps({'about': about, 'sha256': total(about, arrays)}, sort_keys=True)
  note = np.frombuffer(text.encode(), np.uint8)
  everything: dict[str, Any] = {ABOUT: note, **arrays}
  durable.replace(path, lambda file: np.savez(file, **everything))


def sweep_up(path: Path) -> None:
  """Removes what processes that were killed while they wrote this file have left beside it."""
  for part in path.parent.glob(f'.{path.name}.*.part'):
    part.unlink(missing_ok=True)


def load(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """(about, arrays) of a file that `save` has written.

  Raises:
    UserError: the file is not whole, or not what was written.
  """
  try:
    # Opened here, since np.load leaves a file open that is no whole archive.
    with path.open('rb') as handle, np.load(handle, allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
    note = json.loads(arrays.pop(ABOUT).tobytes())
    about, known = note['about'], note['sha256']
    if total(about, arrays) != known:
      raise ValueError('its contents do not have their sha256')
  except DAMAGE as error:
    raise UserError(
      f'{path} is damaged ({durable.first_line(error)}): remove it to compute it anew'
    ) from error
  return about, arrays


def total(about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
  """sha256 (hex) of everything in the file."""
  text = json.dumps(about, sort_keys=True) + json.dumps(sorted(arrays))
  return hashlib.sha256((text + digest(dict(arrays))).encode()).hexdigest()


def same(path: Path, about: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
  """Refuses a file that belongs to something else.

  Raises:
    UserError: an entry differs; the first is named.
  """
  for name, value in wanted.items():
    if about.get(name) != value:
      there, here = (str(v)[:60] for v in (about.get(name), value))
      raise UserError(
        f'{path} is of another {name} ({there}; this one is {here}): use another directory, or remove it'
      )


def fit(path: Path, arrays: Mapping[str, np.ndarray], like: Mapping[str, tuple[Any, Any]]) -> None:
  """Refuses arrays that are not those of `like`, {name: (shape, dtype)}; None in a shape is any length.

  Raises:
    UserError: an array is missing, left over, or of another shape or dtype.
  """
  if lost := sorted(set(arrays) ^ set(like)):
    raise UserError(f'{path}: {lost[0]} is missing or does not belong there: remove it')
  for name, (shape, dtype) in like.items():
    a = arrays[name]
    alike = len(a.shape) == len(shape) and all(
      want in (None, n) for n, want in zip(a.shape, shape, strict=True)
    )
    if not alike or a.dtype != dtype:
      raise UserError(
        f'{path}: {name} is {a.dtype}{list(a.shape)} where {np.dtype(dtype)}{list(shape)} is '
        'needed: remove it'
      )
