"""A learner as flat programs: lists of arrays in and out, which any ahead-of-time compiler takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax.types import Batch, Learner, State, Tree

SIGNED = {'uint8': 'int8', 'uint16': 'int16', 'uint32': 'int32', 'uint64': 'int64'}


class Leaf(NamedTuple):
  """One array of a flat program.

  Attributes:
    name: path in the tree, such as 'params/l0/w' or 'method/er/rows/x'.
    shape, dtype: as the program carries it.
    meaning: the dtype of the learner's own leaf: 'uint32' of an 'int32' with unsigned bits, 'key<...>' of
      the words of a typed key; elsewhere equal to `dtype`.
  """

  name: str
  shape: tuple[int, ...]
  dtype: str
  meaning: str


class Flat(NamedTuple):
  """A learner as programs over lists.

  Attributes:
    step: (leaves, batch) -> (leaves, loss).
    predict: (leaves, batch) -> logits.
    boundary: (leaves, batches) -> leaves; None where no boundary was asked for.
    state, batch, ends: what the lists hold.
    leaves: the initial state, NumPy.
  """

  step: Callable
  predict: Callable
  boundary: Callable | None
  state: tuple[Leaf, ...]
  batch: tuple[Leaf, ...]
  ends: tuple[Leaf, ...]
  leaves: list[np.ndarray]

  def restore(self, leaves: Sequence[Any], like: State) -> State:
    """The state that a list of leaves stands for; `like` gives its structure."""
    return _restore(self.state, jax.tree.structure(like), leaves)


def flatten(learner: Learner, state: State, batch: Batch, ends: Batch | None = None) -> Flat:
  """The learner's functions over flat lists.

  Typed keys travel as their words, and every unsigned leaf of the state as a signed one of the same bits
  (some edge compilers do not legalise unsigned state), which the programs bitcast inside. Nothing is donated
  (a donated export gives silently wrong numbers on some of them).

  Args:
    learner: see `Learner`.
    state: an initial state; strong types (see `loop.strong`) are not needed.
    batch: a stream batch, arrays or shapes: what `step` and `predict` are called with.
    ends: what `boundary` is called with, every leaf [S, B, ...]; None leaves the boundary out.
  """
  tree = jax.tree.structure(state)
  table = describe(state)

  def carry(new: State) -> list:
    return [_out(leaf, a) for leaf, a in zip(table, jax.tree.leaves(new), strict=True)]

  def program(f: Callable, shape: Tree) -> Callable:
    batch_tree = jax.tree.structure(shape)
    return lambda leaves, rows: f(
      _restore(table, tree, leaves), jax.tree.unflatten(batch_tree, rows)
    )

  def step(state, batch):
    new, loss = learner.step(state, batch)
    return carry(new), loss

  def end(state, batches):
    return carry(learner.boundary(state, batches))

  return Flat(
    program(step, batch),
    program(learner.predict, batch),
    None if ends is None else program(end, ends),
    table,
    describe(batch, signed=False),
    () if ends is None else describe(ends, signed=False),
    [np.asarray(a) for a in carry(state)],
  )


def describe(tree: Tree, signed: bool = True) -> tuple[Leaf, ...]:
  """The leaves of a tree of arrays or shapes; see `Leaf`."""
  table = []
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    shape, meaning = leaf.shape, str(leaf.dtype)
    if _is_key(leaf):
      shape, meaning = jax.eval_shape(jax.random.key_data, leaf).shape, str(leaf.dtype)
      table.append(Leaf(name, shape, 'int32', meaning))
      continue
    table.append(Leaf(name, shape, SIGNED.get(meaning, meaning) if signed else meaning, meaning))
  return tuple(table)


def shapes(leaves: Sequence[Leaf]) -> list[jax.ShapeDtypeStruct]:
  return [jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves]


def lower(f: Callable, *lists: Sequence[Leaf]) -> Any:
  """The StableHLO module of f for these lists.

  Lowered as for a TPU: Threefry comes unrolled (the same bits without a loop), factorisations as operations
  of their own instead of calls into LAPACK. It is what the backends read; nothing runs it as it is.
  """
  traced = jax.jit(f, keep_unused=True).trace(*(shapes(leaves) for leaves in lists))
  return traced.lower(lowering_platforms=('tpu',)).compiler_ir('stablehlo')


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _out(leaf: Leaf, a: Any) -> Any:
  a = jax.random.key_data(a) if _is_key(a) else jnp.asarray(a)
  return a if str(a.dtype) == leaf.dtype else jax.lax.bitcast_convert_type(a, leaf.dtype)


def _restore(table: Sequence[Leaf], tree: Any, leaves: Sequence[Any]) -> State:
  restored = []
  for leaf, a in zip(table, leaves, strict=True):
    if leaf.meaning.startswith('key<'):
      words = jax.lax.bitcast_convert_type(a, jnp.uint32)
      restored.append(jax.random.wrap_key_data(words))
    elif leaf.meaning != leaf.dtype:
      restored.append(jax.lax.bitcast_convert_type(a, leaf.meaning))
    else:
      restored.append(jnp.asarray(a))
  return jax.tree.unflatten(tree, restored)
