"""What the parity tests share: reference files, comparisons, and the network of `reference/problem.py`."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import io_callback

from cl_jax.learner import learner
from cl_jax.masks import nest, paths
from cl_jax.models.mlp import mlp
from cl_jax.types import Batch, Model

GOLDEN = Path(__file__).parent / 'golden'
OURS = {'l0': 'l0', 'l1': 'l1', 'l2': 'head'}
LEAVES = tuple(f'{layer}/{part}' for layer in OURS for part in 'wb')


class Golden:
  """One reference file; a missing key is an error."""

  def __init__(self, name):
    self.data = np.load(GOLDEN / f'{name}.npz', allow_pickle=False)

  def __getitem__(self, key):
    return self.data[key]

  def params(self, prefix, *where):
    """The reference's parameters in our names."""
    leaves = {name: self[f'{prefix}/{name}'][where] for name in LEAVES}
    return nest({f'{OURS[n[:2]]}/{n[3:]}': jnp.asarray(a) for n, a in leaves.items()})


def close(ours, theirs, rtol=1e-9):
  np.testing.assert_allclose(np.asarray(ours), theirs, rtol=rtol, atol=rtol)


def close_trees(ours, theirs, rtol=1e-9):
  ours, theirs = paths(ours), paths(theirs)
  assert set(ours) >= set(theirs)
  for name in theirs:
    np.testing.assert_allclose(ours[name], theirs[name], rtol=rtol, atol=rtol, err_msg=name)


def batch_of(x, y, task=-1):
  x, y = jnp.asarray(x), jnp.asarray(y, jnp.int32)
  return Batch(x, y, jnp.ones(y.shape), jnp.full(y.shape, task, jnp.int32))


def fixed(model: Model, params) -> Model:
  """The model with given initial parameters."""
  return model._replace(init=lambda key, batch: (params, {}))


def build(golden, method, classes=4, prefix='init', tx=None, frozen=None):
  model = fixed(mlp((8, 7), classes), golden.params(prefix))
  return learner(model, tx or optax.sgd(float(golden['lr'])), method, frozen)


def stacked(xs, ys, task=-1):
  """A task's batches as a boundary gets them, leaves [steps, rows, ...]."""
  return jax.vmap(lambda x, y: batch_of(x, y, task))(xs, ys)


def drawn(rows, slots):
  """The rows of our memory in the reference's slots; w = 0 where it drew none."""
  found = jax.tree.map(lambda a: a[np.maximum(slots, 0)], rows)
  return found._replace(w=jnp.asarray(slots >= 0, jnp.float64))


def from_host(values):
  """The first of `values`, f64 arrays of one shape, taken out whenever a compiled loop comes by.

  As words: the thread of a callback does not know that 64 bits are allowed here.
  """
  like = jax.ShapeDtypeStruct((*values[0].shape, 2), jnp.uint32)

  def words():
    return np.ascontiguousarray(values.pop(0), np.float64).view(np.uint32).reshape(like.shape)

  return jax.lax.bitcast_convert_type(io_callback(words, like, ordered=True), jnp.float64)
