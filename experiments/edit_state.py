"""How far an editing run has come, on disk: the terms written, the editor's state, what was measured.

One file, replaced whole: a .npz (no pickle) and its digest. What was killed goes on after the last batch that
was saved, with the same bits.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax import durable
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
  leaves = jax.tree.leaves(saved.state)
  arrays = {f'state{i}': np.asarray(a) for i, a in enumerate(leaves)}
  terms = []
  for i, write in enumerate(saved.writes):
    terms.append([write.path, write.layer, write.right is not None])
    arrays[f'left{i}'] = np.asarray(write.left)
    if write.right is not None:
      arrays[f'right{i}'] = np.asarray(write.right)
  about = json.dumps({**saved.about, 'writes': terms, 'leaves': len(leaves)})
  file = io.BytesIO()
  arrays['about'] = np.frombuffer(about.encode(), np.uint8)
  np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
  content = file.getvalue()
  durable.write_bytes(folder / FILE, hashlib.sha256(content).digest() + content)


def restore(folder: Path, config_sha256: str, state: Tree) -> Saved | None:
  """What was saved, None if nothing was.

  Args:
    config_sha256: of the configuration that goes on.
    state: of the editor at its start, whose structure and shapes the saved one must have.

  Raises:
    UserError: the file is damaged, or of another configuration.
  """
  path = folder / FILE
  if not path.exists():
    return None
  content = path.read_bytes()
  if hashlib.sha256(content[32:]).digest() != content[:32]:
    raise UserError(f'{path} is damaged (its digest differs): remove it to begin anew')
  with np.load(io.BytesIO(content[32:]), allow_pickle=False) as arrays:
    about = json.loads(bytes(arrays['about']))
    if about['config_sha256'] != config_sha256:
      raise UserError(f'{path} belongs to another configuration: name another --workdir')
    writes = [
      Write(name, layer, jnp.asarray(arrays[f'left{i}']),
            jnp.asarray(arrays[f'right{i}']) if factored else None)
      for i, (name, layer, factored) in enumerate(about.pop('writes'))
    ]  # fmt: skip
    leaves, shape = jax.tree.flatten(state)
    found: Sequence[Any] = [arrays[f'state{i}'] for i in range(about.pop('leaves'))]
  if [a.shape for a in found] != [np.shape(a) for a in leaves]:
    raise UserError(f'{path} holds the state of another editor: remove it to begin anew')
  return Saved(about, writes, jax.tree.unflatten(shape, map(jnp.asarray, found)))
