"""Checkpoints that are whole or absent, verified when they are read, and never guessed at.

A checkpoint is a folder named by its step. It is written beside its place, synced to the disk and
renamed into it, so a killed process leaves the one before. Two digests guard it: sha256.json has one of
every file, and orbax's custom metadata has one of the arrays themselves (orbax loads a flipped payload
byte without a word). What fails either is reported loudly and the step before it is used.

Leaves are stored by path: a checkpoint opens with orbax alone (one of several processes where orbax is told
the shapes, which its metadata says). Nothing is pickled. It does not depend on devices: what several
processes saved together, each the parts that it holds, is read by any number of them, and its digest is that
of the whole arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from cl_jax.durable import files, first_line, reason, sha256, sync, sync_one
from cl_jax.errors import UserError
from cl_jax.masks import path_name
from cl_jax.types import Tree

SUMS = 'sha256.json'
PIECE = 1 << 28  # bytes of an array spread over processes that are brought to the host at once


class Restored(NamedTuple):
  """What `restore` found.

  Attributes:
    tree: like the `like` that was asked for, with NumPy leaves (typed keys stay typed keys); leaves that lie
      on devices of several processes there do so here.
    step: its step.
    extra: what was saved beside it.
  """

  tree: Tree
  step: int
  extra: dict


class Damaged(Exception):
  """A checkpoint that is not what was written."""


def digest(tree: Tree) -> str:
  """sha256 (hex) of the leaves in tree order: dtype, shape and bytes of each; keys by their data.

  Where leaves lie on devices of several processes, all of these must call it.
  """
  total = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    a = plain(leaf)
    total.update(f'{a.dtype}{list(a.shape)};'.encode())
    for part in pieces(a):
      total.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
  return total.hexdigest()


def plain(leaf: Any) -> Any:
  """A leaf as a NumPy array of its bits, a typed key as its data; one that is `apart` as it is."""
  if is_key(leaf):
    leaf = jax.random.key_data(leaf)
  return leaf if apart(leaf) else np.asarray(leaf)


def apart(leaf: Any) -> bool:
  """Whether an array, or one of this shape, lies on devices of other processes as well."""
  sharding = getattr(leaf, 'sharding', None)
  return sharding is not None and not sharding.is_fully_addressable


def pieces(a: Any) -> Iterator[np.ndarray]:
  """The values of a leaf on the host, in order; of one that is `apart`, rows that make a PIECE at a time."""
  if not apart(a) or a.is_fully_replicated:
    yield np.asarray(a)
    return
  whole = NamedSharding(a.sharding.mesh, PartitionSpec())
  rows = max(1, PIECE * len(a) // a.nbytes)
  for start in range(0, len(a), rows):
    yield np.asarray(_rows(a, start, min(rows, len(a) - start), whole))


@partial(jax.jit, static_argnums=(2, 3))
def _rows(a: jax.Array, start: Any, n: int, whole: NamedSharding) -> jax.Array:
  return jax.lax.with_sharding_constraint(jax.lax.dynamic_slice_in_dim(a, start, n), whole)


def is_key(leaf: Any) -> bool:
  return hasattr(leaf, 'dtype') and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def save(
  directory: str | Path,
  step: int,
  tree: Tree,
  config_sha256: str = '',
  extra: dict | None = None,
  keep: int = 2,
) -> Path:
  """Writes checkpoint `step` and removes all but the latest `keep`.

  Args:
    directory: holds the checkpoints of one run.
    step: orders them; saving a step that is there already does nothing.
    tree: any pytree of arrays, typed keys and numbers, such as a `loop.Progress`.
    config_sha256: of the run's config; `restore` refuses another.
    extra: plain JSON kept beside the tree.
    keep: how many stay.

  Where leaves lie on devices of several processes, all of these must call it, with the same directory on a
  disk that they share. Each writes what it holds; the first one names the result.

  Raises:
    UserError: the disk is full or the directory cannot be written; the checkpoints before stay whole.
  """
  ocp = orbax()
  directory = Path(directory).absolute()
  place = directory / f'{step:010d}'
  shared = any(map(apart, jax.tree.leaves(tree)))
  first = not shared or jax.process_index() == 0
  meet = multihost_utils.sync_global_devices if shared else lambda name: None
  part = directory / f'.{place.name}.{"shared" if shared else os.getpid()}.part'
  try:
    directory.mkdir(parents=True, exist_ok=True)
    if place.exists():
      return place
    if first:
      sweep_up(directory)
      part.mkdir()
    meet(f'checkpoint {step} begins')
    leaves = {name: plain(leaf) for name, leaf in named(tree)}
    stored = {
      name: a for name, a in leaves.items() if a.size
    }  # orbax refuses arrays without values
    about = {'leaves_sha256': digest(tree), 'config_sha256': config_sha256, 'extra': extra or {}}
    ocp.save(part / 'tree', stored, custom_metadata=about)
    if shared:
      sync(part)  # each its own files; what others have cached is theirs to sync
      meet(f'checkpoint {step} is written')
    if first:
      sums = {str(f.relative_to(part)): sha256(f) for f in files(part)}
      (part / SUMS).write_text(json.dumps(sums, indent=1, sort_keys=True))
      sync(part)
      part.rename(place)
      sync_one(directory)
      for old in steps(directory)[:-keep]:
        remove(directory / f'{old:010d}')
    meet(f'checkpoint {step} has its name')
  except Exception as error:
    discard(part)
    raise UserError(
      f'no checkpoint could be written to {directory}, those before it are whole: {reason(error)}'
    ) from error
  return place


def discard(part: Path, patience: float = 2.0) -> None:
  """Removes a half-written checkpoint, into which other threads of orbax may still be writing."""
  end = time.monotonic() + patience
  shutil.rmtree(part, ignore_errors=True)
  while part.exists() and time.monotonic() < end:
    time.sleep(0.02)
    shutil.rmtree(part, ignore_errors=True)


def restore(
  directory: str | Path,
  like: Tree,
  config_sha256: str = '',
  tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> Restored | None:
  """The latest checkpoint that is whole; None when there is none at all.

  Args:
    directory: what `save` was given.
    like: arrays or `jax.ShapeDtypeStruct`s of the structure, shapes and dtypes that must be there. Those with
      a sharding over several processes are read so, each process its own parts.
    config_sha256: of the config that goes on.
    tell: gets one line for every checkpoint that is damaged.

  Raises:
    UserError: the checkpoint is of another config or program, or none of them is whole.
  """
  directory = Path(directory).absolute()
  if not directory.is_dir():
    return None
  try:
    if not any(map(apart, jax.tree.leaves(like))) or jax.process_index() == 0:
      sweep_up(directory)
  except OSError:
    pass  # reading does not need a tidy or writable directory
  found = steps(directory)
  for step in reversed(found):
    place = directory / f'{step:010d}'
    try:
      return _read(place, step, like, config_sha256)
    except Damaged as damage:
      earlier = [s for s in found if s < step]
      then = f'going back to step {earlier[-1]}' if earlier else 'there is none before it'
      tell(f'WARNING: THE CHECKPOINT {place} IS DAMAGED ({damage}); {then}')
  if found:
    raise UserError(
      f'none of the checkpoints in {directory} is whole: remove that folder to start from the beginning'
    )
  return None


def steps(directory: Path) -> list[int]:
  """The steps that are there, ascending; whether they are whole is found out when they are read."""
  return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit() and p.is_dir())


def _read(place: Path, step: int, like: Tree, config_sha256: str) -> Restored:
  ocp = orbax()
  try:
    _check_files(place)
    metadata = ocp.metadata(place / 'tree')
    about, stored = metadata.custom_metadata, metadata.metadata
  except Damaged:
    raise
  except Exception as error:  # orbax and tensorstore raise deep chains of their own
    raise Damaged(first_line(error)) from error
  if not isinstance(about, dict) or not isinstance(stored, dict):
    raise Damaged('its metadata is missing')
  if about['config_sha256'] != config_sha256:
    raise UserError(
      f'{place} belongs to another config ({about["config_sha256"][:12]}..., this one is '
      f'{config_sha256[:12]}...): use another --workdir, or remove that folder'
    )
  wanted = {}
  for name, want in named(like):
    shape = np.shape(want)
    dtype = want.dtype if hasattr(want, 'dtype') else np.asarray(want).dtype
    if is_key(want):
      data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))
      shape, dtype = data.shape, data.dtype
    if 0 in shape and name not in stored:
      continue
    _fits(place, name, stored.pop(name, None), shape, np.dtype(dtype))
    if apart(want) and not is_key(want):
      wanted[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=want.sharding)
    else:  # orbax makes a NumPy array of what a NumPy array stands for; this one takes no memory
      wanted[name] = np.broadcast_to(np.zeros((), dtype), shape)
  if stored:
    raise UserError(f'{place} holds {next(iter(stored))}, which this program has no place for')
  try:
    found = ocp.load(place / 'tree', wanted)
  except Exception as error:
    raise Damaged(first_line(error)) from error
  leaves = []
  for name, want in named(like):
    a = found.get(name) if name in wanted else np.zeros(np.shape(want), want.dtype)
    key = is_key(want)
    leaves.append(jax.random.wrap_key_data(jnp.asarray(a), impl=_impl(want)) if key else a)
  tree = jax.tree.unflatten(jax.tree.structure(like), leaves)
  if digest(tree) != about['leaves_sha256']:
    raise Damaged('its arrays do not have their sha256')
  return Restored(tree, step, about['extra'])


def _fits(place: Path, name: str, a: Any, shape: tuple, dtype: np.dtype) -> None:
  if a is None:
    raise UserError(f'{place} lacks {name}: it was written by another version of the program')
  if a.shape != shape or a.dtype != dtype:
    raise UserError(
      f'{place}: {name} is {a.dtype}{list(a.shape)} where {dtype}{list(shape)} is needed: it was '
      'written by another version of the program or for other data'
    )


def _impl(key: Any) -> Any:
  """The generator of a typed key, abstract or not."""
  found = []
  jax.eval_shape(lambda k: found.append(jax.random.key_impl(k)), key)
  return found[0]


def _check_files(place: Path) -> None:
  try:
    sums = json.loads((place / SUMS).read_text())
    there = {str(f.relative_to(place)) for f in files(place)} - {SUMS}
    if lost := sorted(set(sums) ^ there):
      raise Damaged(f'{lost[0]} is missing or does not belong to it')
    for name, known in sums.items():
      if sha256(place / name) != known:
        raise Damaged(f'{name} does not have its sha256')
  except (OSError, ValueError, TypeError, AttributeError) as error:
    raise Damaged(f'{SUMS} cannot be read: {first_line(error)}') from error


def named(tree: Tree) -> Iterator[tuple[str, Any]]:
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield path_name(path), leaf


def remove(place: Path) -> None:
  """Removes a checkpoint; it loses its name first, so that no half of it is ever taken for one."""
  grave = place.with_name(f'.{place.name}.{os.getpid()}.old')
  place.rename(grave)
  shutil.rmtree(grave, ignore_errors=True)


def sweep_up(directory: Path) -> None:
  """Removes what killed processes left behind."""
  for path in directory.iterdir():
    if path.name.startswith('.') and path.suffix in ('.part', '.old'):
      shutil.rmtree(path, ignore_errors=True)


def orbax() -> Any:
  try:
    from orbax.checkpoint import v1 as ocp
  except ImportError as error:
    raise UserError(f'checkpoints need orbax: pip install orbax-checkpoint ({error})') from error
  return ocp
