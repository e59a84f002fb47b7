"""Checkpoints that are whole or absent, verified when they are read, and never guessed at.

A checkpoint is a folder named by its step. It is written beside its place, synced to the disk and
renamed into it, so a killed process leaves the one before. Two digests guard it: sha256.json has one of
every file, and orbax's custom metadata has one of the arrays themselves (orbax loads a flipped payload
byte without a word). What fails either is reported loudly and the step before it is used; the damaged one
is set aside under another name, so that the run can save that step again.

Leaves are stored by path: a checkpoint opens with orbax alone (one of several processes where orbax is told
the shapes, which its metadata says). Nothing is pickled. It does not depend on devices: what several
processes saved together, each the parts that it holds, is read by any number of them, and its digest is that
of the whole arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from cl_jax.durable import files, first_line, full, reason, sha256, sync, sync_one
from cl_jax.errors import UserError
from cl_jax.masks import path_name
from cl_jax.types import Tree

SUMS = 'sha256.json'
STEP = re.compile('[0-9]{10,}')  # the name of a checkpoint's folder
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
    UserError: the disk is full, the directory cannot be written, or is not shared; the checkpoints before
      stay whole. What else happens between processes, such as the end of one of them, is raised as it is.
  """
  ocp = orbax()
  directory = Path(directory).absolute()
  place = directory / f'{step:010d}'
  shared = any(map(apart, jax.tree.leaves(tree)))
  first = not shared or jax.process_index() == 0
  meet = multihost_utils.sync_global_devices if shared else lambda name: None
  part = directory / f'.{place.name}.{os.getpid()}.part'
  try:
    directory.mkdir(parents=True, exist_ok=True)
    # The first one's answer is all's; a number of this attempt, so that nothing of an earlier one is seen.
    there, attempt = everywhere((place.exists(), secrets.randbits(30)), shared)[0]
    if there:
      return place
    part = directory / f'.{place.name}.{attempt}.part'
    if first:
      sweep_up(directory)
      part.mkdir()
    meet(f'checkpoint {step} begins')
    seen = everywhere((visible(part),), shared)[:, 0]
    if not seen.all():
      raise UserError(
        f'{directory} is not on a disk that all {len(seen)} processes share: process {int(seen.argmin())} '
        'does not see what process 0 writes there; name a --workdir that they do'
      )
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
  except UserError:
    discard(part)
    raise
  except Exception as error:
    discard(part)
    if shared and not of_disk(error):
      raise
    raise UserError(
      f'no checkpoint could be written to {directory}, those before it are whole: {reason(error)}'
    ) from error
  return place


def everywhere(values: Sequence[int], shared: bool) -> np.ndarray:
  """i32[processes, values]: what each process says; this one alone where nothing is `shared`."""
  own = np.array(values, np.int32)
  return np.asarray(multihost_utils.process_allgather(own)) if shared else own[None]


def visible(part: Path, patience: float = 10.0) -> bool:
  """Whether a folder that was made on another machine is there; network disks may take seconds to show it."""
  end = time.monotonic() + patience
  while not (found := part.is_dir()) and time.monotonic() < end:
    time.sleep(0.1)
  return found


def of_disk(error: BaseException) -> bool:
  """Whether an error is one of writing, and not of talking to other processes."""
  talk = isinstance(error, ConnectionError | TimeoutError)
  return (isinstance(error, OSError) and not talk) or full(error)


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
  tidy: bool = True,
) -> Restored | None:
  """The latest checkpoint that is whole; None when there is none at all.

  Damaged ones after it are renamed to STEP.damaged. Processes that share leaves of `like` must all call it,
  and what one of them finds damaged is so for all.

  Args:
    directory: what `save` was given.
    like: arrays or `jax.ShapeDtypeStruct`s of the structure, shapes and dtypes that must be there. Those with
      a sharding over several processes are read so, each process its own parts.
    config_sha256: of the config that goes on.
    tell: gets one line for every checkpoint that is damaged.
    tidy: remove what a process that was killed had begun to write. Not where another one may be writing.

  Raises:
    UserError: the checkpoint is of another config or program, none of them is whole, or processes that read
      one together do not see the same ones.
  """
  directory = Path(directory).absolute()
  shared = any(map(apart, jax.tree.leaves(like)))
  first = not shared or jax.process_index() == 0
  found = steps(directory) if directory.is_dir() else []
  seen = everywhere((len(found), found[-1] if found else -1), shared)
  if (seen != seen[0]).any():
    raise UserError(
      f'the {len(seen)} processes do not see the same checkpoints in {directory}: it must be on a disk that '
      'they share, and have had a moment to show what was written last'
    )
  if not found:
    return None
  if first and tidy:
    try:
      sweep_up(directory)
    except OSError:
      pass  # reading does not need a tidy or writable directory
  damaged: list[Path] = []
  for step in reversed(found):
    place = directory / f'{step:010d}'
    try:
      read = _read(place, step, like, config_sha256, shared)
    except Damaged as damage:
      damaged.append(place)
      earlier = [s for s in found if s < step]
      then = f'going back to step {earlier[-1]}' if earlier else 'there is none before it'
      tell(f'WARNING: THE CHECKPOINT {place} IS DAMAGED ({damage}); {then}')
      continue
    if first:  # only now: where none is whole the folder stays as it is
      for other in damaged:
        set_aside(other)
    return read
  raise UserError(
    f'none of the checkpoints in {directory} is whole: remove that folder to start from the beginning'
  )


def steps(directory: Path) -> list[int]:
  """The steps that are there, ascending; whether they are whole is found out when they are read."""
  return sorted(int(p.name) for p in directory.iterdir() if STEP.fullmatch(p.name) and p.is_dir())


def _read(place: Path, step: int, like: Tree, config_sha256: str, shared: bool) -> Restored:
  ocp = orbax()

  def described() -> tuple[dict, dict]:
    _check_files(place)
    metadata = ocp.metadata(place / 'tree')
    if not isinstance(metadata.custom_metadata, dict) or not isinstance(metadata.metadata, dict):
      raise Damaged('its metadata is missing')
    return metadata.custom_metadata, metadata.metadata

  about, stored = _agreed(described, shared)
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
  found = _agreed(lambda: ocp.load(place / 'tree', wanted), shared)
  leaves = []
  for name, want in named(like):
    a = found.get(name) if name in wanted else np.zeros(np.shape(want), want.dtype)
    key = is_key(want)
    leaves.append(jax.random.wrap_key_data(jnp.asarray(a), impl=_impl(want)) if key else a)
  tree = jax.tree.unflatten(jax.tree.structure(like), leaves)
  if digest(tree) != about['leaves_sha256']:
    raise Damaged('its arrays do not have their sha256')
  return Restored(tree, step, about['extra'])


def _agreed(work: Callable[[], Any], shared: bool) -> Any:
  """What `work` gives; Damaged, for all processes, where it fails in any."""
  found, damage = None, None
  try:
    found = work()
  except Damaged as error:
    damage = error
  except Exception as error:  # orbax and tensorstore raise deep chains of their own
    damage = Damaged(first_line(error))
    damage.__cause__ = error
  bad = everywhere((damage is not None,), shared)[:, 0]
  if damage is not None:
    raise damage
  if bad.any():
    raise Damaged(f'as process {int(bad.argmax())} of {len(bad)} finds')
  return found


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


def set_aside(place: Path) -> None:
  """Takes its name from a damaged checkpoint; nothing happens where the directory cannot be written."""
  grave = place.with_name(f'{place.name}.damaged')
  shutil.rmtree(grave, ignore_errors=True)
  try:
    place.rename(grave)
  except OSError:
    pass  # whoever saves that step will say why it cannot be


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
