"""Progressive neural networks."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.masks import nest, paths
from cl_jax.types import Array, Method, Wire


def pnn(
  tasks: int,
  task_classes: tuple[tuple[int, ...], ...],
  lateral: float = 0.1,
  wires: tuple[Wire, ...] = (),
) -> Method:
  """Gives every task a column of its own, which also reads the hidden units of all columns before it.

  h_i^k = f(W_i^k h_{i-1}^k + sum_{j<k} U_i^{k:j} h_{i-1}^j); only column k is trained in task k

  Rusu et al. 2016 (arXiv:1606.04671), eq. 1; no official code. Deviations: no adapters (eq. 2), so that all
  columns together are the same network as one, only wider, with weights that are zero from later to
  earlier columns; that is how they run here. A new column starts from the first one's initial weights in
  random order, which is a draw from the same distribution where these were drawn independently.

  The output layer of a column has the classes of its task alone, and the task at test picks the column:
  chain it with a `task_head`. Works on networks whose wires cover all parameters (`mlp`, `cnn`).

  Args:
    tasks: number of columns.
    task_classes: the labels of each task, which no two tasks may share.
    lateral: initial lateral weights relative to those of the column itself.
    wires: `Model.wires` of the network, which is one column.

  Needs the boundary and the task at test. State: 4 bytes (and parameters: T - 1 columns more for T tasks, and
  T (T - 1) / 2 times the weights that do not read the input).
  """
  flat = [c for labels in task_classes for c in labels]
  if len(task_classes) < tasks or len(flat) != len(set(flat)):
    raise ValueError('pnn needs task_classes, the labels of each task, and no label in two of them')
  named = {w.layer: w for w in wires}
  source_of = {w.target: w.layer for w in wires}

  def init(key, params, batch, fwd):
    leaves = paths(params)
    known = {p for p, a in leaves.items() if p.rpartition('/')[0] in named and a.ndim != 3}
    odd = sorted(leaves.keys() - known) + sorted(paths(fwd.stats)) + sorted(paths(fwd.frozen))
    if odd or not known:
      raise UserError(
        'pnn makes columns of layers between taps (mlp, cnn), all trained and without norm statistics; '
        f'this network has {odd[:3] or "no wires"}'
      )
    columns = {}
    for k in range(1, tasks):
      drawn: dict[str, Array] = {}
      for path, a in leaves.items():
        layer, _, name = path.rpartition('/')
        shape = (*a.shape[:-1], len(task_classes[k])) if layer == 'head' else a.shape
        key, k_own, k_lateral = jax.random.split(key, 3)
        drawn[path] = shuffled(k_own, a, shape)
        if name == 'w' and named[layer].source:
          drawn[f'{layer}/u'] = lateral * shuffled(k_lateral, a, (k, *shape))
      columns[f'column{k}'] = nest(drawn)
    return {'pnn': columns}, jnp.int32(0)

  def wrap(s, apply):
    def wide(variables, batch, tap, train):
      columns = [variables, *(variables['pnn'][f'column{k}'] for k in range(1, tasks))]
      leaves = [paths({n: a for n, a in c.items() if n != 'pnn'}) for c in columns]
      whole: dict[str, Array] = {}
      for path, a in leaves[0].items():
        layer, _, name = path.rpartition('/')
        own = [c[path] for c in leaves]
        if layer == 'head':
          own[0] = own[0][..., list(task_classes[0])]
        if name == 'w' and named[layer].source:
          units = leaves[0][f'{source_of[named[layer].source]}/w'].shape[-1]
          own = [reading(k, w, leaves[k].get(f'{layer}/u'), units) for k, w in enumerate(own)]
        joined = jnp.concatenate(own, axis=-1)
        if layer == 'head':
          blank = jnp.zeros((*joined.shape[:-1], a.shape[-1]), joined.dtype)
          joined = blank.at[..., [c for t in task_classes[:tasks] for c in t]].set(joined)
        whole[path] = joined
      return apply(nest(whole), batch, tap, train)

    return wide

  def reading(k, w, u, units):
    """Column k's weight [..., rows, out] as one that reads all columns [..., rows * tasks, out]."""
    split = lambda a: a.reshape(*a.shape[:-2], -1, units, a.shape[-1])  # noqa: E731
    own = split(w)
    before = [split(u[j]) for j in range(k)]
    blocks = [*before, own, *[jnp.zeros_like(own)] * (tasks - 1 - k)]
    joined = jnp.concatenate(blocks, axis=-2)
    return joined.reshape(*w.shape[:-2], -1, w.shape[-1])

  def after(s, params, step, key):
    def trained(k):
      return lambda old, new: jnp.where(s == k, new, old)

    old, new = step.params, params
    columns = {
      f'column{k}': jax.tree.map(trained(k), old['pnn'][f'column{k}'], new['pnn'][f'column{k}'])
      for k in range(1, tasks)
    }
    apart = lambda p: {n: a for n, a in p.items() if n != 'pnn'}  # noqa: E731
    return {**jax.tree.map(trained(0), apart(old), apart(new)), 'pnn': columns}, s

  def boundary(s, params, batches, fwd, key):
    return params, s + 1

  return Method(
    init=init, wrap=wrap, after=after, boundary=boundary, needs=('boundary', 'task_test')
  )


def shuffled(key: Array, a: Array, shape: tuple[int, ...]) -> Array:
  """Entries of `a` in random order, as many as fill `shape`."""
  size = math.prod(shape)
  rounds = -(-size // a.size)
  keys = jax.random.split(key, rounds)
  mixed = jnp.concatenate([jax.random.permutation(k, a.reshape(-1)) for k in keys])
  return mixed[:size].reshape(shape)
