"""One learner over many devices: the batch cut (data parallel), or weights and moments too (fully sharded).

`sharded` makes of a model the same model with statements of where its arrays lie, `placed` makes of a learner
the same learner whose state lies where `rule` says. The step between them is that of every learner
(`cl_jax.learner`): XLA's partitioner, which reads the statements, adds what has to be communicated.

THE LEAF RULE (`rule`), for weights, gradients, moments and all that methods keep:
  a leaf is cut along ONE axis, its longest among those that the number of devices divides, the last one of
  several; the first axis of a stack of layers (a path with 'layers' in it) is not cut, since the scan over
  layers takes one layer whole from it. Leaves of less than SMALL values and those that are no floats (pixels
  of a memory that are bytes, tokens, counters, keys) are whole on every device: cutting them saves little and
  costs a message each. A memory has no rule of its own: its float rows (latent activations, features, logits)
  are cut as weights are.
In the mode 'data' every leaf is whole, and the batch alone is cut.

Zhao et al., PyTorch FSDP, 2023 (VLDB), sections 3.2 and 4: weights cut, gathered layer by layer, gradients
reduced into the same cut. Rajbhandari et al., ZeRO, 2020, stage 3. Deviations: no units to choose, a layer of
the stack is one; no parameter is flattened or padded, so a leaf that n divides on no axis stays whole; with
the model's `remat` weights are gathered again in the backward pass, without it XLA decides.

Lower down, and why. Statements, not `shard_map`: methods are written for whole arrays (a memory, a
projection, a solve), and stay correct whatever is cut. The statements go through the taps, which every model
has on its hidden activations, so that no model knows of devices. On a CPU a gradient is summed whole and then
cut; for GPUs XLA has a pass that makes a reduce-scatter of the two (not measured here).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cl_jax.errors import UserError
from cl_jax.masks import path_name
from cl_jax.types import Batch, Learner, Model, Out, State, Tree, no_tap

AXIS = 'devices'
MODES = ('data', 'fsdp')
SMALL = 1 << 12  # values: 16 KB of f32


class Cut(NamedTuple):
  """How a learner is spread.

  Attributes:
    mesh: devices in a row, of all processes.
    mode: 'data' or 'fsdp'.
    small: leaves of less values are whole.
  """

  mesh: Mesh
  mode: str = 'fsdp'
  small: int = SMALL

  @property
  def n(self) -> int:
    return self.mesh.size

  @property
  def whole(self) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec())


def over(devices: Sequence[Any] | None = None, mode: str = 'fsdp', small: int = SMALL) -> Cut:
  """A `Cut` over these devices, by default all there are, those of other processes included."""
  if mode not in MODES:
    raise UserError(f'shard={mode!r} is not known: use {" or ".join(map(repr, MODES))}')
  return Cut(Mesh(np.array(list(devices or jax.devices())), (AXIS,)), mode, small)


def axis(path: str, shape: Sequence[int], n: int, small: int = SMALL) -> int | None:
  """The axis of a float leaf that is cut over n devices by the leaf rule; None where it stays whole."""
  if n == 1 or int(np.prod(shape)) < small:
    return None
  first = 1 if 'layers' in path.split('/') else 0
  fits = [i for i in range(first, len(shape)) if shape[i] and shape[i] % n == 0]
  return max(fits, key=lambda i: (shape[i], i)) if fits else None


def rule(cut: Cut, tree: Tree) -> Tree:
  """The `NamedSharding` of every leaf (array or shape) of a tree."""

  def one(path, leaf) -> NamedSharding:
    found = None
    if cut.mode == 'fsdp' and jnp.issubdtype(leaf.dtype, jnp.floating):
      found = axis(path_name(path), leaf.shape, cut.n, cut.small)
    if found is None:
      return cut.whole
    names = [AXIS if i == found else None for i in range(len(leaf.shape))]
    return NamedSharding(cut.mesh, PartitionSpec(*names))

  return jax.tree_util.tree_map_with_path(one, tree)


def put(cut: Cut, tree: Tree, where: Tree = None) -> Tree:
  """A tree of arrays, the same on every process, laid over the devices; each process puts what its own hold.

  Args:
    where: a `NamedSharding` for each leaf, or for all; None is the leaf rule.
  """

  def one(a: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(a, jax.Array) and a.sharding == sharding:
      return a
    if hasattr(a, 'dtype') and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      # No function of jax puts a typed key on devices of other processes; a program may.
      return jax.jit(lambda key: key, out_shardings=sharding)(a)
    a = np.asarray(a)
    return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])

  where = rule(cut, tree) if where is None else where
  if isinstance(where, NamedSharding):
    return jax.tree.map(lambda a: one(a, where), tree)
  return jax.tree.map(one, tree, where)


def constrain(cut: Cut, tree: Tree) -> Tree:
  """Inside a program: the tree, laid out by the leaf rule; so is its gradient."""
  return jax.lax.with_sharding_constraint(tree, rule(cut, tree))


def rows(cut: Cut, tree: Tree, at: int = 0) -> Tree:
  """Inside a program: axis `at` of every leaf, of examples, is cut; one that n does not divide is whole."""

  def one(a):
    names = [None] * at + [AXIS]
    fits = jnp.ndim(a) > at and a.shape[at] % cut.n == 0
    spec = PartitionSpec(*names) if fits else PartitionSpec()
    return jax.lax.with_sharding_constraint(a, NamedSharding(cut.mesh, spec))

  return jax.tree.map(one, tree)


def sharded(model: Model, cut: Cut) -> Model:
  """The model, its weights and their gradients by the leaf rule, its activations cut by examples.

  The activations are those that go through its taps. Without these statements the partitioner would as soon
  move activations as weights where both are cut.
  """

  def apply(variables: Tree, batch: Batch, tap=no_tap, train: bool = False) -> Out:
    def here(name, h, layer=0):
      return rows(cut, tap(name, h, layer))

    n = batch.y.shape[0]
    if train and n % cut.n:
      raise UserError(
        f'{cut.n} devices cannot share {n} rows of a step evenly, replayed ones included: let config.batch, '
        f'and what a memory draws, be multiples of {cut.n}'
      )
    out = model.apply(constrain(cut, variables), rows(cut, batch), here, train)
    return out._replace(
      logits=rows(cut, out.logits), features=rows(cut, out.features), aux=rows(cut, out.aux)
    )

  return model._replace(apply=apply)


def placed(made: Learner, cut: Cut) -> Learner:
  """The learner, its state by the leaf rule before and after all it does, what it reports on every device."""
  whole = lambda tree: jax.lax.with_sharding_constraint(tree, cut.whole)  # noqa: E731

  def init(key, batch):
    return constrain(cut, made.init(key, batch))

  def step(state: State, batch: Batch):
    state, loss = made.step(constrain(cut, state), rows(cut, batch))
    return constrain(cut, state), whole(loss)

  def boundary(state: State, batches: Batch) -> State:
    return constrain(cut, made.boundary(constrain(cut, state), rows(cut, batches, 1)))

  def predict(state: State, batch: Batch):
    return whole(made.predict(state, rows(cut, batch)))

  measure: Callable | None = None
  if made.measure is not None:
    found = made.measure
    measure = lambda state, batch: whole(found(state, rows(cut, batch)))  # noqa: E731
  return Learner(init, step, boundary, predict, made.needs, measure)
