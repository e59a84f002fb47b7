"""What an edit does to the weights: low-rank terms that are kept, so that it can be undone and counted.

An edited backbone is always the first one plus the terms in their order. Taking some out is adding up the
others again: without the last of them the bits are those that were there before.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cl_jax.masks import nest, paths
from cl_jax.types import Array, Tree


class Write(NamedTuple):
  """A term that is added to one layer of one stacked matrix: left @ right, or left alone.

  Attributes:
    path: in the backbone, as in 'layers/down/w'.
    layer: index on its leading axis.
    left: f[d_in, rank], or the whole term f[d_in, d_out].
    right: f[rank, d_out], or None.
  """

  path: str
  layer: int
  left: Array
  right: Array | None = None

  @property
  def term(self) -> Array:
    return self.left if self.right is None else self.left @ self.right

  @property
  def size(self) -> int:
    """Bytes."""
    return sum(a.size * a.dtype.itemsize for a in (self.left, self.right) if a is not None)


class Editor(NamedTuple):
  """A way to edit: pure functions, over a backbone and the editor's own state.

  Attributes:
    init: (backbone) -> state; a pytree, every byte of which is charged.
    edit: (backbone, state, requests, key) -> (writes, state, report). `backbone` is the model as edited so
      far, `writes` what comes on top, `report` a dict of arrays [N] by request.
    tap: (state, columns) -> tap, for editors that change the forward pass: a fresh tap for every trace, where
      `columns` i32[B] is the column of the last token of each row's prompt. None writes weights alone.
  """

  init: Any
  edit: Any
  tap: Any = None


def apply(backbone: Tree, writes: Sequence[Write]) -> Tree:
  """The backbone with the terms added, one after the other, in the precision of the weights."""
  leaves = dict(paths(backbone))
  for write in writes:
    a = leaves[write.path]
    leaves[write.path] = a.at[write.layer].add(jnp.asarray(write.term, a.dtype))
  return nest(leaves)


def undone(first: Tree, batches: Sequence[Sequence[Write]], without: Collection[int]) -> Tree:
  """The first backbone with all batches of terms but some, by their numbers.

  Without the last ones it has the bits that it had before they were written. Terms that came after one that
  is taken out stay as they are, though they were found in a model that had it.
  """
  return apply(first, [w for i, batch in enumerate(batches) if i not in without for w in batch])


def put(backbone: Tree, path: str, layer: int, matrix: Array) -> Tree:
  """The backbone with another matrix in one layer."""
  leaves = dict(paths(backbone))
  return nest(leaves | {path: leaves[path].at[layer].set(matrix)})


def merged(writes: Sequence[Write]) -> list[Write]:
  """One whole term a layer for all that was written to it: bounded bytes, no edit can be undone alone."""
  found: dict[tuple[str, int], Array] = {}
  for write in writes:
    where = write.path, write.layer
    found[where] = found[where] + write.term if where in found else write.term
  return [Write(*where, term) for where, term in found.items()]


def size(writes: Sequence[Write]) -> int:
  """Bytes of the terms, as they are kept."""
  return sum(write.size for write in writes)


def factors(left: np.ndarray, right: np.ndarray, path: str, layer: int, dtype: Any) -> Write:
  """A write of factors that were solved for in float64."""
  return Write(path, layer, jnp.asarray(left, dtype), jnp.asarray(right, dtype))
