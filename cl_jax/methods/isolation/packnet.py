"""PackNet: several tasks packed into one network by iterative pruning."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.linalg import of_task
from cl_jax.masks import nest, paths
from cl_jax.types import Array, Method, Tree


class PackNetState(NamedTuple):
  owner: Tree  # {path: u8 like the weight}: 0 free, t + 1 the task that owns it
  settled: Array  # bool[C], classes of finished tasks: their output columns are fixed
  now: Array  # bool[C], including the current task's
  task: Array  # i32[]
  step: Array  # i32[], steps since the last boundary


def packnet(
  prune: float = 0.75,
  first: float = 0.5,
  prune_after: int | tuple[int, ...] | None = None,
  retrain: float = 0.1,
  weights: str = '.*/w',
  head: str = 'head/.*',
) -> Method:
  """Trains the free weights, prunes the smallest of them, retrains the rest; the pruned are the next task's.

  Mallya & Lazebnik, CVPR 2018; official code arunmallya/packnet. Per weight matrix, the lowest
  floor(p * n) of |w| among the n weights of the CURRENT task are set to zero and freed. The model of task t
  uses the weights of tasks <= t. Biases and norm parameters and statistics are fixed after the first task.
  Frozen weights are restored after the update, so they keep their exact bits under any optimiser (masking
  the gradient would let momentum and weight decay move them).

  Deviations: the output layer is not pruned; the columns of a finished task's classes are fixed instead
  (the paper has a separate output layer per task, which a `task_head` gives). Retraining scales the
  update by `retrain`, as the paper's learning rate / 10 does for plain SGD.

  Args:
    prune: p from the second task on. 0.75 in the paper (0.5 for its smallest first-task setting).
    first: p for the first task.
    prune_after: step within a task after which it is pruned; the rest of the task retrains. None prunes at
      the boundary, without retraining. The paper retrains for half as many epochs: 2/3 of the steps. A tuple
      has one a task, for tasks of unequal length.
    retrain: factor on the update while retraining.
    weights: pattern of the weights to be pruned; matched against the whole path.
    head: pattern of the output layer's leaves, last axis = class.

  Needs the boundary and the task at test. State: 1 byte per prunable weight, 2 per class, 8 bytes.
  """

  def prunable(path):
    return re.fullmatch(weights, path) and not re.fullmatch(head, path)

  def init(key, params, batch, fwd):
    owner = {p: jnp.zeros(a.shape, jnp.uint8) for p, a in paths(params).items() if prunable(p)}
    if not owner:
      raise ValueError(f'packnet: no weight matches {weights!r}; there are {list(paths(params))}')
    none = jnp.zeros(jax.eval_shape(fwd, params, batch).logits.shape[-1], bool)
    return {}, PackNetState(owner, none, none, jnp.int32(0), jnp.int32(0))

  def pruned(s):
    """bool[]: the current task's pruning is over."""
    return jnp.bool_(False) if prune_after is None else s.step > of_task(prune_after, s.task)

  def wrap(s, apply):
    def own(variables, batch, t, tap):
      """The model of task t: what it may not use is zero."""

      def mask(path, a):
        owner = s.owner.get(path)
        if owner is None:
          return a
        still_free = (owner == 0) & (t == s.task) & ~pruned(s)
        return jnp.where(((owner > 0) & (owner <= t + 1)) | still_free, a, 0)

      masked = nest({p: mask(p, a) for p, a in paths(variables).items()})
      return apply(masked, batch, tap, False)

    def packed(variables, batch, tap, train):
      if train:  # free weights take part, pruned ones are zero: nothing to mask
        return fix_statistics(s, apply, variables, batch, tap)

      def body(t, out):
        mine = batch.task == t
        pick = lambda a, b: jnp.where(mine.reshape(-1, *[1] * (a.ndim - 1)), a, b)  # noqa: E731
        return jax.tree.map(pick, own(variables, batch, t, tap), out)

      # Row by row the model of its own task, by one pass per task that may occur: usually one.
      shape = jax.eval_shape(lambda v, b: own(v, b, s.task, tap), variables, batch)
      blank = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shape)
      return jax.lax.fori_loop(batch.task.min(), batch.task.max() + 1, body, blank)

    return packed

  def cut(s, params):
    """Frees the smallest weights of the current task and hands it the others."""
    share = jnp.where(s.task == 0, first, prune)
    leaves, owner = paths(params), {}
    for path, taken in s.owner.items():
      # A weight with three axes is a stack of matrices, one a layer.
      layers = taken.shape[0] if taken.ndim == 3 else 1
      mine = (taken == 0).reshape(layers, -1)
      size = jnp.where(mine, jnp.abs(leaves[path]).reshape(layers, -1), jnp.inf)
      k = jnp.floor(share * mine.sum(1, keepdims=True)).astype(jnp.int32)
      rank = jnp.argsort(jnp.argsort(size, stable=True))
      keep = (mine & (rank >= k)).reshape(taken.shape)
      owner[path] = jnp.where(keep, (s.task + 1).astype(jnp.uint8), taken)
      leaves[path] = jnp.where(owner[path] == 0, 0.0, leaves[path])
    return nest(leaves), s._replace(owner=owner)

  def after(s, params, step, key):
    now = s.now.at[step.batch.y].max(step.batch.w > 0)
    s = s._replace(step=s.step + 1, now=now)
    retraining = pruned(s)
    old = paths(step.params)
    kept = {}
    for path, new in paths(params).items():
      if path in s.owner:
        owner = s.owner[path]
        free = jnp.where(retraining, owner == (s.task + 1).astype(jnp.uint8), owner == 0)
      elif re.fullmatch(head, path):
        free = jnp.broadcast_to(~s.settled, new.shape)
      else:
        free = jnp.broadcast_to(s.task == 0, new.shape)
      moved = jnp.where(retraining, old[path] + retrain * (new - old[path]), new)
      kept[path] = jnp.where(free, moved, old[path])
    params = nest(kept)
    if prune_after is None:
      return params, s
    return jax.lax.cond(
      s.step == of_task(prune_after, s.task), lambda: cut(s, params), lambda: (params, s)
    )

  def boundary(s, params, batches, fwd, key):
    if prune_after is None:
      params, s = cut(s, params)
    else:  # a task that was shorter than `prune_after` has not been pruned yet
      params, s = jax.lax.cond(
        s.step < of_task(prune_after, s.task), lambda: cut(s, params), lambda: (params, s)
      )
    return params, PackNetState(s.owner, s.now, s.now, s.task + 1, jnp.int32(0))

  return Method(
    init=init, wrap=wrap, after=after, boundary=boundary, needs=('boundary', 'task_test')
  )


def fix_statistics(s: PackNetState, apply, variables: Tree, batch, tap):
  """The training pass; norm statistics are learnt in the first task and used as they are after it."""
  out = jax.eval_shape(lambda v, b: apply(v, b, tap, True), variables, batch)
  if not jax.tree.leaves(out.stats):
    return apply(variables, batch, tap, True)
  current = paths(variables)
  same = nest({p: current[p] for p in paths(out.stats)})
  return jax.lax.cond(
    s.task == 0,
    lambda: apply(variables, batch, tap, True),
    lambda: apply(variables, batch, tap, False)._replace(stats=same),
  )
