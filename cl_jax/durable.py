"""Files that are whole or absent, whatever happens to the process or the disk."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from cl_jax.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_WORDS = ('No space left', 'Disk quota exceeded', 'File too large', 'RESOURCE_EXHAUSTED')
MAKE_ROOM = 'the disk is full; make room and run the same command again'


def write(path: Path, text: str) -> None:
  """Replaces a file by one with this text that is on the disk; see `replace`."""
  replace(path, lambda file: file.write(text.encode('utf-8')))


def replace(path: Path, fill: Callable[[IO[bytes]], Any]) -> None:
  """Replaces a file by one that is on the disk, into which `fill` puts its bytes.

  Raises:
    UserError: it cannot be written; what was there before stays.
  """
  part = path.with_name(f'.{path.name}.{os.getpid()}.part')
  try:
    with part.open('wb') as file:
      fill(file)
      file.flush()
      os.fsync(file.fileno())
    part.replace(path)
    sync_one(path.parent)
  except OSError as error:
    part.unlink(missing_ok=True)
    raise UserError(f'{path} cannot be written: {reason(error)}') from error


def reason(error: BaseException) -> str:
  """Why something could not be written, in words."""
  return MAKE_ROOM if full(error) else f'{first_line(error)}; check that it is writable'


def full(error: BaseException) -> bool:
  """Whether the disk is full; looks through the chain of errors that libraries raise."""
  chain: list[BaseException] = []
  link: BaseException | None = error
  while link is not None and link not in chain:
    chain.append(link)
    link = link.__cause__ or link.__context__
  return any(
    getattr(e, 'errno', None) in FULL or any(word in str(e) for word in FULL_WORDS) for e in chain
  )


def first_line(error: BaseException) -> str:
  """The message of an error on one line, not too long."""
  return ' '.join(str(error).split())[:200] or type(error).__name__


def files(folder: Path) -> list[Path]:
  """All files below a folder, in the order of their paths."""
  return sorted(p for p in folder.rglob('*') if p.is_file())


def sha256(path: Path) -> str:
  """Hexadecimal digest of a file's bytes."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def sync(folder: Path) -> None:
  """Forces a folder and all in it onto the disk."""
  for path in (*folder.rglob('*'), folder):
    sync_one(path)


def sync_one(path: Path) -> None:
  """Forces a file, or the names in a folder, onto the disk."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
