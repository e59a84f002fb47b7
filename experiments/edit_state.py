"""How far an editing run has come, on disk: the terms written, the editor's state, what was measured.

One file, replaced whole. What was killed goes on after the last batch that was saved, with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax.editing import kept
from cl_jax.editing.write import Write
from cl_jax.errors import UserError
from cl_jax.types import Tree

FILE = 'state.npz'


class Saved(NamedTuple):
  """What a run needs to go on.

  Attributes:
    about: JSON: the digest of the configuration, the edits done, what was measured so far.
    writes: every term so far.
    state: the editor's.
  """

  about: dict[str, Any]
  writes: list[Write]
  state: Tree


def save(folder: Path, saved: Saved) -> None:
  """Replaces the file.

  Raises:
    UserError: it cannot be written; what was there before stays.
  """
  arrays = {f'state{i}': np.asarray(a) for i, a in enumerate(jax.tree.leaves(saved.state))}
  terms, factors = packed(saved.writes)
  kept.save(folder / FILE, {**saved.about, 'writes': terms}, arrays | factors)


def packed(writes: Sequence[Write]) -> tuple[list, dict[str, np.ndarray]]:
  """(where each term belongs, as JSON, and its factors by name)."""
  arrays = {}
  for i, write in enumerate(writes):
    arrays[f'left{i}'] = np.asarray(write.left)
    if write.right is not None:
      arrays[f'right{i}'] = np.asarray(write.right)
  return [[write.path, write.layer] for write in writes], arrays


def unpacked(terms: Sequence, arrays: Mapping[str, Any]) -> list[Write]:
  """What `packed` has taken apart, on the device: NumPy would round the products of factors differently."""
  there = {name: jnp.asarray(a) for name, a in arrays.items()}
  return [
    Write(name, layer, there[f'left{i}'], there.get(f'right{i}'))
    for i, (name, layer) in enumerate(terms)
  ]


def restore(folder: Path, of: Mapping[str, str], state: Tree) -> Saved | None:
  """What was saved, None if nothing was.

  Args:
    of: what goes on, entries of `Saved.about` that the file must have: digests of the configuration, ...
    state: of the editor at its start, whose structure and shapes the saved one must have.

  Raises:
    UserError: the file is damaged, or of something else.
  """
  path = folder / FILE
  if not path.exists():
    return None
  about, arrays = kept.load(path)
  kept.same(path, about, of)
  leaves, shape = jax.tree.flatten(state)
  names = [f'state{i}' for i in range(len(leaves))]
  if any(
    n not in arrays or arrays[n].shape != np.shape(a) for n, a in zip(names, leaves, strict=True)
  ):
    raise UserError(f'{path} holds the state of another editor: remove it to begin anew')
  writes = unpacked(about.pop('writes'), arrays)
  return Saved(about, writes, jax.tree.unflatten(shape, [jnp.asarray(arrays[n]) for n in names]))
