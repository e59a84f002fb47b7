"""An exported learner on disk: a directory whose manifest.json has the digest of every file, and its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cl_jax import durable
from cl_jax.errors import UserError

MANIFEST, STATE, BUILD = 'manifest.json', 'state0.bin', 'build'
FORMAT = 2


class Artefact(NamedTuple):
  """What `read` returns: the directory, its manifest, and the leaves of the initial state."""

  folder: Path
  manifest: dict[str, Any]
  leaves: list[np.ndarray]


def pack(leaves: Sequence[np.ndarray]) -> bytes:
  """Leaves one after the other, row-major, little-endian, without padding."""
  return b''.join(_little(a).tobytes() for a in leaves)


def unpack(blob: bytes, state: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
  """The leaves of a blob; `state` is the manifest's table."""
  leaves, at = [], 0
  for leaf in state:
    part = blob[at : at + leaf['bytes']]
    leaves.append(np.frombuffer(part, np.dtype(leaf['dtype'])).reshape(leaf['shape']))
    at += leaf['bytes']
  if at != len(blob):
    raise UserError(f'a state of {len(blob):,} bytes where the manifest has {at:,}')
  return leaves


def fnv(data: bytes) -> str:
  """FNV-1a, 64 bits: what an agent prints of its state."""
  h = 14695981039346656037
  for byte in data:
    h = ((h ^ byte) * 1099511628211) & 0xFFFFFFFFFFFFFFFF
  return f'{h:016x}'


def write(folder: Path, manifest: Mapping[str, Any], files: Mapping[str, str | bytes]) -> dict:
  """Writes the files and last the manifest, with digests; returns it.

  An artefact that is there is replaced, whole or not; a directory with anything else in it is refused.
  """
  if folder.exists() and not folder.is_dir():
    raise UserError(f'--out: {folder} is not a directory')
  before = listed(folder)
  ours = {*files, *before, BUILD} | ({MANIFEST} if before else set())
  if folder.is_dir():
    others = (p.name for p in folder.iterdir() if p.name not in ours)
    if strange := sorted(name for name in others if not name.startswith('.')):
      raise UserError(
        f'--out: {folder} holds other files ({strange[0]}): name a new or an empty directory'
      )
  folder.mkdir(parents=True, exist_ok=True)
  (folder / MANIFEST).unlink(missing_ok=True)  # half an artefact is none
  for name in before - files.keys():
    (folder / name).unlink(missing_ok=True)
  table = {}
  for name, content in files.items():
    data = content.encode() if isinstance(content, str) else content
    durable.replace(folder / name, lambda file, data=data: file.write(data))
    table[name] = {'bytes': len(data), 'sha256': hashlib.sha256(data).hexdigest()}
  whole = {'format': FORMAT, **manifest, 'files': table}
  whole['sha256'] = digest(whole)
  durable.write(folder / MANIFEST, json.dumps(whole, indent=1) + '\n')
  return whole


def listed(folder: Path) -> set[str]:
  """The files of the artefact that is there, of any version; {} where its manifest is none of ours."""
  try:
    manifest = json.loads((folder / MANIFEST).read_text())
    own = {name for name in manifest['files'] if Path(name).name == name}
    return own if manifest['sha256'] == digest(manifest) else set()
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return set()


def digest(manifest: Mapping[str, Any]) -> str:
  """sha256 of a manifest without its own digest."""
  rest = {k: v for k, v in manifest.items() if k != 'sha256'}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read(folder: Path) -> Artefact:
  """Reads an artefact.

  Raises:
    UserError: there is none, or a file is missing or is not what was exported.
  """
  path = folder / MANIFEST
  if not path.is_file():
    raise UserError(f'{folder} holds no exported learner (no {MANIFEST}): run experiments.export')
  try:
    manifest = json.loads(path.read_text())
    sound = manifest['sha256'] == digest(manifest)
    files = manifest['files']
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{path} is no manifest ({error}): export the learner again') from error
  if not sound:
    raise UserError(f'{path} was changed after the export (sha256 differs): export again')
  if manifest['format'] != FORMAT:
    raise UserError(f'{path} has format {manifest["format"]}, this version reads {FORMAT}')
  for name, entry in files.items():
    file = folder / name
    if not file.is_file():
      raise UserError(f'{file} is missing: export the learner again')
    if durable.sha256(file) != entry['sha256']:
      raise UserError(f'{file} was changed after the export (sha256 differs): export again')
  return Artefact(folder, manifest, unpack((folder / STATE).read_bytes(), manifest['state']))


def _little(a: np.ndarray) -> np.ndarray:
  a = np.asarray(a)
  return np.ascontiguousarray(a.astype(a.dtype.newbyteorder('<'), copy=False))
