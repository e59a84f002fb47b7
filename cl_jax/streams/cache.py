"""Arrays that are costly to make, kept as .npy files and verified whenever they are read.

An entry is a folder: one .npy per array and `entry.json` with their sizes, shapes and sha256. It is
written beside its place and renamed into it, so a half-written entry never carries the name; what
was damaged afterwards is noticed, reported and made again. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)
MANIFEST = 'entry.json'
DAMAGE = (OSError, ValueError, KeyError, TypeError)  # what reading a damaged entry can raise
ABANDONED = 3600.0  # seconds after which a half-written entry is removed


def directory() -> Path:
  """CL_JAX_CACHE, or cl_jax below the user's cache directory."""
  if own := os.environ.get('CL_JAX_CACHE'):
    return Path(own).expanduser()
  return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache').expanduser() / 'cl_jax'


def cached(
  key: tuple[str, ...],
  make: Callable[[], dict[str, np.ndarray]],
  what: str,
  root: Path | None = None,
) -> dict[str, np.ndarray]:
  """The arrays stored under `key`, or those that `make` returns, which are then stored.

  Args:
    key: path below the cache directory, such as ('tfds', 'mnist-3.0.1-train-0f3a...').
    make: () -> arrays by name (letters, digits, '_').
    what: the thing in words, for messages.
    root: the cache directory; None = `directory()`.

  A cache that cannot be written (read-only, full disk) is reported as a warning and not used.
  """
  place = (root or directory()).joinpath(*(re.sub(r'[^\w.=-]', '_', part) for part in key))
  if place.exists():
    try:
      return _read(place)
    except DAMAGE as error:
      log.warning('cache of %s is damaged (%s); making it again in %s', what, error, place)
  else:
    log.info('preparing %s once; kept in %s', what, place)
  made = make()
  try:
    _write(place, made)
  except OSError as error:
    log.warning(
      'cannot keep %s in %s (%s); it will be prepared again next time, or set CL_JAX_CACHE '
      'to a writable directory',
      what,
      place,
      error,
    )
  return made


def digest(*parts: bytes | str | Path) -> str:
  """sha256 (hex) over byte strings, texts and the contents of files (paths), kept apart."""
  total = hashlib.sha256()
  for part in parts:
    if isinstance(part, Path):
      with part.open('rb') as file:
        total.update(hashlib.file_digest(file, 'sha256').digest())
    else:
      total.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
  return total.hexdigest()


def _read(place: Path) -> dict[str, np.ndarray]:
  files = json.loads((place / MANIFEST).read_text())['files']
  arrays = {}
  for name, entry in files.items():
    path = place / f'{name}.npy'
    if path.parent != place:
      raise ValueError(f'{name!r} is not the name of an array')
    size = path.stat().st_size
    if size != entry['size']:
      raise ValueError(f'{path.name} has {size} bytes instead of {entry["size"]}')
    with path.open('rb') as file:
      if hashlib.file_digest(file, 'sha256').hexdigest() != entry['sha256']:
        raise ValueError(f'{path.name} does not have its sha256')
    arrays[name] = np.load(path, allow_pickle=False)
  return arrays


def _whole(place: Path) -> bool:
  try:
    _read(place)
  except DAMAGE:
    return False
  return True


def _write(place: Path, arrays: dict[str, np.ndarray]) -> None:
  place.parent.mkdir(parents=True, exist_ok=True)
  for left in place.parent.glob(f'.{place.name}.*'):  # by a process that was killed
    with contextlib.suppress(OSError):  # another writer may remove its own meanwhile
      if time.time() - left.stat().st_mtime > ABANDONED:
        shutil.rmtree(left, ignore_errors=True)
  beside = Path(tempfile.mkdtemp(prefix=f'.{place.name}.', dir=place.parent))
  try:
    files = {}
    for name, array in arrays.items():
      path = beside / f'{name}.npy'
      with path.open('wb') as file:
        np.save(file, np.ascontiguousarray(array), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
      with path.open('rb') as file:
        sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
      files[name] = {'size': path.stat().st_size, 'sha256': sha256}
    (beside / MANIFEST).write_text(json.dumps({'files': files}, indent=1, sort_keys=True))
    try:
      beside.rename(place)
    except OSError:
      if _whole(place):  # another process was faster
        return
      old = Path(tempfile.mkdtemp(prefix=f'.{place.name}.', dir=place.parent))
      place.rename(old / 'old')
      beside.rename(place)
      shutil.rmtree(old, ignore_errors=True)
  finally:
    shutil.rmtree(beside, ignore_errors=True)
