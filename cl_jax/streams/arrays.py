"""One split of a dataset as NumPy arrays, and the checks that stand between a file and a stream."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from cl_jax.errors import UserError
from cl_jax.streams.order import shuffled
from cl_jax.streams.records import Records

Tree = Any


class Arrays(NamedTuple):
  """Examples in the order of their source.

  Attributes:
    x: inputs; every leaf [N, ...]. Images are u8[N, H, W, C]; features f32[N, D]; text is
      {'tokens': i32[N, L], 'mask': bool[N, L]}. `Records` where they stay in files.
    y: i32[N] labels, counted from 0.
    domain: i32[N], where an example comes from (speaker, alphabet, topic); None without one.
    names: the name of every label; its length is the number of classes.
    domain_names: the name of every domain; () without one.
  """

  x: Tree
  y: np.ndarray
  domain: np.ndarray | None = None
  names: tuple[str, ...] = ()
  domain_names: tuple[str, ...] = ()


# What numpy and zipfile raise for an .npz that is cut short, changed or something else.
DAMAGED = (OSError, ValueError, EOFError, KeyError, RuntimeError, zlib.error, zipfile.BadZipFile)


def arrays(x: Tree, y, domain=None, names=(), domain_names=(), where: str = 'data') -> Arrays:
  """Builds checked `Arrays`.

  Floating inputs are stored as float32, wider integers as int32 (values are checked first); labels
  become int32. Missing names are the numbers themselves.

  Args:
    x: a tree of arrays with the same leading axis N.
    y: integer labels [N].
    domain: integer domains [N] or None.
    names: label names; () means '0' to the largest label.
    domain_names: domain names; () means '0' to the largest domain.
    where: how messages call this data, such as 'mnist train'.

  Raises:
    UserError: wrong shapes or dtypes, NaN or infinity (with its row), labels out of range.
  """
  y = _ints(y, 'labels', where)
  count = len(y)
  if count == 0:
    raise UserError(f'{where}: there are no examples; check the split and its files')
  leaves = jax.tree.leaves(x)
  if not leaves:
    raise UserError(f'{where}: x holds no array; pass inputs with {count} rows')
  x = jax.tree_util.tree_map_with_path(lambda path, leaf: _leaf(path, leaf, count, where), x)
  names = tuple(map(str, names)) or tuple(map(str, range(int(y.max()) + 1)))
  _in_range(y, len(names), 'label', where)
  if domain is not None:
    domain = _ints(domain, 'domains', where)
    if len(domain) != count:
      raise UserError(f'{where}: {len(domain)} domains for {count} labels; they must be as many')
    domain_names = tuple(map(str, domain_names)) or tuple(map(str, range(int(domain.max()) + 1)))
    _in_range(domain, len(domain_names), 'domain', where)
  elif domain_names:
    raise UserError(f'{where}: domain names without domains; pass both or neither')
  return Arrays(x, y, domain, names, domain_names)


def check_pair(train: Arrays, test: Arrays, where: str = 'data') -> None:
  """Checks that two splits belong together and that every class can be learnt.

  Raises:
    UserError: other inputs, names or domains in `test` than in `train`, or a class of `names`
      without a training example.
  """
  for name, a, b in (
    ('label', train.names, test.names),
    ('domain', train.domain_names, test.domain_names),
  ):
    if a != b:
      raise UserError(
        f'{where}: train has {len(a)} {name} names and test {len(b)}, or in another '
        f'order; load both splits with the same {name} names'
      )
  if jax.tree.structure(train.x) != jax.tree.structure(test.x):
    raise UserError(f'{where}: the inputs of train and test have different structures')
  test_leaves = jax.tree.leaves(test.x)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(train.x), test_leaves, strict=True):
    if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
      raise UserError(
        f'{where}: x{jax.tree_util.keystr(path)} is {a.dtype}{a.shape[1:]} an example '
        f'in train but {b.dtype}{b.shape[1:]} in test'
      )
  counts = np.bincount(train.y, minlength=len(train.names))
  empty = np.flatnonzero(counts == 0)
  if len(empty):
    first = int(empty[0])
    raise UserError(
      f'{where}: {len(empty)} of {len(train.names)} classes have no training example '
      f'(the first is {first}, {train.names[first]!r}); number the labels from 0 without gaps, or drop these '
      'with streams.arrays.compact()'
    )


def rows(data: Arrays, index: np.ndarray) -> Arrays:
  """The examples `index` of `data`, in that order."""
  return data._replace(
    x=jax.tree.map(lambda leaf: leaf[index], data.x),
    y=data.y[index],
    domain=None if data.domain is None else data.domain[index],
  )


def compact(train: Arrays, *others: Arrays) -> tuple[Arrays, ...]:
  """Renumbers labels so that only classes with a training example remain.

  Examples of `others` whose class does not occur in `train` are left out; domains likewise.
  """
  used = np.unique(train.y)
  table = np.full(len(train.names), -1, np.int32)
  table[used] = np.arange(len(used), dtype=np.int32)
  names = tuple(train.names[i] for i in used)
  domain_table, domain_names = None, ()
  if train.domain is not None:
    here = np.unique(train.domain)
    domain_table = np.full(len(train.domain_names), -1, np.int32)
    domain_table[here] = np.arange(len(here), dtype=np.int32)
    domain_names = tuple(train.domain_names[i] for i in here)
  out = []
  for data in (train, *others):
    keep = table[data.y] >= 0
    if domain_table is not None:
      keep &= domain_table[data.domain] >= 0
    data = rows(data, np.flatnonzero(keep)) if not keep.all() else data
    domain = None if domain_table is None else domain_table[data.domain]
    out.append(Arrays(data.x, table[data.y], domain, names, domain_names))
  return tuple(out)


def hold_out(data: Arrays, fraction: float, seed: int, purpose: str) -> tuple[Arrays, Arrays]:
  """Cuts `data` in two: the rest, and a seeded `fraction` of every class. Nothing is in both."""
  rest, held = held_out(data.y, fraction, seed, purpose)
  return rows(data, rest), rows(data, held)


def held_out(
  y: np.ndarray, fraction: float, seed: int, purpose: str, group: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """(rest, held) row numbers, ascending: of each class the rounded `fraction`, at least 1.

  Args:
    y: i32[N] labels.
    group: [N]; the classes of each group (a task) are cut on their own. None = one group.

  Raises:
    UserError: a class with fewer than two examples cannot be cut.
  """
  if not 0.0 < fraction < 1.0:
    raise UserError(f'{purpose}: the fraction must lie between 0 and 1; got {fraction}')
  held = np.zeros(len(y), bool)
  for part, inside in groups(np.zeros(len(y), np.int32) if group is None else group):
    for label, members in groups(y[inside]):
      size = len(members)
      if size < 2:
        raise UserError(f'{purpose}: class {label} has one example only and cannot be cut in two')
      count = min(max(1, round(fraction * size)), size - 1)
      held[inside[members[shuffled(seed, f'{purpose}/{part}/{label}', size)[:count]]]] = True
  return np.flatnonzero(~held), np.flatnonzero(held)


def groups(y: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
  """(label, ascending row numbers) of every label that occurs, labels ascending."""
  order = np.argsort(y, kind='stable')
  labels, starts = np.unique(y[order], return_index=True)
  for label, members in zip(labels, np.split(order, starts[1:]), strict=True):
    yield int(label), members


def _ints(values, what: str, where: str) -> np.ndarray:
  values = np.asarray(values)
  if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
    raise UserError(
      f'{where}: {what} must be integers of shape [N]; got {values.dtype}{list(values.shape)}'
    )
  return _int32(values, what, where)


def _int32(values: np.ndarray, what: str, where: str) -> np.ndarray:
  limits = np.iinfo(np.int32)
  if values.size and (values.min() < limits.min or values.max() > limits.max):
    raise UserError(f'{where}: {what} do not fit into 32 bits; the largest is {values.max()}')
  return values.astype(np.int32, copy=False)


def _in_range(values: np.ndarray, count: int, what: str, where: str) -> None:
  bad = np.flatnonzero((values < 0) | (values >= count))
  if len(bad):
    row = int(bad[0])
    raise UserError(
      f'{where}: row {row} has {what} {values[row]}, outside 0 to {count - 1} '
      f'({len(bad)} such rows)'
    )


def _leaf(path, leaf, count: int, where: str) -> Any:
  if isinstance(leaf, Records) and len(leaf) == count:
    return leaf  # checked when it is read
  leaf, name = np.asarray(leaf), f'x{jax.tree_util.keystr(path)}'
  if leaf.ndim == 0 or len(leaf) != count:
    raise UserError(
      f'{where}: {name} has shape {list(leaf.shape)} but there are {count} labels; '
      'the leading axis must be the example'
    )
  if leaf.dtype == np.uint8 and leaf.ndim == 3:
    raise UserError(
      f'{where}: {name} is uint8{list(leaf.shape)}; images are [N, H, W, C], so add '
      'a last axis of 1 to grey ones'
    )
  if leaf.size == 0:
    raise UserError(f'{where}: {name} has shape {list(leaf.shape)}, which holds no values')
  if leaf.dtype in (np.uint8, np.bool_):
    return leaf
  if np.issubdtype(leaf.dtype, np.integer):
    return _int32(leaf, name, where)
  if np.issubdtype(leaf.dtype, np.floating):
    with np.errstate(over='ignore'):  # what overflows is infinite and named below
      leaf = leaf.astype(np.float32, copy=False)
    if not np.isfinite(leaf).all():
      finite = np.isfinite(leaf.reshape(count, -1)).all(axis=1)
      row = int(np.argmin(finite))
      raise UserError(
        f'{where}: {name} has NaN or infinity in row {row} ({int((~finite).sum())} '
        'such rows); clean the data or drop those rows'
      )
    return leaf
  raise UserError(f'{where}: {name} has dtype {leaf.dtype}; use uint8, bool, int32 or float32')
